"""Wheels and sdists, made in memory: good ones, and ones that lie."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence

README = "# Words\n\nGuess them.\n"


def core(
    name: str, version: str, *, requires: Sequence[str] = (), python: str = "", readme: str = README, **more
) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"{key.replace('_', '-').title()}: {value}" for key, value in more.items()]
    lines += [f"Requires-Python: {python}"] if python else []
    lines += [f"Requires-Dist: {one}" for one in requires]
    return "\n".join([*lines, "Description-Content-Type: text/markdown", "", readme])


def wheel(
    name: str = "palestra-words",
    version: str = "1.0",
    *,
    directory: str = "",
    metadata: str | None = None,
    files: Mapping[str, bytes] | None = None,
    **of_core,
) -> tuple[str, bytes]:
    """File name and content. `metadata` and `directory` may say something else than the name."""
    module = name.replace("-", "_")
    info = directory or f"{module}-{version}.dist-info"
    content = {
        f"{module}/__init__.py": f'VERSION = "{version}"\n'.encode(),
        f"{info}/METADATA": (metadata if metadata is not None else core(name, version, **of_core)).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(files or {}),
    }
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    return f"{module}-{version}-py3-none-any.whl", zipped({**content, f"{info}/RECORD": record.encode()})


def zipped(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(zipfile.ZipInfo(path, (2026, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def sdist(
    name: str = "palestra-words",
    version: str = "1.0",
    *,
    metadata: str | None = None,
    members: Sequence[tuple[tarfile.TarInfo, bytes]] = (),
    **of_core,
) -> tuple[str, bytes]:
    root = f"{name.replace('-', '_')}-{version}"
    info = metadata if metadata is not None else core(name, version, **of_core)
    pyproject = b'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    own = [
        (tarfile.TarInfo(f"{root}/PKG-INFO"), info.encode()),
        (tarfile.TarInfo(f"{root}/pyproject.toml"), pyproject),
    ]
    return f"{root}.tar.gz", tarred([*own, *members])


def tarred(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""
