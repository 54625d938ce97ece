"""Old stores are read without running anything that is in them."""

from __future__ import annotations

import codecs
import collections
import copyreg
import io
import os
import pickle
import pickletools
import random
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SEED, each

from memevolve_gpu.components.store import legacy_import
from memevolve_gpu.components.store.legacy_import import LegacyStore, PlainReader, read_legacy
from memevolve_gpu.errors import LegacyImportError

UNITS: dict[str, dict[str, Any]] = {
    "unit_0": {
        "id": "unit_0",
        "type": "lesson",
        "content": "Close the file before you rename it. 日本 \U0001f600 \\u0041 'quoted' \x1a\r\n",
        "tags": ["files", "rename"],
        "metadata": {"created_at": "2024-01-01T00:00:00Z", "score": 0.75, "uses": 300, "big": 2**70, "old": -1},
    },
    "unit_1": {
        "id": "unit_1",
        "type": "tool",
        "content": "",
        "tags": [],
        "metadata": {"ok": True, "bad": False, "n": None},
    },
}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WATCHED = {
    "import",
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
}

for _codec in ("raw-unicode-escape", "unicode-escape", "latin-1"):
    codecs.lookup(_codec)  # imports a module of the standard library when it is first used

_watching: list[list[str]] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event in WATCHED:
        _watching[-1].append(f"{event} {args!r:.80}")


sys.addaudithook(_watch)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails when the interpreter reports an import, a call of the shell or the like."""
    events = list[str]()
    _watching.append(events)
    try:
        yield
    finally:
        _watching.pop()
    assert events == []


def write(folder: Path, data: bytes) -> Path:
    (folder / "memory.data").write_bytes(data)
    return folder / "memory"


def read(prefix: Path | str) -> LegacyStore:
    with nothing_runs():
        found = read_legacy(prefix)
    assert found is not None
    return found


def refusal(prefix: Path, says: str) -> str:
    """The message of the refusal; the file is as it was."""
    before = Path(f"{prefix}.data").read_bytes()
    with nothing_runs(), pytest.raises(LegacyImportError, match=says) as caught:
        read_legacy(prefix)
    assert str(Path(f"{prefix}.data")) in str(caught.value)
    assert Path(f"{prefix}.data").read_bytes() == before
    return str(caught.value)


# --- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_gives_the_units_as_they_were(tmp_path: Path, protocol: int) -> None:
    prefix = write(tmp_path, pickle.dumps(UNITS, protocol=protocol))
    found = read(prefix)
    assert found.units == list(UNITS.values())
    assert found.problems == []
    assert found.source == tmp_path / "memory.data"
    assert read(str(prefix)).units == found.units


def test_no_file_is_no_old_store(tmp_path: Path) -> None:
    assert read_legacy(tmp_path / "memory") is None
    assert read_legacy(tmp_path / "no such folder" / "memory") is None
    (tmp_path / "memory.index").write_bytes(b"IxF2 an index alone is no store")
    assert read_legacy(tmp_path / "memory") is None


def test_neither_file_is_written_and_the_index_is_not_read(tmp_path: Path) -> None:
    prefix = write(tmp_path, pickle.dumps(UNITS))
    index = tmp_path / "memory.index"
    index.mkdir()  # reading it would fail
    for path in (index, tmp_path / "memory.data"):
        path.chmod(stat.S_IREAD | stat.S_IEXEC)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    assert len(read(prefix).units) == 2
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("around", [{}, {"next_id": 7}, {"version": "1", "index_type": "ivf"}])
def test_a_dict_around_the_units_is_taken_off(tmp_path: Path, around: dict[str, Any]) -> None:
    prefix = write(tmp_path, pickle.dumps({"data": UNITS, **around}))
    assert read(prefix).units == list(UNITS.values())


def test_a_unit_that_is_called_data_is_a_unit(tmp_path: Path) -> None:
    units = {"data": {"id": "data", "content": "about data", "metadata": {}}, **UNITS}
    assert read(write(tmp_path, pickle.dumps(units))).units == list(units.values())


def test_an_empty_store_has_no_units(tmp_path: Path) -> None:
    stores: list[dict[str, Any]] = [{}, {"data": {}}, {"data": {}, "next_id": 0}]
    for empty in stores:
        found = read(write(tmp_path, pickle.dumps(empty)))
        assert (found.units, found.problems) == ([], [])


def test_the_key_wins_over_the_unit_s_own_id(tmp_path: Path) -> None:
    units = {"a": {"id": "b", "content": "x"}, "c": {"content": "y"}, "d": {"id": None, "content": "z"}}
    found = read(write(tmp_path, pickle.dumps(units)))
    assert [unit["id"] for unit in found.units] == ["a", "c", "d"]
    assert found.problems[0] == "unit 'a' called itself 'b'; the key was kept"
    assert not any("'c'" in problem for problem in found.problems)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tuples_and_sets_become_lists_and_keys_become_text(tmp_path: Path, protocol: int) -> None:
    unit: dict[Any, Any] = {"content": "x", "tags": ("a", "b", ("c",)), 5: "five", "span": (1, 2, 3, 4), "none": ()}
    if protocol >= 4:  # below, a set is pickled as a call
        unit |= {"set": {7}, "frozen": frozenset({8})}
    found = read(write(tmp_path, pickle.dumps({7: unit}, protocol=protocol))).units[0]
    assert found["tags"] == ["a", "b", ["c"]]
    assert (found["5"], found["span"], found["none"], found["id"]) == ("five", [1, 2, 3, 4], [], "7")
    if protocol >= 4:
        assert (found["set"], found["frozen"]) == ([7], [8])


def test_keys_that_become_the_same_text_are_reported(tmp_path: Path) -> None:
    found = read(write(tmp_path, pickle.dumps({"7": {"content": "text"}, 7: {"content": "number"}})))
    assert [unit["content"] for unit in found.units] == ["text"]
    assert found.problems == ["1 values were left out: their keys, numbers, are keys as text as well"]


def test_units_that_cannot_be_taken_are_reported_and_the_others_are_taken(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {"content": "x"}
    cyclic["self"] = cyclic
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    units = {
        "text": "no unit",
        "none": None,
        "list": [1],
        "bytes": {"content": b"x"},
        "cyclic": cyclic,
        "deep": {"a": deep},
    }
    found = read(write(tmp_path, pickle.dumps({**units, **UNITS})))
    assert found.units == list(UNITS.values())
    assert len(found.problems) == len(units)
    for key, problem in zip(units, found.problems, strict=True):
        assert problem.startswith(f"unit '{key}' was left out: ")


def test_units_share_no_parts(tmp_path: Path) -> None:
    metadata, tags = {"a": 1}, ["t"]
    unit = {"content": "x", "metadata": metadata, "tags": tags}
    found = read(write(tmp_path, pickle.dumps({"a": unit, "b": unit, "c": dict(unit)}))).units
    found[0]["metadata"]["a"] = 2
    found[0]["tags"].append("u")
    assert [unit["metadata"] for unit in found] == [{"a": 2}, {"a": 1}, {"a": 1}]
    assert [unit["tags"] for unit in found] == [["t", "u"], ["t"], ["t"]]


def test_what_follows_the_pickle_is_reported(tmp_path: Path) -> None:
    found = read(write(tmp_path, pickle.dumps(UNITS) + b"garbage"))
    assert found.units == list(UNITS.values())
    assert found.problems == ["7 bytes after the end of the pickle were ignored"]


def test_problems_are_bounded(tmp_path: Path) -> None:
    found = read(write(tmp_path, pickle.dumps({str(number): 5 for number in range(3000)})))
    assert len(found.problems) == 1001
    assert found.problems[-1] == "and 2000 more"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"S'caf\\xc3\\xa9'\n", "café"),
        (b'S"caf\\xe9"\n', "café"),
        (b"U\x05caf\xc3\xa9", "café"),
        (b"T\x04\x00\x00\x00caf\xe9", "café"),
        (b"Vcaf\\u00e9\n", "café"),
    ],
)
def test_texts_of_python_2_are_read(tmp_path: Path, data: bytes, text: str) -> None:
    found = read(write(tmp_path, b"(dp0\nS'u'\n(dS'content'\n" + data + b"ss."))
    assert found.units == [{"content": text, "id": "u"}]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=30,
)


@given(
    units=st.dictionaries(st.text(), st.dictionaries(st.text(), plain, max_size=5), max_size=6),
    protocol=st.sampled_from(PROTOCOLS),
    optimized=st.booleans(),
)
def test_plain_values_come_back_as_they_were(units: dict[str, Any], protocol: int, optimized: bool) -> None:
    data = pickle.dumps(units, protocol=protocol)
    assert PlainReader(pickletools.optimize(data) if optimized else data).run() == units


def test_the_pure_python_pickler_writes_nothing_else(tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        target = io.BytesIO()
        pickle._Pickler(target, protocol).dump(UNITS)
        assert read(write(tmp_path, target.getvalue())).units == list(UNITS.values())


# --- what is refused --------------------------------------------------------------------------------------------


class Payload:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    """Pickles with a state that ``__setstate__`` would be given."""

    def __init__(self) -> None:
        self.state = 1


class NewArguments(dict[str, Any]):
    """Pickles with NEWOBJ_EX."""

    def __getnewargs_ex__(self) -> Any:
        return (), {"a": 1}


def _persistent(protocol: int) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return "secret" if obj == "secret" else None

    target = io.BytesIO()
    Pickler(target, protocol).dump({"a": "secret"})
    return target.getvalue()


SHELL = "touch ran"
HOSTILE_OBJECTS = {
    "system": Payload(os.system, SHELL),
    "eval": Payload(eval, "open('ran', 'w')"),
    "exec": Payload(exec, "open('ran', 'w')"),
    "open": Payload(open, "ran", "w"),
    "import": Payload(__import__, "this"),
    "getattr": Payload(getattr, "text", "upper"),
    "nested": {"a": {"metadata": {"tags": [("x", Payload(os.system, SHELL))]}}},
    "state": {"a": Stateful()},
    "new": {"a": NewArguments()},
    "ordered": collections.OrderedDict(UNITS),
    "default": collections.defaultdict(dict, UNITS),
    "time": {"a": {"created": datetime(2024, 1, 1, tzinfo=timezone.utc)}},
    "scalar": {"a": {"score": np.float64(0.5)}},
    "array": {"a": {"embedding": np.zeros(3)}},
    "class": {"a": dict},
    "function": {"a": len},
    "complex": {"a": {"z": 1j}},
    "bytearray": {"a": bytearray(b"x")},
    "path": {"a": Path("x")},
    "exception": {"a": ValueError("x")},
}


@each("name", HOSTILE_OBJECTS)
def test_whatever_is_not_plain_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    for protocol in PROTOCOLS:
        prefix = write(tmp_path, pickle.dumps(HOSTILE_OBJECTS[name], protocol=protocol))
        message = refusal(prefix, "only plain values are read")
        assert "nothing was imported" in message, protocol
        assert not (tmp_path / "ran").exists(), protocol
        assert not Path("ran").exists(), protocol


HOSTILE_BYTES = {
    "global": b"cos\nsystem\n(S'touch ran'\ntR.",
    "global after a dict": b"}cos\nsystem\n(S'touch ran'\ntR.",
    "inst": b"(S'touch ran'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch ran'\no.",
    "stack global": b"\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "dotted getattr": b"\x80\x04\x8c\x08builtins\x8c\x0edict.__class__\x93.",
    "reduce of a string": b"S'os.system'\n(S'touch ran'\ntR.",
    "build on a dict": b"}(S'__class__'\nN\x86b.",
    "newobj": b"\x80\x02N)\x81.",
    "newobj ex": b"\x80\x04N)}\x92.",
    "persistent id": b"Pos.system\n.",
    "persistent id on the stack": b"\x80\x02S'x'\nQ.",
    "extension 1": b"\x80\x02\x82\x01.",
    "extension 2": b"\x80\x02\x83\x01\x00.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "bytearray": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
    "huge bytearray": b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",
    "next buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05N\x98.",
    "global with dots for a name": b"c__main__\n__builtins__.eval\n(S'1'\ntR.",
}


def test_every_instruction_that_could_run_code_is_refused(tmp_path: Path) -> None:
    for name, data in HOSTILE_BYTES.items():
        refusal(write(tmp_path, data), "only plain values are read")
        assert not Path("ran").exists(), name


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_persistent_ids_are_refused(tmp_path: Path, protocol: int) -> None:
    refusal(write(tmp_path, _persistent(protocol)), "PERSID")


def test_a_registered_extension_is_refused_although_it_was_loaded_before(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # the unpickler now keeps the function and asks nobody
        refusal(write(tmp_path, b"\x80\x02\x82\xf0S'touch ran'\n\x85R."), "EXT1")
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()
    assert not Path("ran").exists()


def test_every_instruction_of_the_format_is_known_or_refused() -> None:
    codes = {ord(opcode.code) for opcode in pickletools.opcodes}
    refused = {ord(code) for code in "RbioPQ\x81\x82\x83\x84\x92\x96\x97\x98"}
    assert {*legacy_import._HANDLERS, *refused} == codes
    assert refused.isdisjoint(legacy_import._HANDLERS)


GARBAGE = {
    "empty": b"",
    "text": b"not a pickle at all",
    "json": b'{"unit_0": {"content": "x"}}',
    "zeros": bytes(100),
    "sqlite": b"SQLite format 3\0" + bytes(84),
    "faiss": b"IxFI" + bytes(96),
    "gzip": b"\x1f\x8b\x08\0" + bytes(96),
    "a future protocol": b"\x80\x06}.",
    "only a stop": b".",
    "pop of nothing": b"0.",
    "mark is missing": b"t.",
    "memo is empty": b"h\x05.",
    "appending to a dict": b"}Na.",
    "setting in a list": b"]NNs.",
    "odd items": b"}(S'a'\nu.",
    "quotes are missing": b"Sabc\n.",
    "text is longer than the file": b"X\xff\xff\xff\x7fabc.",
    "text is very much longer": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "negative length": b"T\xff\xff\xff\xffabc.",
    "negative number length": b"\x8b\xff\xff\xff\xff.",
    "not utf-8": b"X\x02\x00\x00\x00\xff\xfe.",
    "not a number": b"Iabc\n.",
    "tuple of too few": b"N\x87.",
}


def test_garbage_is_a_named_error(tmp_path: Path) -> None:
    for data in GARBAGE.values():
        refusal(write(tmp_path, data), "damaged or no pickle at byte")


@pytest.mark.parametrize("value", [[], [UNITS], "text", 5, None, (1, 2), b"bytes"])
def test_what_is_no_dict_is_refused(tmp_path: Path, value: Any) -> None:
    refusal(write(tmp_path, pickle.dumps(value)), "where a dict of units is expected")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(UNITS, protocol=protocol)
    for length in range(len(data)):
        refusal(write(tmp_path, data[:length]), "damaged or no pickle")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flipped_bytes_never_run_and_never_raise_anything_else(tmp_path: Path, protocol: int) -> None:
    generator = random.Random(SEED)
    data = pickle.dumps({**UNITS, "evil": Payload(os.system, SHELL)}, protocol=protocol)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        prefix = write(tmp_path, bytes(damaged))
        with nothing_runs():
            try:
                read_legacy(prefix)
            except LegacyImportError:
                continue
    assert not Path("ran").exists()


@given(data=st.binary(max_size=200))
def test_any_bytes_at_all_are_read_or_refused(data: bytes) -> None:
    with nothing_runs():
        try:
            PlainReader(data).run()
        except (legacy_import.RefusedError, *legacy_import._DAMAGED):
            return


# --- bombs ------------------------------------------------------------------------------------------------------


def test_values_that_unfold_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_import, "_MAX_UNIT_SIZE", 2**20)  # a sixteenth: what grows without end passes any bound
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    found = read(write(tmp_path, pickle.dumps({"a": {"content": laughs}, **UNITS})))
    assert found.units == list(UNITS.values())
    assert "unfold beyond" in found.problems[0]


def test_many_units_that_share_one_large_value_are_refused(tmp_path: Path) -> None:
    shared = "x" * 1_000_000
    refusal(
        write(tmp_path, pickle.dumps({str(n): {"content": [shared]} for n in range(200)})), "many times the file's size"
    )


def test_deep_nesting_does_not_exhaust_the_interpreter(tmp_path: Path) -> None:
    for nested in (b"]" * 300_000 + b"a" * 299_999, b"(" * 300_000 + b"l" * 300_000):
        found = read(write(tmp_path, b"}S'u'\n}S'content'\n" + nested + b"sS'x'\nNss."))
        assert found.units == []
        assert "nested more than 100 deep" in found.problems[0]


@pytest.mark.parametrize("nested", [b")" + b"2\x86" * 60, b")" + b"\x85" * 300_000], ids=["wide", "deep"])
@pytest.mark.parametrize("container", [b"}%sNs.", b"}(%sNu.", b"(%sNd."], ids=["setitem", "setitems", "dict"])
def test_nested_tuples_are_no_keys_and_are_not_hashed(tmp_path: Path, nested: bytes, container: bytes) -> None:
    refusal(write(tmp_path, container % nested), "key of type list")


def test_nested_tuples_in_a_set_are_not_hashed(tmp_path: Path) -> None:
    wide = b")" + b"2\x86" * 60
    found = read(write(tmp_path, b"}S'u'\n}S'tags'\n\x8f(" + wide + b"\x90ss."))
    assert found.units == []
    assert "unfold beyond" in found.problems[0] or "nested" in found.problems[0]


def test_a_large_memo_number_costs_nothing(tmp_path: Path) -> None:
    for put in (b"r\xff\xff\xff\xff", b"p99999999999\n"):
        assert read(write(tmp_path, b"}" + put + b".")).units == []


@pytest.mark.parametrize(
    "number",
    [b"I" + b"9" * 100_000 + b"\n", b"L" + b"9" * 100_000 + b"L\n", b"\x8b\x00\x00\x01\x00" + b"\x7f" * 65536],
)
def test_endless_numbers_are_refused(tmp_path: Path, number: bytes) -> None:
    refusal(write(tmp_path, b"}S'a'\n" + number + b"s."), "whole number of")


def test_endless_instructions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_import, "MAX_INSTRUCTIONS", 1000)
    refusal(write(tmp_path, b"N0" * 600 + b"}."), "more than 1000 instructions")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_import, "MAX_FILE_BYTES", 100)
    refusal(write(tmp_path, pickle.dumps({"a": "x" * 100})), "larger than 100 bytes")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.data")
    (tmp_path / "folder.data").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(LegacyImportError, match="no regular file"):
            read_legacy(tmp_path / name)


def test_a_file_that_may_not_be_read_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    prefix = write(tmp_path, pickle.dumps(UNITS))
    monkeypatch.setattr(Path, "open", denied)  # permissions do not bind the superusers that tests often run as
    with pytest.raises(LegacyImportError, match=r"memory\.data: cannot be read \(Permission denied\)"):
        read_legacy(prefix)
