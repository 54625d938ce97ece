r"""Index snapshots on disk: written atomically, used only after sizes and checksums are verified.

Layout, little-endian::

    offset 0   magic      8 bytes  b"MEVSNAP\n"
           8   version    u32      4
          12   length     u32      bytes of the header
          16   crc        u32      CRC-32 of version, length and header
          20   header     JSON     info with plan; sections in order, each with name, dtype, shape, crc32;
                                   checked_rows
         ...   the sections, each at the next multiple of 4096, the vectors at one of 65536, so that pages of any
               size can be mapped; zeros between them; the last one ends the file

The vectors are the first section, since they may be in the file before everything else: see :mod:`.spill`.

Nothing is allocated before its size was compared with the size of the file, and no byte is handed to an engine before
its checksum held. The vectors are not read but mapped in place, from a file that is never written to again, and so are
those of an index that was just written. A section of its own, ``vector_checksums`` uint32, holds the CRC-32 of each
block of ``checked_rows`` rows of them: a block is checked when it is first used, or in the background, so that opening
reads no vectors. The section's own ``crc32`` is that of its checksums. Version 3 says nothing of ``checked_rows``: its
blocks have 64 rows.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, MemEvolveError
from ..types import IndexPlan, IntArray, JsonObject, Metric
from ..utils.drafts import PRIVATE, draft_of, name_file, sync_folder
from .base import CENTROIDS, VECTORS, Arrays, Index
from .registry import KINDS, from_parts
from .spill import FIRST_ROW
from .vector_table import checksums_of, growable, mapped, rows_per_checksum, sealed_spill

FORMAT_VERSION = 4
READABLE_VERSIONS = (3, FORMAT_VERSION)
_ROWS_OF_VERSION_3 = 64

_MAGIC = b"MEVSNAP\n"
_PREFIX = struct.Struct("<8sIII")
_PAGE, _LARGEST_PAGE = 4096, 65536
_DEAD = "dead"
_CHECKSUMS = "vector_checksums"
_MAPPED = (VECTORS, CENTROIDS)
_MAX_HEADER = 1 << 20
_DTYPES = {"uint8", "int32", "uint32", "int64", "float32"}
_METRICS = ("l2", "cosine", "ip")
_PRECISIONS = ("float32", "float16", "int8")

SnapshotReason = Literal["missing", "unreadable", "torn", "garbage", "version", "foreign", "damaged", "unwritable"]


class SnapshotError(MemEvolveError):
    """A snapshot that cannot be used or written; ``reason`` is one word, the message says what was found.

    missing: no such file. unreadable, unwritable: the system refused. torn: shorter or longer than it says.
    garbage: not a snapshot. version: written in a newer format. foreign: of another store, dimension or metric.
    damaged: a checksum does not hold or the contents contradict each other.
    """

    def __init__(self, reason: SnapshotReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What a snapshot says about itself.

    ``watermark`` is the sequence number up to which the log is contained, ``created_at`` seconds since 1970,
    ``extra`` any JSON object of the caller's. ``dead`` int64 (m,): positions of the rows that are dead as of the
    watermark, ascending; a section of its own, empty from :func:`read_info`.
    """

    store_id: str
    generation: int
    watermark: int
    count: int
    plan: IndexPlan
    metric: Metric
    dim: int
    created_at: float
    seed: int
    extra: JsonObject = field(default_factory=dict)
    dead: IntArray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_snapshot(path: str | os.PathLike[str], index: Index, info: SnapshotInfo, mode: int = PRIVATE) -> None:
    """Write ``index`` to ``path``, replacing what is there in one step, and let it read its vectors from there.

    mode: of the file, as ``chmod`` takes it.

    Raises:
        SnapshotError: the system refuses (disk full, no permission, folder missing); what was at ``path`` stays.
    """
    target = Path(path)
    parts = index.parts()
    arrays = {name: np.ascontiguousarray(parts[name]) for name in sorted(parts, key=VECTORS.__ne__)}
    arrays[_CHECKSUMS] = checksums_of(arrays[VECTORS])
    if len(info.dead):
        arrays[_DEAD] = np.ascontiguousarray(info.dead)
    header = _header_bytes(arrays, info)
    if len(header) > _MAX_HEADER:
        raise SnapshotError("unwritable", f"extra: the header takes {len(header)} bytes, {_MAX_HEADER} are allowed")
    try:
        if not _take_over(target, index, header, arrays, mode):
            _write_anew(target, index, header, arrays, mode)
        sync_folder(target.parent)
    except OSError as error:
        raise SnapshotError(
            "unwritable", f"cannot write snapshot {target}: {error.strerror or error}; free space or check permissions"
        ) from error


def read_snapshot(
    path: str | os.PathLike[str], *, store_id: str, dim: int, metric: Metric
) -> tuple[Index, SnapshotInfo]:
    """Read and verify the snapshot at ``path``.

    Raises:
        SnapshotError: missing, torn, foreign, damaged or not a snapshot; never anything else for what a file contains.
        EngineError: faiss itself cannot be loaded.
    """
    with _opened(path) as file:
        info, sections, checked_rows = _read_header(file)
        if (info.store_id, info.dim, info.metric) != (store_id, dim, metric):
            raise SnapshotError(
                "foreign",
                f"snapshot {path} belongs to store {info.store_id!r} ({info.dim} dimensions, {info.metric}), "
                f"not to {store_id!r} ({dim}, {metric}); it is ignored",
            )
        parts = _read_sections(file, sections)
    dead, checksums = parts.pop(_DEAD, info.dead), parts.pop(_CHECKSUMS)
    try:
        index = from_parts(info.plan, info.metric, parts)
        index.table.check_with(checksums, checked_rows)
    except EngineError as error:
        raise SnapshotError("damaged", f"snapshot {path} cannot be restored: {error}") from error
    if (index.n, index.dim) != (info.count, info.dim):
        raise SnapshotError("damaged", f"snapshot {path} holds {index.n} x {index.dim}, its header says otherwise")
    return index, replace(info, dead=_positions(dead, index.n, path))


def read_info(path: str | os.PathLike[str]) -> SnapshotInfo:
    """Read and verify the header alone.

    Raises:
        SnapshotError: missing, torn, damaged or not a snapshot.
    """
    with _opened(path) as file:
        return _read_header(file)[0]


# ----------------------------------------------------------------------------------------------------------- writing


def _write_anew(target: Path, index: Index, header: bytes, arrays: Arrays, mode: int) -> None:
    with draft_of(target, mode) as draft, open(draft.handle, "w+b", closefd=False) as file:
        places = _write(file, header, arrays)
        file.flush()
        os.fsync(file.fileno())
        draft.path.replace(target)
        _map(index, file, places, arrays, target.parent)


def _take_over(target: Path, index: Index, header: bytes, arrays: Arrays, mode: int) -> bool:
    """Make the spill in which the last vectors lie the snapshot; False where there is none, or it cannot be named.

    The file has no name until it is complete and synced. What a failure has written is given back.
    """
    if _PREFIX.size + len(header) > FIRST_ROW:
        return False
    vectors = arrays[VECTORS]
    spill = sealed_spill(vectors)
    if spill is None:
        return False
    named = False
    try:
        with open(spill.file, "r+b", closefd=False) as file:
            size = _sections_end(_PREFIX.size + len(header), [(name, array.nbytes) for name, array in arrays.items()])
            os.posix_fallocate(spill.file, 0, size)
            places = _write(file, header, arrays, vectors.nbytes - spill.start)
            file.truncate(size)
            os.fsync(spill.file)
            named = name_file(spill.file, target, mode)
            if named:
                _map(index, file, places, arrays, target.parent)
    finally:
        if not named:
            spill.give_back(vectors.nbytes)
    return named


def _write(file: BinaryIO, header: bytes, arrays: Arrays, held: int = 0) -> dict[str, int]:
    """Write all but the last ``held`` bytes of the vectors, which the file has; returns where each section begins."""
    places = {}
    crc = _header_crc(FORMAT_VERSION, header)
    file.seek(0)
    file.write(_PREFIX.pack(_MAGIC, FORMAT_VERSION, len(header), crc) + header)
    for name, array in arrays.items():
        file.write(bytes(_gap(name, file.tell())))
        places[name] = file.tell()
        if array.nbytes:
            own = held if name == VECTORS else 0
            file.write(_raw(array)[: array.nbytes - own])
            file.seek(own, os.SEEK_CUR)
    file.flush()
    return places


def _map(index: Index, file: BinaryIO, places: dict[str, int], arrays: Arrays, folder: Path) -> None:
    """Have ``index`` read its vectors from where they were written; where that cannot be they stay in memory."""
    with suppress(OSError):
        index.moved_to(
            {
                name: mapped(file.fileno(), places[name], arrays[name].shape, np.float32, folder)
                for name in _MAPPED
                if name in arrays
            }
        )


def _header_bytes(arrays: Arrays, info: SnapshotInfo) -> bytes:
    plan = asdict(info.plan)
    del plan["refusal"]  # of the day when it was planned; the index itself has none
    described = {f.name: getattr(info, f.name) for f in fields(info) if f.name != _DEAD} | {"plan": plan}
    sections = [
        {
            "name": name,
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "crc32": zlib.crc32(_raw(arrays[_CHECKSUMS] if name == VECTORS else array)),
        }
        for name, array in arrays.items()
    ]
    document = {"info": described, "sections": sections, "checked_rows": rows_per_checksum(info.dim)}
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def _header_crc(version: int, header: bytes) -> int:
    return zlib.crc32(header, zlib.crc32(struct.pack("<II", version, len(header))))


def _raw(array: npt.NDArray[np.generic]) -> memoryview:
    """The bytes of a C-contiguous array; an empty one has none."""
    return array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(bytearray())


def _gap(name: str, position: int) -> int:
    """Zeros in front of a section."""
    return -position % (_LARGEST_PAGE if name in _MAPPED else _PAGE)


# ----------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file at ``path``; whatever the system says about it becomes a SnapshotError."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise SnapshotError("unreadable", f"snapshot {path} is no regular file")
        with Path(path).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise SnapshotError("missing", f"there is no snapshot at {path}") from error
    except OSError as error:
        raise SnapshotError("unreadable", f"cannot read snapshot {path}: {error.strerror or error}") from error


def _read_header(file: BinaryIO) -> tuple[SnapshotInfo, list[_Section], int]:
    """Info, sections and the rows of a checksum, after the header's own checksum held and the sections were found to
    fill the file exactly."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise SnapshotError("torn", f"snapshot {file.name} ends after {len(prefix)} bytes")
    magic, version, length, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise SnapshotError("garbage", f"{file.name} is not a snapshot")
    if length > min(_MAX_HEADER, size - _PREFIX.size):
        raise SnapshotError("torn", f"snapshot {file.name} is {size} bytes long, its header alone claims {length}")
    header = file.read(length)
    if _header_crc(version, header) != crc:
        raise SnapshotError("damaged", f"the header of snapshot {file.name} fails its checksum")
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise SnapshotError("version", f"snapshot {file.name} has format {version}, this package reads {known}")
    info, sections, checked_rows = _parse(file.name, header)
    expected = _sections_end(_PREFIX.size + length, [(section.name, section.nbytes) for section in sections])
    if expected != size:
        raise SnapshotError("torn", f"snapshot {file.name} is {size} bytes long, {expected} were written")
    return info, sections, checked_rows


def _parse(name: str, header: bytes) -> tuple[SnapshotInfo, list[_Section], int]:
    try:
        document = json.loads(header)
        sections = [_section(entry) for entry in document["sections"]]
        return _info(document["info"]), sections, _natural(document.get("checked_rows", _ROWS_OF_VERSION_3))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotError("damaged", f"the header of snapshot {name} makes no sense: {error}") from error


def _info(entry: JsonObject) -> SnapshotInfo:
    plan = dict(entry["plan"])
    plan["notes"] = tuple(_typed(note, str) for note in plan.get("notes", ()))
    whole: dict[str, Any] = {
        name: _natural(entry[name]) for name in ("generation", "watermark", "count", "dim", "seed")
    }
    info = SnapshotInfo(
        store_id=_typed(entry["store_id"], str),
        plan=IndexPlan(**plan),
        metric=_typed(entry["metric"], str),
        created_at=float(entry["created_at"]),
        extra=_typed(entry["extra"], dict),
        **whole,
    )
    for number in (info.plan.nlist, info.plan.codes, info.plan.bytes):
        _natural(number)
    if info.plan.kind not in KINDS or info.plan.precision not in _PRECISIONS or info.metric not in _METRICS:
        raise ValueError(
            f"kind {info.plan.kind!r}, precision {info.plan.precision!r} or metric {info.metric!r} is unknown"
        )
    return info


def _section(entry: JsonObject) -> _Section:
    if entry["dtype"] not in _DTYPES or not 1 <= len(entry["shape"]) <= 2:
        raise ValueError(f"section of dtype {entry['dtype']!r} and shape {entry['shape']!r}")
    shape = tuple(_natural(length) for length in entry["shape"])
    return _Section(_typed(entry["name"], str), entry["dtype"], shape, _natural(entry["crc32"]))


def _typed(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a natural number")
    return value


def _sections_end(position: int, sizes: Iterable[tuple[str, int]]) -> int:
    for name, nbytes in sizes:
        position += _gap(name, position) + nbytes
    return position


def _positions(dead: npt.NDArray[Any], n: int, path: str | os.PathLike[str]) -> IntArray:
    """``dead``, if it is a set of positions below ``n``."""
    if dead.dtype != np.int64 or dead.ndim != 1 or (len(dead) and (dead[0] < 0 or dead[-1] >= n)):
        raise SnapshotError("damaged", f"snapshot {path} names dead rows that it does not hold")
    if (np.diff(dead) <= 0).any():
        raise SnapshotError("damaged", f"snapshot {path} names dead rows twice or out of order")
    return dead


def _read_sections(file: BinaryIO, sections: list[_Section]) -> Arrays:
    """Check each array but the vectors against its checksum, and that the gaps between them are zeros."""
    parts: Arrays = {}
    for section in sections:
        gap = file.read(_gap(section.name, file.tell()))
        array = _mapped_section(file, section) if section.name in _MAPPED else None
        if array is None:
            array = growable(section.shape, np.dtype(section.dtype).type)
            raw = _raw(array)
            if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
                raise SnapshotError("torn", f"snapshot {file.name} ends inside section {section.name!r}")
        else:
            file.seek(section.nbytes, os.SEEK_CUR)
        if any(gap) or (section.name != VECTORS and zlib.crc32(_raw(array)) != section.crc32):
            raise SnapshotError("damaged", f"section {section.name!r} of snapshot {file.name} fails its checksum")
        parts[section.name] = array
    own = next((section.crc32 for section in sections if section.name == VECTORS), None)
    if _CHECKSUMS not in parts or zlib.crc32(_raw(parts[_CHECKSUMS])) != own:
        raise SnapshotError("damaged", f"snapshot {file.name} holds no checksums of its vectors")
    return parts


def _mapped_section(file: BinaryIO, section: _Section) -> npt.NDArray[np.generic] | None:
    """The array mapped in place; None where the system cannot, and it has to be read."""
    try:
        return mapped(file.fileno(), file.tell(), section.shape, np.dtype(section.dtype).type, Path(file.name).parent)
    except OSError:
        return None
