"""Become an ordinary user, and then another program: `python ordinary.py PROGRAM ARGUMENT...`, as root.

What the user could not reach, such as an interpreter in root's home directory, is shown at its place in a mount
namespace that ends with the program; nothing of the machine is changed.
"""

import ctypes
import os
import stat
import sys
from pathlib import Path

USER = 54_321
_NEWNS, _BIND, _REC, _PRIVATE, _RDONLY, _REMOUNT = 0x20000, 4096, 16384, 1 << 18, 1, 32
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    if _libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode() or None):
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def closed_above(place: Path) -> Path | None:
    """The first directory on the way that others may not pass."""
    for directory in reversed(place.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None


def show(places: list[Path]) -> None:
    """Each at its own place. Directories on the way that are closed become empty ones with only these in them."""
    closed: dict[Path, list[Path]] = {}
    for place in places:
        directory = closed_above(place)
        if directory is not None:
            closed.setdefault(directory, []).append(place)
    for directory, below in closed.items():
        kept = [os.open(place, os.O_PATH) for place in below]
        mount("tmpfs", str(directory), "tmpfs", 0, "mode=0755")
        for place, fd in zip(below, kept, strict=True):
            place.mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", str(place), None, _BIND | _REC)
            os.close(fd)


def main(argv: list[str]) -> None:
    if _libc.unshare(_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", None, _REC | _PRIVATE)
    root = Path(__file__).resolve().parents[3]
    show(list(dict.fromkeys([Path(os.path.realpath(sys.base_prefix)), Path(sys.prefix).resolve(), root])))
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    os.environ["HOME"] = "/tmp"
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
