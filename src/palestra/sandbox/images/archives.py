"""Images as container tools write them: OCI layouts, as a directory or an archive, and what `docker save` writes.

Every blob that is named by a digest is held against it, and every layer, decompressed, against the configuration's
`diff_ids`.
"""

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from palestra.core.errors import UserError
from palestra.sandbox.images.unpack import Bounds, Bytes, Tree

_CHUNK = 2**20
_MOST_JSON, _MOST_LAYERS, _MOST_NESTED = 2**22, 512, 4
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]{64,128})")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*")
_MOST_ENVIRONMENT = 16_384
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_END_S = 60.0


class Store(Protocol):
    """Files by their names in the image. `open` gives None for one that there is not."""

    def open(self, name: str) -> BinaryIO | None: ...


class DirectoryStore:
    def __init__(self, top: Path):
        self._top = top

    def open(self, name: str) -> BinaryIO | None:
        try:
            return (self._top / name).open("rb")
        except OSError:
            return None


class TarStore:
    """Errors: tarfile.TarError."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar
        self._members = {os.path.normpath(member.name): member for member in tar.getmembers()}

    def open(self, name: str) -> BinaryIO | None:
        member = self._members.get(os.path.normpath(name))
        if member is not None and member.issym():
            beside = os.path.join(os.path.dirname(member.name), member.linkname)
            member = self._members.get(os.path.normpath(beside))
        if member is None or not member.isreg():
            return None
        return self._tar.extractfile(member)  # type: ignore[return-value]


def is_layout(directory: Path) -> bool:
    return (directory / "oci-layout").is_file() and (directory / "index.json").is_file()


def fingerprint(place: Path) -> str:
    """Of all that is in it. Errors: OSError."""
    if place.is_dir():
        return hashlib.sha256((place / "index.json").read_bytes()).hexdigest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(place: Path, top: Path, *, bounds: Bounds | None = None) -> dict[str, str]:
    """All layers into the empty directory `top`; returns the environment that its maker set. Errors: UserError."""
    what = f"image {place}"
    try:
        with _store(place) as store:
            described = _described(store, what)
            tree = Tree(top, what, bounds=bounds)
            for layer in described.layers:
                _add(tree, store, layer, what)
            return described.environment
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{what}: the archive is torn, or none: {error}; make it anew") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{what}: what it says of itself is not as OCI or docker have it: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _store(place: Path) -> Iterator[Store]:
    if place.is_dir():
        yield DirectoryStore(place)
        return
    with place.open("rb") as file:
        if file.read(4)[:2] == _GZIP or file.seek(0) or file.read(4) == _ZSTD:
            raise UserError(f"image {place} is compressed as a whole; decompress it, as by gunzip or zstd -d")
    with tarfile.open(place, "r:") as tar:
        yield TarStore(tar)


# --- what an image says of itself


@dataclass(frozen=True)
class _Layer:
    """`digest` is that of the file, and None where only what it decompresses to is told."""

    file: str
    digest: str | None
    diff_id: str


@dataclass(frozen=True)
class _Described:
    layers: tuple[_Layer, ...]
    environment: dict[str, str]


def _described(store: Store, what: str) -> _Described:
    index = _json(store, "index.json", what)
    if index is not None and index.get("manifests"):
        return _oci(store, index, what)
    manifests = _json(store, "manifest.json", what)
    if manifests is not None:
        return _docker(store, manifests, what)
    raise UserError(f"{what} is no image: it has neither index.json (OCI) nor manifest.json (docker save)")


def _oci(store: Store, index: Mapping[str, Any], what: str) -> _Described:
    for _ in range(_MOST_NESTED):
        found = _blob_json(store, _chosen(index["manifests"], what)["digest"], what)
        if "manifests" not in found:
            break
        index = found
    else:
        raise UserError(f"{what}: its indexes lead to indexes, {_MOST_NESTED} deep")
    config = _blob_json(store, found["config"]["digest"], what)
    files = [(_blob(layer["digest"], what), layer["digest"]) for layer in found["layers"]]
    return _of_config(config, files, what)


def _docker(store: Store, manifests: list[Mapping[str, Any]], what: str) -> _Described:
    if len(manifests) != 1:
        raise UserError(f"{what} has {len(manifests)} images; save one alone")
    config = _json(store, manifests[0]["Config"], what)
    if config is None:
        raise UserError(f"{what}: {manifests[0]['Config']} is missing; the archive is torn, make it anew")
    return _of_config(config, [(file, None) for file in manifests[0]["Layers"]], what)


def _of_config(config: Mapping[str, Any], files: list[tuple[str, str | None]], what: str) -> _Described:
    diff_ids = config["rootfs"]["diff_ids"]
    if len(diff_ids) != len(files) or len(files) > _MOST_LAYERS:
        raise UserError(f"{what} has {len(files)} layers, and tells of {len(diff_ids)}; at most {_MOST_LAYERS} may be")
    made_for = config.get("architecture", _architecture())
    if made_for != _architecture():
        raise UserError(f"{what} is made for {made_for}; this machine is {_architecture()}")
    layers = [_Layer(file, digest, _checked(diff, what)) for (file, digest), diff in zip(files, diff_ids, strict=True)]
    return _Described(tuple(layers), _environment((config.get("config") or {}).get("Env") or []))


def _environment(words: list[str]) -> dict[str, str]:
    fitting = [word for word in words if _VARIABLE.fullmatch(word)]
    pairs = (
        [(word.partition("=")[0], word.partition("=")[2]) for word in fitting]
        if sum(map(len, fitting)) <= _MOST_ENVIRONMENT
        else []
    )
    return dict(pairs)


def _chosen(manifests: list[Mapping[str, Any]], what: str) -> Mapping[str, Any]:
    """The only one, or that of this machine."""
    here = ("linux", _architecture())
    platforms = [
        ((m.get("platform") or {}).get("os"), (m.get("platform") or {}).get("architecture")) for m in manifests
    ]
    fitting = [m for m, kind in zip(manifests, platforms, strict=True) if kind == here]
    if len(manifests) == 1:
        return manifests[0]
    if len(fitting) != 1:
        raise UserError(f"{what} has {len(manifests)} images, {len(fitting)} for {'/'.join(here)}; save one alone")
    return fitting[0]


def _architecture() -> str:
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


# --- blobs


def _checked(digest: str, what: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise UserError(f"{what}: {str(digest)[:100]!r} is no digest; sha256 and sha512 are known")
    return digest


def _blob(digest: str, what: str) -> str:
    return "blobs/" + _checked(digest, what).replace(":", "/")


def _json(store: Store, name: str, what: str) -> Any:
    """None if it is not there."""
    file = store.open(name)
    if file is None:
        return None
    with file:
        text = file.read(_MOST_JSON + 1)
    if len(text) > _MOST_JSON:
        raise UserError(f"{what}: {name} has more than {_MOST_JSON} bytes")
    return json.loads(text)


def _blob_json(store: Store, digest: str, what: str) -> Any:
    with _opened(store, _blob(digest, what), what) as file:
        _verify(file, digest, what)
        file.seek(0)
        text = file.read(_MOST_JSON + 1)
    if len(text) > _MOST_JSON:
        raise UserError(f"{what}: blob {digest} has more than {_MOST_JSON} bytes, and should be JSON")
    return json.loads(text)


def _opened(store: Store, name: str, what: str) -> BinaryIO:
    file = store.open(name)
    if file is None:
        raise UserError(f"{what}: {name} is missing; the archive is torn, make it anew")
    return file


def _verify(file: BinaryIO, digest: str, what: str) -> None:
    read = Digesting(file, digest)
    while read.read(_CHUNK):
        pass
    read.require(f"{what}: a blob")


class Digesting:
    """What is read passes through, and is summed up."""

    def __init__(self, source: Bytes, digest: str):
        algorithm, self._wanted = digest.split(":")
        self._source, self._sum = source, hashlib.new(algorithm)

    def read(self, size: int = -1, /) -> bytes:
        piece = self._source.read(size)
        self._sum.update(piece)
        return piece

    def require(self, what: str) -> None:
        """Errors: UserError, if it was not what the digest says."""
        if self._sum.hexdigest() != self._wanted:
            raise UserError(
                f"{what} has the digest {self._sum.hexdigest()}, and should have {self._wanted}; it is torn, or forged"
            )


def _add(tree: Tree, store: Store, layer: _Layer, what: str) -> None:
    with _opened(store, layer.file, what) as file:
        if layer.digest is not None:
            _verify(file, layer.digest, what)
            file.seek(0)
        with _decompressed(file, what) as plain:
            content = Digesting(plain, layer.diff_id)
            tree.add(content, is_layer=True)
        content.require(f"{what}: the layer {layer.file}")


@contextmanager
def _decompressed(file: BinaryIO, what: str) -> Iterator[Bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == _GZIP:
        with gzip.GzipFile(fileobj=file) as plain:
            yield plain
    elif magic == _ZSTD:
        with _zstd(file, what) as plain:
            yield plain
    else:
        yield file


@contextmanager
def _zstd(file: BinaryIO, what: str) -> Iterator[Bytes]:
    """By the program of that name: Python has it from 3.14 on."""
    program = shutil.which("zstd")
    if program is None:
        raise UserError(f"{what} has layers compressed by zstd, which is not installed here; apt-get install zstd")
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy, _CHUNK)
        copy.seek(0)
        command = [program, "--decompress", "--stdout", "--quiet"]
        with subprocess.Popen(command, stdin=copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
                if process.wait(timeout=_END_S) != 0:
                    raise UserError(f"{what}: a layer is torn: zstd cannot decompress it; make it anew")
            finally:
                process.kill()
