"""What a sandbox sees of files: the system's programs and Python's standard library, or an image; nothing else."""

import importlib.metadata
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from palestra.core.errors import UserError
from palestra.sandbox.zygote import ETC

SITE = "/opt/site-packages"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl/certs", "localtime", "mime.types", "services")
_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
_IMAGE_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_UNSHOWN = ("proc", "dev", "tmp", "sys", "run", "box", "etc", "home", "var")  # ours, or shown in parts
_KEPT_FREE = {"home": ("user",), "var": ("tmp",), "opt": ("site-packages",)}
_OURS_TO_SET = ("HOME", "USER", "TMPDIR")
_MOST_SHOWN = 64


@dataclass(frozen=True)
class Root:
    """`binds` are shown read-only, (source, target). `hidden` are directories that are empty in there.

    `has_own_python`: programs are run by the python3 that it shows, if any; no interpreter of this machine waits in it.
    """

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...] = ()
    hidden: tuple[str, ...] = ()
    etc: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()  # of Python
    has_own_python: bool = False


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


def image_root(directory: Path, *, etc: Path, environment: dict[str, str], site: Path | None = None) -> Root:
    """Of a whole file system. `etc` has files of ours, such as passwd, that stand for those of its own; `site` is what
    pip installed for it. Links stay links: none of the image's is followed here.

    Errors: UserError.
    """
    binds, links = list[tuple[str, str]](), list[tuple[str, str]]()
    _show(directory, "/", _UNSHOWN, binds, links)
    for name in ("home", "var", *(["opt"] if site else [])):
        if _is_directory(directory / name):
            _show(directory / name, f"/{name}/", _KEPT_FREE.get(name, ()), binds, links)
    if _is_directory(directory / "etc"):
        binds.append((str(directory / "etc"), "/etc"))
        files = [f for f in sorted(etc.iterdir()) if os.path.isfile(directory / "etc" / f.name)]
        binds += [(str(f), f"/etc/{f.name}") for f in files if not os.path.islink(directory / "etc" / f.name)]
    if site:
        binds = [bind for bind in binds if bind[1] != "/opt"] + [(str(site), SITE)]
    is_ours = _has_our_python(directory)
    set_by_it = {name: value for name, value in environment.items() if name not in _OURS_TO_SET}
    told = {**_environment(":".join(_IMAGE_PATH)), **set_by_it}
    return Root(
        binds=tuple(binds),
        links=tuple(links),
        environment=_with_site(told) if site else told,
        path=_library(os.path.realpath(sys.base_prefix)) if is_ours else (),
        has_own_python=not is_ours,
    )


def make_places(directory: Path) -> None:
    """For files of ours in the /etc of an image that is built here, where it has none of those names."""
    etc = directory / "etc"
    if not os.path.lexists(etc):
        etc.mkdir(mode=0o755)
    for name in ETC if _is_directory(etc) else ():
        if not os.path.lexists(etc / name):
            (etc / name).touch(mode=0o644)


def _show(
    directory: Path, inside: str, but: tuple[str, ...], binds: list[tuple[str, str]], links: list[tuple[str, str]]
) -> None:
    """What a directory has, but for these names."""
    places = [place for place in sorted(directory.iterdir()) if place.name not in but]
    if len(places) > _MOST_SHOWN:
        raise UserError(
            f"image {directory} has {len(places)} files in {inside}; at most {_MOST_SHOWN} can be shown there"
        )
    for place in places:
        if place.is_symlink():
            links.append((inside + place.name, os.readlink(place)))
        elif place.is_dir() or place.is_file():
            binds.append((str(place), inside + place.name))


def _is_directory(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink()


def _has_our_python(directory: Path) -> bool:
    """Whether the image shows the interpreter that runs this, and its library, at their places, to everybody."""
    for ours in (os.path.realpath(sys.executable), os.path.realpath(os.__file__)):
        there = directory / ours.lstrip("/")
        if not there.is_file() or not os.path.samefile(there, ours):
            return False
        between = [place for place in there.parents if place.is_relative_to(directory) and place != directory]
        if any(place.is_symlink() or place.stat().st_mode & 0o005 != 0o005 for place in between):
            return False
    return True


def with_site(root: Root, directory: Path) -> Root:
    """With what pip installed into `directory`, as an image's packages."""
    return replace(
        root,
        binds=(*(b for b in root.binds if not b[1].startswith(SITE)), (str(directory), SITE)),
        environment=_with_site(root.environment),
        path=(*(p for p in root.path if p != SITE), SITE),
    )


def _with_site(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "PYTHONPATH": SITE, "PATH": f"{environment['PATH']}:{SITE}/bin"}


def _environment(path: str) -> dict[str, str]:
    return {"PATH": path, "HOME": "/home/user", "USER": "user", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


def _library(base: str) -> tuple[str, ...]:
    """The standard library's places, as an interpreter without site-packages has them."""
    return tuple(place for place in sys.path if _is_inside(place, base) and "-packages" not in place)


def _is_inside(place: str, top: str) -> bool:
    return os.path.commonpath([os.path.realpath(place) or "/", os.path.realpath(top)]) == os.path.realpath(top)


def _parts(package: str) -> list[Path]:
    """The top-level directories and modules of an installed distribution, its metadata, and the libraries that came
    with it; of one that was installed editable, what is imported from its source."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"package {package!r} is not installed here; install it, or name an image that has it"
        ) from None
    tops = {Path(str(file.locate())).resolve() for file in files if ".." not in file.parts}
    site = {Path(str(importlib.metadata.distribution(package).locate_file("")))}.pop().resolve()
    names = {place.relative_to(site).parts[0] for place in tops if _is_inside(str(place), str(site))}
    shown = [site / name for name in sorted(names) if name != "__pycache__" and not name.endswith(".pth")]
    return [*shown, *_editable(package)]


def _editable(package: str) -> list[Path]:
    """Where the modules of one that was installed editable are imported from."""
    distribution = importlib.metadata.distribution(package)
    if not json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        return []
    found = []
    for name in (distribution.read_text("top_level.txt") or "").split():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += [Path(place) for place in spec.submodule_search_locations]
        elif spec is not None and spec.origin:
            found.append(Path(spec.origin))
    return found
