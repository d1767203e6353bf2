"""What a sandbox sees of files: the system's programs and Python's standard library, or an image; nothing else."""

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from palestra.core.errors import UserError

SITE = "/opt/site-packages"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl/certs", "localtime", "mime.types", "services")
_PATH = ("/usr/local/bin", "/usr/bin", "/bin")


@dataclass(frozen=True)
class Root:
    """`binds` are shown read-only, (source, target). `hidden` are directories that are empty in there."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...] = ()
    hidden: tuple[str, ...] = ()
    etc: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()  # of Python


def system_root(packages: tuple[str, ...] = ()) -> Root:
    """Of this machine: /usr, and the Python that runs this without what is installed into it, save `packages`.

    Errors: UserError, for a package that is not installed here.
    """
    base = os.path.realpath(sys.base_prefix)
    binds, links, hidden = [], [], []
    for place in _SYSTEM:
        if os.path.islink(place):
            links.append((place, os.readlink(place)))
        elif os.path.isdir(place):
            binds.append((place, place))
    if not _is_inside(base, "/usr"):
        binds.append((base, base))
    binds += [(f"/etc/{name}", f"/etc/{name}") for name in _ETC if os.path.exists(f"/etc/{name}")]
    for top in {"/usr", "/usr/local", base}:
        hidden += [str(place) for place in sorted(Path(top).glob("lib/python3*/*-packages"))]
    binds += [(str(place), f"{SITE}/{place.name}") for package in packages for place in _parts(package)]
    search = dict.fromkeys([f"{base}/bin", *_PATH])
    return Root(
        binds=tuple(binds),
        links=tuple(links),
        hidden=tuple(hidden),
        environment={**_environment(":".join(search)), **({"PYTHONPATH": SITE} if packages else {})},
        path=(*_library(base), *((SITE,) if packages else ())),
    )


def image_root(directory: Path) -> Root:
    """Of an image that was made into a directory. Python of ours comes along only where it has none of its own."""
    binds, links = [], []
    for place in sorted(directory.iterdir()):
        if place.name in ("proc", "dev", "tmp", "sys", "run", "box"):
            continue
        if place.is_symlink():
            links.append((f"/{place.name}", os.readlink(place)))
        elif place.name not in ("etc", "home", "var", "root"):
            binds.append((str(place), f"/{place.name}"))
    etc = directory / "etc"
    if etc.is_dir():
        own = {"passwd", "group", "hosts", "nsswitch.conf", "resolv.conf", "mtab"}
        binds += [(str(p), f"/etc/{p.name}") for p in sorted(etc.iterdir()) if p.name not in own and p.exists()]
    site = directory / SITE.lstrip("/")
    return Root(
        binds=tuple(binds),
        links=tuple(links),
        environment={**_environment(":".join(_PATH)), **({"PYTHONPATH": SITE} if site.is_dir() else {})},
    )


def with_site(root: Root, directory: Path) -> Root:
    """With what pip installed into `directory`, as an image's packages."""
    return Root(
        binds=(*(b for b in root.binds if not b[1].startswith(SITE)), (str(directory), SITE)),
        links=root.links,
        hidden=root.hidden,
        etc=root.etc,
        environment={**root.environment, "PYTHONPATH": SITE},
        path=(*(p for p in root.path if p != SITE), SITE),
    )


def _environment(path: str) -> dict[str, str]:
    return {"PATH": path, "HOME": "/home/user", "USER": "user", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


def _library(base: str) -> tuple[str, ...]:
    """The standard library's places, as an interpreter without site-packages has them."""
    return tuple(place for place in sys.path if _is_inside(place, base) and "-packages" not in place)


def _is_inside(place: str, top: str) -> bool:
    return os.path.commonpath([os.path.realpath(place) or "/", os.path.realpath(top)]) == os.path.realpath(top)


def _parts(package: str) -> list[Path]:
    """The top-level directories and modules of an installed distribution, and the libraries that came with it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"package {package!r} is not installed here; install it, or name an image that has it"
        ) from None
    tops = {Path(str(file.locate())).resolve() for file in files if ".." not in file.parts}
    site = {Path(str(importlib.metadata.distribution(package).locate_file("")))}.pop().resolve()
    names = {place.relative_to(site).parts[0] for place in tops if _is_inside(str(place), str(site))}
    return [site / name for name in sorted(names) if not name.endswith(".dist-info") and name != "__pycache__"]
