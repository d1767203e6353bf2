"""An emulator and a kernel from Debian's archive, unpacked into the cache; nothing is installed."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palestra" / "guest"
_LOOK_S, _DOWNLOAD_S, _UNPACK_S = 60, 120, 60
_EMULATOR, _KERNEL, _TOOLS = "qemu-system-x86", "linux-image-cloud-amd64", "busybox-static"


class Unavailable(Exception):
    """What a guest is made of cannot be had here, and why."""


@dataclass(frozen=True)
class Pieces:
    """`top` is a tree like that of a machine on which the packages are installed."""

    top: Path

    @property
    def kernel(self) -> Path:
        return next((self.top / "boot").glob("vmlinuz-*"))

    @property
    def busybox(self) -> Path:
        return self.top / "bin/busybox"

    @property
    def emulator(self) -> list[str]:
        firmware = [self.top / "usr/share" / name for name in ("qemu", "seabios")]
        return [str(self.top / "usr/bin/qemu-system-x86_64"), *(part for f in firmware for part in ("-L", str(f)))]

    @property
    def environment(self) -> dict[str, str]:
        libraries = ":".join(str(self.top / place) for place in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
        return {**os.environ, "LD_LIBRARY_PATH": libraries}


def pieces() -> Pieces:
    """Downloaded the first time, 45 MB. Errors: Unavailable."""
    top = CACHE / "pieces"
    if not top.exists():
        missing = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
        if missing or os.uname().machine != "x86_64":
            raise Unavailable(f"needs an x86-64 machine with Debian's {missing or ['apt-get', 'dpkg']}")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as working:
            unpacked = _unpacked(Path(working))
            try:
                unpacked.rename(top)
            except OSError:
                if not top.exists():  # else somebody else was faster
                    raise
    return Pieces(top)


def _unpacked(working: Path) -> Path:
    """Checked by apt against the archive's signatures, as for an installation."""
    packages = working / "packages"
    packages.mkdir()
    _done(["apt-get", "download", *_names()], _DOWNLOAD_S, cwd=packages)
    for package in sorted(packages.glob("*.deb")):
        _done(["dpkg", "-x", str(package), str(working / "top")], _UNPACK_S)
    return working / "top"


def _names() -> list[str]:
    """With what the emulator needs and this machine lacks. The kernel's package only names the newest kernel's."""
    depends = _done(["apt-cache", "depends", _KERNEL], _LOOK_S)
    kernels = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line]
    simulated = _done(["apt-get", "install", "--simulate", "--no-install-recommends", _EMULATOR], _LOOK_S)
    emulator = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst ")]
    if not kernels:
        raise Unavailable(f"apt knows no {_KERNEL}; this needs Debian's archive and `apt-get update`")
    return [*dict.fromkeys([_TOOLS, kernels[0], _EMULATOR, *emulator])]


def _done(command: list[str], limit_s: float, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=cwd)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command[:2])} did not end within {limit_s} s") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:2])} failed: {done.stderr.strip()[-300:]}; is `apt-get update` needed?")
    return done.stdout
