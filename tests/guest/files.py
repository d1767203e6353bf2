"""The guest's files, as an archive that the kernel unpacks: this Python, what a check imports, and busybox."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE, SOURCE = "/palestra/site", "/palestra/src"
_LISTED_S = 60
_UNNEEDED = {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "pydoc_data"}
_TOOLS = """
sh cat ls wc sleep head tail grep kill mkdir mount ip rm cp mv ln seq yes dd id ps env true false echo stat find touch
chmod sort tr cut sed awk uname hostname poweroff test expr timeout setsid nc printf tee sync
"""
_IMPORTED = """
import sys
import palestra.launch.sandbox_check, palestra.launch.cli, palestra.sandbox.host
from palestra.sandbox.cases import conformance, files, kernel, machine, network, resources, service
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None): print(module.__file__)
"""


class Archive:
    """Of the kind `newc`, that the kernel reads. Directories on the way are made."""

    def __init__(self, path: Path):
        self._file, self._seen = path.open("wb"), set[str]()

    def add(self, source: Path, target: str) -> None:
        """With what a link leads to."""
        about = source.stat()
        self._directories(target)
        mode = stat.S_IFREG | (0o755 if about.st_mode & 0o100 else 0o644)
        self._entry(target, mode, source.read_bytes(), int(about.st_mtime))

    def text(self, target: str, text: str, mode: int = 0o644) -> None:
        self._directories(target)
        self._entry(target, stat.S_IFREG | mode, text.encode())

    def link(self, target: str, leads_to: str) -> None:
        self._directories(target)
        self._entry(target, stat.S_IFLNK | 0o777, leads_to.encode())

    def directory(self, target: str) -> None:
        self._directories(target + "/")

    def close(self) -> None:
        self._entry("TRAILER!!!", 0, b"")
        self._file.close()

    def _directories(self, target: str) -> None:
        for place in reversed(Path(target + "x").parents):
            if str(place) != "/":
                self._entry(str(place), stat.S_IFDIR | 0o755, b"")

    def _entry(self, target: str, mode: int, content: bytes, changed: int = 0) -> None:
        """The first of a name stays. Fields: inode, mode, user, group, links, time, size, devices, name's length."""
        if target in self._seen:
            return
        self._seen.add(target)
        name = target.lstrip("/").encode() + b"\0"
        fields = (len(self._seen), mode, 0, 0, 1, changed, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._file.write(head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4))


def fill(archive: Archive, busybox: Path, init: str) -> None:
    """Errors: RuntimeError, where what a check imports cannot be imported here."""
    for place in ("bin", "sbin", "lib", "lib64"):
        archive.link(f"/{place}", f"usr/{place}")
    for place in (
        "/proc",
        "/sys",
        "/dev",
        "/tmp",
        "/run",
        "/root",
        "/etc",
        "/home",
        "/usr/sbin",
        "/usr/lib64",
        "/whole",
    ):
        archive.directory(place)
    archive.add(busybox, "/usr/bin/busybox")
    for tool in _TOOLS.split():
        archive.link(f"/usr/bin/{tool}", "busybox")
    archive.text("/init", init, 0o755)
    archive.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    archive.text("/etc/group", "root:x:0:\n")
    archive.text("/etc/hosts", "127.0.0.1 localhost\n")
    added = [*_python(archive), *_packages(archive)]
    for path in _tree(ROOT / "src/palestra"):
        archive.add(path, f"{SOURCE}/palestra/{path.relative_to(ROOT / 'src/palestra')}")
    for library in _libraries(added):
        archive.add(library, _merged(library))


def python() -> str:
    """The interpreter's place, here and there."""
    return os.path.realpath(sys.executable)


def _python(archive: Archive) -> Iterator[Path]:
    base = Path(sys.base_prefix).resolve()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    archive.add(Path(python()), python())
    archive.link(f"{base}/bin/python3", os.path.basename(python()))
    yield Path(python())
    library = base / "lib" / name
    for path in _tree(library):
        if not path.relative_to(library).parts[0].startswith("config-"):
            archive.add(path, str(path))
            yield path


def _packages(archive: Archive) -> Iterator[Path]:
    """Those that a check imports, whole."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED],
        capture_output=True,
        text=True,
        timeout=_LISTED_S,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    if done.returncode:
        raise RuntimeError(f"what a check imports cannot be imported here: {done.stderr.strip()[-500:]}")
    tops = set[Path]()
    for line in done.stdout.splitlines():
        before, found, inside = line.rpartition("/site-packages/")
        if found:
            tops.add(Path(before + found) / inside.split("/")[0])
    for top in sorted(tops):
        for path in _tree(top) if top.is_dir() else [top]:
            archive.add(path, f"{SITE}/{path.relative_to(top.parent)}")
            yield path


def _tree(top: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(top):
        names[:] = sorted(set(names) - _UNNEEDED)
        for name in sorted(files):
            path = Path(directory, name)
            if path.is_file() and path.suffix != ".a" and ".opt-" not in name:
                yield path


def _libraries(files: list[Path]) -> set[Path]:
    """Shared libraries that these load, with the loader itself."""
    binaries = [str(path) for path in files if ".so" in path.name or str(path) == python()]
    found = set[Path]()
    told = subprocess.run(["ldd", *binaries], capture_output=True, text=True, timeout=_LISTED_S).stdout
    for line in told.splitlines():
        words = [word for word in line.split() if word.startswith("/") and not word.endswith(":")]
        found |= {Path(word) for word in words if os.path.exists(word)}
    return found


def _merged(library: Path) -> str:
    """/lib is a link to /usr/lib in there."""
    return f"/usr{library}" if library.parts[1] in ("lib", "lib64") else str(library)
