"""A reader for pickles of plain values that cannot run code, whatever the bytes.

Python's own unpickler is not used. This one knows the part of the format that builds dicts, lists, tuples, sets,
strings, bytes, numbers, booleans and None (protocols 0 to 5) and has no word for the rest: there is no way to import,
call, build or look up anything. Tuples and sets become lists; keys become text.

The instructions and their encodings are those that the standard library documents in ``pickletools``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

__all__ = ["MAX_INSTRUCTIONS", "PlainReader", "RefusedError"]

MAX_INSTRUCTIONS = 20_000_000
"""Bounds time, and memory to 2 GB: each takes at most some 90 bytes beyond its text. A unit has about 50 of them."""

_MAX_NUMBER_BYTES = 1024
_MAX_NUMBER_DIGITS = 2048
_LATEST_PROTOCOL = 5


class RefusedError(Exception):
    """The file asks for something that it may not have."""


class PlainReader:
    """A stack machine over one pickle; use it once.

    ``at`` is the byte that is read next; ``clashes`` counts the values that were left out because their keys, numbers,
    are keys as text as well.
    """

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self.clashes = 0
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """The value that the pickle holds, with shared parts shared.

        Raises RefusedError when it asks for more than plain values or is too large, and IndexError, KeyError,
        ValueError or struct.error when it is damaged or no pickle at all.
        """
        data, handlers = self._data, _HANDLERS
        for _ in range(MAX_INSTRUCTIONS):
            code = data[self.at]
            self.at += 1
            handler = handlers.get(code)
            if handler is not None:
                handler(self)
            elif code == _STOP:
                return self._stack.pop()
            else:
                self._refuse(code)
        raise RefusedError(f"has more than {MAX_INSTRUCTIONS} instructions")

    def _refuse(self, code: int) -> None:
        if code in (_GLOBAL, _STACK_GLOBAL):
            raise RefusedError(f"refers to the Python object {self._named(code)}, and only plain values are read")
        if code in _FORBIDDEN:
            raise RefusedError(f"wants to run Python code ({_FORBIDDEN[code]}), and only plain values are read")
        raise ValueError(f"unknown instruction 0x{code:02x}")

    def _named(self, code: int) -> str:
        parts = [self._line().decode("latin-1") for _ in range(2)] if code == _GLOBAL else self._stack[-2:]
        return ".".join(part[:60] if isinstance(part, str) else "?" for part in parts)

    # what is read

    def _take(self, count: int) -> bytes:
        end = self.at + count
        taken = self._data[self.at : end]
        if count < 0 or len(taken) != count:
            raise ValueError("the file is cut off")
        self.at = end
        return taken

    def _line(self) -> bytes:
        end = self._data.index(b"\n", self.at)
        line = self._data[self.at : end]
        self.at = end + 1
        return line

    def _number(self, layout: struct.Struct) -> Any:
        value = layout.unpack_from(self._data, self.at)[0]
        self.at += layout.size
        return value

    # what is built

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _popped(self) -> list[Any]:
        """Everything since the last mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self) -> None:
        self._popped()

    def duplicate(self) -> None:
        self.push(self._stack[-1])

    def list_of(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) != count:
            raise IndexError("too few values on the stack")
        self._stack[-count:] = [items]

    def list_since_mark(self) -> None:
        self.push(self._popped())

    def dict_since_mark(self) -> None:
        items = self._popped()
        self.push({})
        self._set_items(items)

    def append(self) -> None:
        value = self._stack.pop()
        self._top_list().append(value)

    def extend(self) -> None:
        items = self._popped()
        self._top_list().extend(items)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self._popped())

    def _top_list(self) -> list[Any]:
        top = self._stack[-1]
        if not isinstance(top, list):
            raise ValueError(f"a {type(top).__name__} is filled like a list")
        return top

    def _set_items(self, items: list[Any]) -> None:
        top = self._stack[-1]
        if not isinstance(top, dict) or len(items) % 2:
            raise ValueError(f"a {type(top).__name__} is filled with {len(items)} keys and values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                top[key] = value
            else:
                self._set_under_text(top, key, value)

    def _set_under_text(self, target: dict[str, Any], key: object, value: object) -> None:
        """Keys of JSON are text, and the hashes of text cannot be made to collide."""
        if key is not None and not isinstance(key, (int, float)):
            raise RefusedError(f"has a key of type {type(key).__name__}, and only text and numbers can be keys")
        text = str(key)
        if text in target:
            self.clashes += 1
        else:
            target[text] = value

    # numbers, texts and the memo

    def push_int_line(self) -> None:
        line = self._line()
        booleans = {b"00": False, b"01": True}  # protocol 0 has no other word for them
        self.push(booleans[line] if line in booleans else _whole_number(line))

    def push_long_line(self) -> None:
        self.push(_whole_number(self._line().removesuffix(b"L")))

    def push_long(self, layout: struct.Struct) -> None:
        count = self._number(layout)
        if count > _MAX_NUMBER_BYTES:
            raise RefusedError(f"has a whole number of {count} bytes, the most is {_MAX_NUMBER_BYTES}")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def push_float_line(self) -> None:
        self.push(float(self._line()))

    def push_number(self, layout: struct.Struct) -> None:
        self.push(self._number(layout))

    def push_text(self, layout: struct.Struct) -> None:
        self.push(self._take(self._number(layout)).decode("utf-8", "surrogatepass"))

    def push_text_line(self) -> None:
        self.push(self._line().decode("raw-unicode-escape"))

    def push_bytes(self, layout: struct.Struct) -> None:
        self.push(self._take(self._number(layout)))

    def push_old_text(self, layout: struct.Struct) -> None:
        self.push(_python2_text(self._take(self._number(layout))))

    def push_old_text_line(self) -> None:
        quoted = self._line().strip()
        if len(quoted) < 2 or quoted[:1] not in (b"'", b'"') or quoted[-1:] != quoted[:1]:
            raise ValueError("a text without its quotes")
        self.push(_python2_text(quoted[1:-1].decode("unicode-escape").encode("latin-1")))

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, layout: struct.Struct) -> None:
        self._memo[self._number(layout)] = self._stack[-1]

    def put_line(self) -> None:
        self._memo[_whole_number(self._line())] = self._stack[-1]

    def get(self, layout: struct.Struct) -> None:
        self.push(self._memo[self._number(layout)])

    def get_line(self) -> None:
        self.push(self._memo[_whole_number(self._line())])

    def protocol(self) -> None:
        version = self._take(1)[0]
        if version > _LATEST_PROTOCOL:
            raise ValueError(f"pickle protocol {version} is unknown")

    def frame(self) -> None:
        self._number(_U8)


def _whole_number(digits: bytes) -> int:
    if len(digits) > _MAX_NUMBER_DIGITS:
        raise RefusedError(f"has a whole number of {len(digits)} digits, the most is {_MAX_NUMBER_DIGITS}")
    return int(digits)


def _python2_text(data: bytes) -> str:
    """Python 2 kept texts as bytes and did not say which encoding they had."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


_Handler = Callable[[PlainReader], None]
_U1, _U2, _U4, _U8, _I4, _F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STOP, _GLOBAL, _STACK_GLOBAL = ord("."), ord("c"), 0x93
_FORBIDDEN = {
    ord("R"): "REDUCE",
    ord("b"): "BUILD",
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    0x81: "NEWOBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}


def _with(method: Callable[[PlainReader, Any], None], argument: Any) -> _Handler:
    return lambda reader: method(reader, argument)


_HANDLERS: dict[int, _Handler] = {
    ord("("): PlainReader.mark,
    ord("0"): PlainReader.pop,
    ord("1"): PlainReader.pop_mark,
    ord("2"): PlainReader.duplicate,
    ord("N"): lambda reader: reader.push(None),
    0x88: lambda reader: reader.push(True),
    0x89: lambda reader: reader.push(False),
    ord("I"): PlainReader.push_int_line,
    ord("L"): PlainReader.push_long_line,
    ord("F"): PlainReader.push_float_line,
    ord("J"): _with(PlainReader.push_number, _I4),
    ord("K"): _with(PlainReader.push_number, _U1),
    ord("M"): _with(PlainReader.push_number, _U2),
    ord("G"): _with(PlainReader.push_number, _F8),
    0x8A: _with(PlainReader.push_long, _U1),
    0x8B: _with(PlainReader.push_long, _I4),
    ord("S"): PlainReader.push_old_text_line,
    ord("T"): _with(PlainReader.push_old_text, _I4),
    ord("U"): _with(PlainReader.push_old_text, _U1),
    ord("V"): PlainReader.push_text_line,
    ord("X"): _with(PlainReader.push_text, _U4),
    0x8C: _with(PlainReader.push_text, _U1),
    0x8D: _with(PlainReader.push_text, _U8),
    ord("B"): _with(PlainReader.push_bytes, _U4),
    ord("C"): _with(PlainReader.push_bytes, _U1),
    0x8E: _with(PlainReader.push_bytes, _U8),
    ord("]"): lambda reader: reader.push([]),
    ord(")"): lambda reader: reader.push([]),
    0x8F: lambda reader: reader.push([]),
    ord("}"): lambda reader: reader.push({}),
    ord("l"): PlainReader.list_since_mark,
    ord("t"): PlainReader.list_since_mark,
    0x91: PlainReader.list_since_mark,
    ord("d"): PlainReader.dict_since_mark,
    0x85: _with(PlainReader.list_of, 1),
    0x86: _with(PlainReader.list_of, 2),
    0x87: _with(PlainReader.list_of, 3),
    ord("a"): PlainReader.append,
    ord("e"): PlainReader.extend,
    0x90: PlainReader.extend,
    ord("s"): PlainReader.set_item,
    ord("u"): PlainReader.set_items,
    0x94: PlainReader.memoize,
    ord("p"): PlainReader.put_line,
    ord("q"): _with(PlainReader.put, _U1),
    ord("r"): _with(PlainReader.put, _U4),
    ord("g"): PlainReader.get_line,
    ord("h"): _with(PlainReader.get, _U1),
    ord("j"): _with(PlainReader.get, _U4),
    0x80: PlainReader.protocol,
    0x95: PlainReader.frame,
}
