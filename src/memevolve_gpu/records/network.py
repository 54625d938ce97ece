"""Refuses file systems whose locks cannot be trusted."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import NetworkFilesystemError

__all__ = ["NETWORK_FILESYSTEMS", "filesystem_of", "refuse_network_filesystem"]

NETWORK_FILESYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2"),
        *("orangefs", "glusterfs", "9p", "coda", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.davfs"),
        *("fuse.davfs2", "fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.juicefs", "fuse.mfs"),
        *("fuse.smbnetfs", "fuse.curlftpfs", "fuse.blobfuse", "fuse.blobfuse2", "fuse.mount-s3", "fuse.cephfs"),
    }
)
"""Names as the kernel shows them in ``mountinfo``. SQLite's write-ahead log needs shared memory and POSIX locks that
all users of a file see; over a network neither can be relied on."""

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def refuse_network_filesystem(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise NetworkFilesystemError when ``folder`` lies on one of ``NETWORK_FILESYSTEMS``."""
    name = filesystem_of(folder, mounts)
    if name in NETWORK_FILESYSTEMS:
        raise NetworkFilesystemError(
            f"{folder} lies on a network file system ({name}), where file locks and shared memory cannot be trusted; "
            "choose a prefix on a local disk and copy backups to the network"
        )


def filesystem_of(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that holds ``folder``; None where the system does not tell.

    A ``9p`` mount counts as local when the root is 9p too: then the whole machine is a sandbox whose kernel mediates
    every file (gVisor), not a share of another machine (WSL, QEMU).
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    types = dict(filter(None, map(_mount, lines)))
    place = next((str(p) for p in (folder, *folder.parents) if str(p) in types), None)
    name = types.get(place) if place is not None else None
    return "9p sandbox" if name == "9p" and types.get("/") == "9p" else name


def _mount(line: str) -> tuple[str, str] | None:
    """(mount point, type) of a line such as ``36 35 98:0 /mnt1 /mnt2 rw shared:1 - ext3 /dev/root rw``."""
    before, dash, after = line.partition(" - ")
    fields = before.split(" ")
    if not dash or len(fields) < 5:
        return None
    point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
    return os.path.normpath(point), after.split(" ", 1)[0]
