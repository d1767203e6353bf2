"""Images of packages: what pip installs for the interpreter that programs get, and Debian's with all they need.

Nothing of a package runs here. pip takes wheels alone, and may start no process, which a source package would need;
of Debian's packages only the files are taken. Their maintainer scripts, which make caches, users and alternatives, do
not run: `cc`, `c++`, `awk` and `sh` are made here, other alternatives (`java`, `editor`) have only their own names
(/usr/lib/jvm/*/bin/java), and what a script would generate, such as /etc/ssl/certs, is not there.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from palestra.core.errors import UserError
from palestra.sandbox.backends.root import make_places
from palestra.sandbox.images.cache import Cache, Image, hashed
from palestra.sandbox.images.unpack import Tree

_PIP_S, _APT_S, _DPKG_S = 1800.0, 1800.0, 600.0
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(\[[A-Za-z0-9._,-]+\])?"
    r"((===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]+(,(===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]+)*)?"
)
_DEBIAN = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+](:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]+)?")

# --- pip

_NO_PROCESSES = """
import runpy, sys
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "os.system"):
        raise PermissionError(1, "a package that must be built here; only wheels are installed", str(arguments[:1]))
sys.addaudithook(refuse)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def pip_image(cache: Cache, words: list[str], python: str | None) -> Image:
    """`root` of it is a site-packages directory. `python`: an image's, as `3.12`; None for the one that runs this.

    What is installed for the same words once is taken again while it is there: versions that are not named stay.
    Errors: UserError, for words that are no requirements, and what pip says.
    """
    for word in words:
        if not _REQUIREMENT.fullmatch(word):
            raise UserError(
                f"image 'pip:{' '.join(words)}': {word!r} names no package; write pip:requests or pip:numpy==2.1"
                " (no addresses, no paths, no options)"
            )
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for_whom = ["pip", python or own, platform.machine(), platform.libc_ver()[0] or "musl"]
    request = "\0".join([*for_whom, *sorted(words)])
    known = cache.asked(request)
    if known is not None:
        return known
    with cache.building() as work:
        top, report = work / "root", work / "report.json"
        top.mkdir(mode=0o755)
        _pip_install(words, top, report, python if python != own else None)
        name = "pip-" + hashed(*for_whom, *_installed(report))
        cache.keep(work, name, {})
    cache.remember(request, name)
    return cache.built(name, lambda place: _gone(name))


def _gone(name: str) -> NoReturn:
    raise UserError(f"image {name} was removed while it was made; ask for it again")


def _pip_install(words: list[str], top: Path, report: Path, python: str | None) -> None:
    command = [sys.executable, "-c", _NO_PROCESSES, "install", "--quiet", "--no-input", "--no-warn-script-location"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--target", str(top), "--report", str(report)]
    if python is not None:
        machine = platform.machine()
        command += ["--no-compile", "--implementation", "cp", "--python-version", python]
        for kind in ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "linux"):
            command += ["--platform", f"{kind}_{machine}"]
    _run([*command, "--", *words], f"image 'pip:{' '.join(words)}'", _PIP_S, {})
    for script in (top / "bin").glob("*"):
        _point_at_any_python(script)


def _point_at_any_python(script: Path) -> None:
    """A script that pip wrote names the interpreter that ran pip, which programs do not see."""
    content = script.read_bytes()
    own = b"#!" + os.fsencode(sys.executable) + b"\n"
    if content.startswith(own):
        script.write_bytes(b"#!/usr/bin/env python3\n" + content.removeprefix(own))


def _installed(report: Path) -> list[str]:
    """Of each package its version, and the digest of what was downloaded."""
    told = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(
        f"{p['metadata']['name']}=={p['metadata']['version']} {p['download_info'].get('archive_info', {})}"
        for p in told
    )


# --- Debian

_BASE = ("base-files", "bash", "coreutils", "dash", "diffutils", "findutils", "grep", "gzip", "libc-bin", "sed", "tar")
_MERGED = ("bin", "sbin", "lib", "lib64")
_ALTERNATIVES = {
    "bin/sh": ("dash", "bash"),
    "bin/cc": ("gcc",),
    "bin/c++": ("g++",),
    "bin/awk": ("gawk", "mawk"),
}
_URI = re.compile(r"^'([^']+)' (\S+\.deb) \d+ ?(\S*)$", re.MULTILINE)


def debian_image(cache: Cache, words: list[str]) -> Image:
    """A root of these packages, of all that they depend on, and of a small base (a shell, coreutils).

    Resolved by this machine's apt and its sources; as with pip, once. Errors: UserError.
    """
    what = f"image 'debian:{' '.join(words)}'"
    for word in words:
        if not _DEBIAN.fullmatch(word):
            raise UserError(f"{what}: {word!r} names no package of Debian; write debian:gcc make")
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"{what} needs {program}, which only Debian and what comes from it have; use an OCI archive"
            )
    request = "\0".join(["debian", platform.machine(), Path("/etc/os-release").read_text(), *sorted(words)])
    known = cache.asked(request)
    if known is not None:
        return known
    with cache.building() as work:
        apt = _Apt(work / "apt", what)
        files = apt.resolved(words)
        name = "debian-" + hashed(*files)
        found = cache.find(name)
        if found is None:
            apt.download(words)
            _fill(work / "root", sorted(apt.archives.glob("*.deb")), what)
            shutil.rmtree(work / "apt")
            cache.keep(work, name, {})
    cache.remember(request, name)
    return cache.built(name, lambda place: _gone(name))


class _Apt:
    """apt with a state of its own, as if nothing was installed. `archives` is where it puts packages."""

    def __init__(self, place: Path, what: str):
        self._place, self._what = place, what
        self.archives = place / "archives"
        for name in ("archives/partial", "lists/partial"):
            (place / name).mkdir(parents=True)
        (place / "status").touch()
        self._lists: list[str] = []

    def resolved(self, words: list[str]) -> list[str]:
        """The files that are needed, each with what its list says of its content."""
        self._freshen()
        told = self._install("--print-uris", words)
        found = sorted(f"{file} {digest}" for _, file, digest in _URI.findall(told))
        if not found:
            raise UserError(f"{self._what}: apt names no packages: {told[-500:]}")
        return found

    def _freshen(self) -> None:
        """This machine's lists of packages, as they are; where it has none, fetched."""
        if any(Path("/var/lib/apt/lists").glob("*Packages*")):
            return
        self._lists = ["-o", f"Dir::State::lists={self._place}/lists"]
        self._get("update")

    def download(self, words: list[str]) -> None:
        self._install("--download-only", words)

    def _install(self, how: str, words: list[str]) -> str:
        return self._get("install", how, "--no-install-recommends", "--", *_BASE, *words)

    def _get(self, *words: str) -> str:
        place = self._place
        state = [f"Dir::State::status={place}/status", f"Dir::Cache={place}", f"Dir::Cache::archives={self.archives}"]
        state += ["APT::Sandbox::User=root", "Debug::NoLocking=1", "Dir::Log=/dev/null", "Acquire::Retries=2"]
        options = [word for option in state for word in ("-o", option)]
        command = ["apt-get", "--quiet", "--yes", *options, *self._lists, *words]
        return _run(command, self._what, _APT_S, {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"})


def _fill(top: Path, packages: list[Path], what: str) -> None:
    for name in _MERGED:
        (top / "usr" / name).mkdir(parents=True)
        (top / name).symlink_to(f"usr/{name}")
    tree = Tree(top, what, follows_links=True)
    for package in packages:
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                tree.add(process.stdout)
                if process.wait(timeout=_DPKG_S) != 0:
                    raise UserError(f"{what}: {package.name} is torn; remove it from apt's archives, and try again")
            finally:
                process.kill()
    for link, targets in _ALTERNATIVES.items():
        for target in targets:
            place = top / "usr" / link
            if not os.path.lexists(place) and os.path.lexists(place.parent / target):
                place.symlink_to(target)
    make_places(top)


# --- both


def _run(command: list[str], what: str, timeout_s: float, environment: dict[str, str]) -> str:
    """Its output. Errors: UserError, with the last that it said."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except OSError as error:
        raise UserError(f"{what}: {command[0]} does not start: {error}") from error
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: {command[0]} took longer than {timeout_s:g} s; are its servers reached?") from None
    if done.returncode != 0:
        said = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
        raise UserError(f"{what} cannot be made: {' / '.join(said[-4:])[-1500:]}")
    return done.stdout
