"""Which file system a path lies on, as the system's table of mounts tells it."""

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")

# By the type in the table. Not among them, because they are how containers and virtual machines see a disk of their
# own host: overlay, 9p, virtiofs, and plain fuse.
# fmt: off
NETWORK_FILE_SYSTEMS = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "lustre", "gpfs", "beegfs", "ceph", "glusterfs",
    "pvfs2", "orangefs", "panfs", "wekafs", "gfs2", "ocfs2", "acfs", "davfs",
))
# A file system in user space has the type fuse.NAME.
_USER_SPACE = frozenset((
    "sshfs", "ceph", "ceph-fuse", "glusterfs", "beegfs", "s3fs", "goofys", "gcsfuse", "rclone", "juicefs", "mfs",
    "seaweedfs", "quobyte", "davfs2", "curlftpfs", "blobfuse", "blobfuse2", "mount-s3", "cvmfs2",
))
# fmt: on


def file_system(path: Path, mounts: str) -> tuple[Path, str] | None:
    """The mount point that an absolute path without symbolic links lies below, and its type; None if unknown.

    Args:
        mounts: text in the form of /proc/mounts: device, mount point, type, ... on each line, spaces as \\040.
    """
    found: tuple[Path, str] | None = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point, kind = Path(_unescaped(fields[1])), fields[2]
        # Of mounts on one point the last hides the others.
        if path.is_relative_to(point) and (found is None or len(point.parts) >= len(found[0].parts)):
            found = point, kind
    return found


def network_file_system(path: Path, mounts: str) -> tuple[Path, str] | None:
    """The mount point and type of the network file system that the path lies on; None if it lies on a local one."""
    found = file_system(path, mounts)
    if found is None:
        return None
    kind = found[1]
    in_user_space = kind.startswith("fuse.") and kind.removeprefix("fuse.") in _USER_SPACE
    return found if kind in NETWORK_FILE_SYSTEMS or in_user_space else None


def current_mounts() -> str:
    """The table of this process; empty where the system has none."""
    try:
        return MOUNTS.read_text(errors="replace")
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
