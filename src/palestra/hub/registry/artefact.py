"""What a wheel or an sdist says of itself, read without running any of it, and refused if it is not what it seems.

Errors of everything here: BadArtefactError, whose text says what is wrong and what the bound is.
"""

import gzip
import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from palestra.core.errors import UserError

_PIECE = 1 << 18
_BROKEN = (  # what the libraries raise at files that are not what they should be
    *(zipfile.BadZipFile, zipfile.LargeZipFile, tarfile.TarError, zlib.error, struct.error),
    *(EOFError, OSError, ValueError, RuntimeError, OverflowError),
)
_FILENAME = re.compile(r"[A-Za-z0-9._+!-]{1,255}\Z")
_MAX_METADATA_BYTES = 2 << 20
_MAX_HEADERS_BYTES = 1 << 20  # of one member of a tar file
_MAX_LIST_BYTES = 4 << 20  # of all members of a zip file
_MAX_NAME = 512
_MAX_DEPENDENCIES = 500
_SUSPECT_BYTES = 16 << 20  # below this no ratio is suspect


class BadArtefactError(UserError):
    """A file that is refused."""


@dataclass(frozen=True)
class Bounds:
    """Of what is in an artefact, unpacked."""

    max_unpacked_bytes: int = 1 << 30
    max_ratio: int = 100  # unpacked to packed
    max_members: int = 20_000


@dataclass(frozen=True)
class Artefact:
    """`project` and `version` are normalised; `core` is the core metadata, field by field, without the description."""

    filename: str
    kind: str  # wheel, sdist
    project: str
    version: str
    requires_python: str
    summary: str
    readme: str
    readme_type: str
    tags: tuple[str, ...]
    dependencies: tuple[tuple[str, str], ...]  # normalised name, requirement as written
    core: dict[str, Any] = field(default_factory=dict)
    metadata: bytes = b""


def read(file: Path, filename: str, bounds: Bounds) -> Artefact:
    """Look through the whole of `file`, which is called `filename`."""
    project, version, kind = parse_filename(filename)
    if kind == "wheel":
        content = _wheel_metadata(file, project, version, bounds)
    else:
        content = _sdist_metadata(file, filename, bounds)
    return _artefact(filename, kind, project, version, content)


def parse_filename(filename: str) -> tuple[str, str, str]:
    """Normalised project and version, and `wheel` or `sdist`."""
    if not _FILENAME.match(filename):
        raise BadArtefactError(f"{filename[:100]!r} is no name of an artefact: letters, digits and . _ + ! -")
    try:
        if filename.endswith(".whl"):
            name, version, _, _ = parse_wheel_filename(filename)
            return str(name), str(version), "wheel"
        if filename.endswith(".tar.gz"):
            name, version = parse_sdist_filename(filename)
            return str(name), str(version), "sdist"
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion) as error:
        raise BadArtefactError(f"{filename}: {error}") from None
    raise BadArtefactError(f"{filename} is neither a wheel (.whl) nor a source distribution (.tar.gz)")


# --- metadata


def _artefact(filename: str, kind: str, project: str, version: str, content: bytes) -> Artefact:
    if b"\0" in content:
        raise BadArtefactError(f"{filename}: there are zero bytes in its metadata")
    raw, _ = parse_email(content)
    name, said = raw.get("name", ""), raw.get("version", "")
    if str(canonicalize_name(name)) != project:
        raise BadArtefactError(f"{filename} says that it is {project}, and its metadata that it is {name[:100]!r}")
    try:
        same = str(Version(said)) == version
    except InvalidVersion:
        same = False
    if not same:
        raise BadArtefactError(f"{filename} is of version {version}, and its metadata of version {said[:100]!r}")
    if "+" in version:
        raise BadArtefactError(f"version {version} is local to a machine (+); an index takes public versions alone")
    return Artefact(
        filename=filename,
        kind=kind,
        project=project,
        version=version,
        requires_python=_requires_python(filename, raw.get("requires_python", "")),
        summary=raw.get("summary", "").strip()[:500],
        readme=raw.get("description", "").encode(errors="replace").decode(),
        readme_type=raw.get("description_content_type", "").split(";")[0].strip(),
        tags=_tags(raw),
        dependencies=_dependencies(filename, raw.get("requires_dist", [])),
        core={key: value for key, value in raw.items() if key != "description"},
        metadata=content,
    )


def _requires_python(filename: str, text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise BadArtefactError(f"{filename}: Requires-Python {text[:100]!r} is no range of versions") from None
    return text


def _dependencies(filename: str, lines: list[str]) -> tuple[tuple[str, str], ...]:
    if len(lines) > _MAX_DEPENDENCIES:
        raise BadArtefactError(f"{filename} has {len(lines)} dependencies; at most {_MAX_DEPENDENCIES} are taken")
    found = []
    for line in lines:
        try:
            found.append((str(canonicalize_name(Requirement(line).name)), line))
        except InvalidRequirement:
            raise BadArtefactError(f"{filename}: Requires-Dist {line[:100]!r} is no requirement") from None
    return tuple(found)


def _tags(raw: RawMetadata) -> tuple[str, ...]:
    """Keywords, as words of small letters."""
    words = ["-".join(word.lower().split())[:30] for word in raw.get("keywords", [])]
    return tuple(dict.fromkeys(word for word in words if word and word.replace("-", "").isalnum()))[:20]


# --- members


@dataclass
class _Seen:
    """What was met so far; raises as soon as a bound is passed."""

    packed: int
    bounds: Bounds
    num: int = 0
    unpacked: int = 0
    names: set[str] = field(default_factory=set)

    def member(self, name: str, *, is_directory: bool = False) -> None:
        self.num += 1
        if self.num > self.bounds.max_members:
            raise BadArtefactError(f"more than {self.bounds.max_members} members, which is the most that is taken")
        _check_name(name)
        key = name.rstrip("/")
        if not is_directory:
            if key in self.names:
                raise BadArtefactError(f"two members are called {name!r}")
            self.names.add(key)

    def content(self, num_bytes: int) -> None:
        self.unpacked += num_bytes
        if self.unpacked > self.bounds.max_unpacked_bytes:
            raise BadArtefactError(f"more than {self.bounds.max_unpacked_bytes} bytes when unpacked, which is the most")
        if self.unpacked > max(_SUSPECT_BYTES, self.packed * self.bounds.max_ratio):
            raise BadArtefactError(
                f"it unpacks to more than {self.bounds.max_ratio} times its size, as archives that attack do"
            )


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not name or len(name) > _MAX_NAME or "\0" in name or "\\" in name or not name.isprintable():
        raise BadArtefactError(f"a member is called {name[:100]!r}, which is no path within a package")
    if name.startswith("/") or ".." in parts or (len(name) > 1 and name[1] == ":"):
        raise BadArtefactError(f"member {name[:100]!r} leads out of the directory it is unpacked in")


class _ShortReads(io.FileIO):
    """A list of members that would fill the memory is not read."""

    def read(self, size: int | None = -1) -> bytes | None:
        if size is None or size < 0:  # of what is at the end
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _MAX_LIST_BYTES:
            raise BadArtefactError(f"its list of members is longer than {_MAX_LIST_BYTES} bytes")
        return super().read(size)


def _wheel_metadata(file: Path, project: str, version: str, bounds: Bounds) -> bytes:
    seen = _Seen(file.stat().st_size, bounds)
    try:
        with _ShortReads(file) as opened, zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
            _check_declared(members, seen.packed, bounds)
            if members and min(one.header_offset for one in members) > 0:
                raise BadArtefactError("there is something before the archive; it could be read as two different files")
            for member in members:
                seen.member(member.filename, is_directory=member.is_dir())
                _check_kind(member)
            directory = _dist_info(seen.names, project, version)
            found = b""
            for member in members:
                content = _read_member(archive, member, seen, keep=member.filename == f"{directory}/METADATA")
                found = found or content
    except _BROKEN as error:
        raise BadArtefactError(f"this is no whole zip archive: {error}") from None
    return found


def _check_declared(members: list[zipfile.ZipInfo], packed: int, bounds: Bounds) -> None:
    """Before anything is unpacked."""
    if len(members) > bounds.max_members:
        raise BadArtefactError(f"{len(members)} members; at most {bounds.max_members} are taken")
    _Seen(packed, bounds).content(sum(one.file_size for one in members))


def _check_kind(member: zipfile.ZipInfo) -> None:
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadArtefactError(f"member {member.filename!r} is a link or a device; files and directories are taken")
    if member.flag_bits & 0x1:
        raise BadArtefactError(f"member {member.filename!r} is encrypted")
    require_deflate(member)


def require_deflate(member: zipfile.ZipInfo) -> None:
    """Other ways of compressing are unpacked without a bound, whatever a reader asks for."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadArtefactError(f"member {member.filename!r} is compressed in a way that is not read here; use deflate")


def _dist_info(names: set[str], project: str, version: str) -> str:
    directories = {name.split("/")[0] for name in names if "/" in name and name.split("/")[0].endswith(".dist-info")}
    if len(directories) != 1:
        raise BadArtefactError(f"a wheel has one .dist-info directory; this has {len(directories)}")
    (directory,) = directories
    name, _, said = directory.removesuffix(".dist-info").partition("-")
    try:
        same = (str(canonicalize_name(name)), str(Version(said))) == (project, version)
    except InvalidVersion:
        same = False
    if not same:
        raise BadArtefactError(f"the wheel is {project} {version}, and its directory is {directory!r}")
    for required in ("METADATA", "WHEEL", "RECORD"):
        if f"{directory}/{required}" not in names:
            raise BadArtefactError(f"{directory}/{required} is missing: this is no wheel")
    return directory


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, seen: _Seen, *, keep: bool) -> bytes:
    """Unpacks it for its checksum and its true length; the content, if it is to be kept."""
    kept = b""
    with archive.open(member) as content:
        while piece := content.read(_PIECE):
            seen.content(len(piece))
            if keep:
                kept = _bounded(kept + piece, member.filename)
    return kept


def _bounded(content: bytes, name: str) -> bytes:
    if len(content) > _MAX_METADATA_BYTES:
        raise BadArtefactError(f"{name} is larger than {_MAX_METADATA_BYTES} bytes, which is the most that is taken")
    return content


class _Counted:
    """An unpacked stream that stops at the bounds, and at headers that would fill the memory."""

    def __init__(self, stream: gzip.GzipFile, seen: _Seen):
        self._stream, self._seen, self._allowed = stream, seen, _MAX_HEADERS_BYTES

    def allow(self, num_bytes: int) -> None:
        """So many bytes of content before the next headers."""
        self._allowed = self._seen.unpacked + num_bytes + _MAX_HEADERS_BYTES

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(min(size, _PIECE) if size >= 0 else _PIECE)
        self._seen.content(len(piece))
        if self._seen.unpacked > self._allowed:
            raise BadArtefactError(f"a header of more than {_MAX_HEADERS_BYTES} bytes; no package needs one")
        return piece


def _sdist_metadata(file: Path, filename: str, bounds: Bounds) -> bytes:
    root, seen, found = filename.removesuffix(".tar.gz"), _Seen(file.stat().st_size, bounds), b""
    try:
        with gzip.open(file) as stream:
            counted: Any = _Counted(stream, seen)
            with tarfile.open(fileobj=counted, mode="r|") as archive:
                for member in archive:
                    _check_tar_member(member, root, seen)
                    counted.allow(member.size)
                    if member.name == f"{root}/PKG-INFO" and (content := archive.extractfile(member)):
                        found = _bounded(content.read(_MAX_METADATA_BYTES + 1), member.name)
    except _BROKEN as error:
        raise BadArtefactError(f"this is no whole .tar.gz archive: {error}") from None
    if not found:
        raise BadArtefactError(f"{root}/PKG-INFO is missing: this is no source distribution")
    return found


def _check_tar_member(member: tarfile.TarInfo, root: str, seen: _Seen) -> None:
    seen.member(member.name, is_directory=member.isdir())
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise BadArtefactError(f"member {member.name!r} is a link or a device; files and directories are taken")
    if member.name.split("/")[0] != root:
        raise BadArtefactError(f"member {member.name!r} is outside {root}/, where all of an sdist lies")


# --- looking inside, after it was taken


@dataclass(frozen=True)
class Member:
    name: str
    size: int


def members(kind: str, content: BinaryIO) -> list[Member]:
    """Its files, by name."""
    if kind == "wheel":
        with zipfile.ZipFile(content) as archive:
            found = [Member(one.filename, one.file_size) for one in archive.infolist() if not one.is_dir()]
    else:
        with tarfile.open(fileobj=content, mode="r:gz") as archive:
            found = [Member(one.name, one.size) for one in archive if one.isfile()]
    return sorted(found, key=lambda one: one.name)


def member(kind: str, content: BinaryIO, name: str, most_bytes: int) -> bytes | None:
    """Its beginning; None, if there is none of this name."""
    opener: Callable[[BinaryIO, str, int], bytes | None] = _zip_member if kind == "wheel" else _tar_member
    return opener(content, name, most_bytes)


def _zip_member(content: BinaryIO, name: str, most_bytes: int) -> bytes | None:
    with zipfile.ZipFile(content) as archive:
        try:
            found = archive.open(name)
        except KeyError:
            return None
        with found:
            return found.read(most_bytes)


def _tar_member(content: BinaryIO, name: str, most_bytes: int) -> bytes | None:
    with tarfile.open(fileobj=content, mode="r|gz") as archive:
        for one in _files(archive):
            if one.name == name and (found := archive.extractfile(one)):
                return found.read(most_bytes)
    return None


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    return (one for one in archive if one.isfile())
