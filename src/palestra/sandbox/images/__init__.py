"""What programs find in a sandbox beyond the system's own: images, each a directory that all sandboxes share.

| text | what |
|---|---|
| `/srv/roots/alpine` | a directory: a whole file system, shown as it is |
| `python-3.12.tar`, `layout/` | an OCI image, as an archive or a layout directory, or what `docker save` wrote |
| `debian:gcc make` | packages of Debian with all they depend on, as a whole file system |
| `pip:numpy==2.1 requests` | wheels, in /opt/site-packages, over the system's own files |

`+` adds wheels to a whole file system that has a python3: `debian:python3+pip:numpy`.
"""

import asyncio
import re
from pathlib import Path

from palestra.core.deadline import within
from palestra.core.errors import UserError
from palestra.sandbox.backends.root import Root, image_root, make_places, system_root, with_site
from palestra.sandbox.images import archives
from palestra.sandbox.images.cache import Cache, Image, hashed
from palestra.sandbox.images.packages import debian_image, pip_image
from palestra.sandbox.images.unpack import resolved
from palestra.sandbox.zygote import ETC

BUILD_S = 3600.0
_PLUS = re.compile(r"\+(?=(?:pip|debian):)")
_FORMS = (
    "a directory that is a root file system, an OCI archive or layout (image.tar), pip:NAME==VERSION, debian:NAME,"
    " or one of the others with +pip:NAME"
)
_PYTHON = re.compile(r"python(3\.\d+)")


async def root_of(image: str | None, packages: tuple[str, ...] = ()) -> Root:
    """Built, if it is not there yet, and in use until this process ends. `packages`: of `system_root`.

    Errors: UserError, for a text that names no image, or one that cannot be made; DeadlineError.
    """
    if image is None:
        return system_root(packages)
    if packages:
        raise UserError(
            f"packages={list(packages)} are those of this machine's interpreter, and image={image!r} is given too;"
            f" name them there: {image}+pip:{packages[0]}"
        )
    return await within(BUILD_S, asyncio.to_thread(_root_of, image), waiting_for=f"image {image!r}")


def prune(max_bytes: int) -> list[str]:
    """Remove images until at most `max_bytes` are left, least recently used first, none that is in use; their names."""
    return Cache().prune(max_bytes)


def _root_of(image: str) -> Root:
    cache, whole, wheels = Cache(), list[Image](), list[str]()
    for part in _PLUS.split(image):
        kind, colon, rest = part.partition(":")
        if kind in ("pip", "debian") and colon and not rest.split():
            raise UserError(f"image {image!r} names no packages after {kind}:")
        if kind == "pip" and colon:
            wheels += rest.split()
        elif kind == "debian" and colon:
            whole.append(debian_image(cache, rest.split()))
        else:
            whole.append(_at(cache, image, Path(part).expanduser()))
    if len(whole) > 1:
        raise UserError(f"image {image!r} has {len(whole)} whole file systems; name one, and wheels beside it")
    if not whole:
        return with_site(system_root(), pip_image(cache, wheels, None).directory)
    etc = cache.built("etc-" + hashed(*ETC.values()), _write_etc)
    top = whole[0].directory
    site = pip_image(cache, wheels, _python_of(top, image)).directory if wheels else None
    return image_root(top, etc=etc.directory, environment=whole[0].environment, site=site)


def _at(cache: Cache, image: str, place: Path) -> Image:
    """A directory is used where it lies."""
    if place.is_dir() and not archives.is_layout(place):
        return Image(place.resolve())
    if not place.exists():
        raise UserError(f"image {image!r}: there is no {place}; an image is {_FORMS}")
    if not place.is_dir() and place.suffix != ".tar":
        raise UserError(f"image {image!r}: {place} is none; an image is {_FORMS}")
    try:
        name = "archive-" + archives.fingerprint(place)[:32]
    except OSError as error:
        raise UserError(f"image {image!r} cannot be read: {error}") from error
    return cache.built(name, lambda top: _unpacked(place, top))


def _unpacked(place: Path, top: Path) -> dict[str, str]:
    environment = archives.unpack(place, top)
    make_places(top)
    return environment


def _write_etc(top: Path) -> dict[str, str]:
    for name, text in ETC.items():
        (top / name).write_text(text, encoding="utf-8")
    return {}


def _python_of(top: Path, image: str) -> str:
    """The version of its python3. Errors: UserError, if it has none."""
    for directory in ("usr/local/bin", "usr/bin", "bin"):
        place = resolved(top, (*directory.split("/"), "python3"), image)
        found = _PYTHON.match(Path(place).name)
        if found and Path(place).is_file():
            return found[1]
    raise UserError(f"image {image!r}: wheels need a python3 in it, and it has none; debian:python3 has one")
