"""Archives made by hand: tar files of any names, and OCI images of such layers."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from palestra.sandbox.images.archives import _architecture

Entry = tuple[str, str, Any]
"""Name, kind (`file`, `dir`, `link`, `hard`, or a type of `tarfile`), and content, target, or nothing."""


def tar_of(*entries: Entry, mode: int = 0o644) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = mode
            data = content if kind == "file" else b""
            kinds = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
            info.type = kinds.get(kind, kind.encode())
            if kind in ("link", "hard"):
                info.linkname = content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def config_of(layers: list[bytes], **more: Any) -> dict[str, Any]:
    return {
        "architecture": _architecture(),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        **more,
    }


def oci_files(layers: list[bytes], *, pack=gzip.compress, config: dict[str, Any] | None = None) -> dict[str, bytes]:
    """By name, the files of a layout."""
    blobs = [pack(layer) for layer in layers]
    settings = json.dumps(config_of(layers) if config is None else config).encode()
    described = [{"mediaType": "any", "digest": digest_of(blob), "size": len(blob)} for blob in blobs]
    manifest = json.dumps({"config": {"digest": digest_of(settings)}, "layers": described}).encode()
    named = {f"blobs/sha256/{hashlib.sha256(one).hexdigest()}": one for one in (*blobs, settings, manifest)}
    index = {"schemaVersion": 2, "manifests": [{"digest": digest_of(manifest), "size": len(manifest)}]}
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode(), **named}


def docker_files(layers: list[bytes], *, config: dict[str, Any] | None = None) -> dict[str, bytes]:
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": ["x:1"], "Layers": names}]
    settings = config_of(layers) if config is None else config
    told = {"manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(settings).encode()}
    return {**told, **dict(zip(names, layers, strict=True))}


def saved(place: Path, files: dict[str, bytes]) -> Path:
    place.write_bytes(tar_of(*((name, "file", content) for name, content in files.items())))
    return place
