"""Contents in a bucket of S3, or of what speaks like it: `s3://BUCKET/PREFIX`. Credentials are where boto3 looks.

An object appears as a whole. A content that is opened is fetched to a temporary file first, for readers seek in it.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from palestra.core.errors import UserError
from palestra.hub.registry.blobs import MissingBlobError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_IN_MEMORY = 8 << 20
_MISSING = frozenset({"404", "NoSuchKey", "NotFound"})


class Bucket:
    """A `Blobs`. Errors: OSError, where the store does not answer."""

    def __init__(self, url: str):
        """Errors: UserError, for an address that is none, or where boto3 is missing."""
        place = urlsplit(url)
        if place.scheme != "s3" or not place.netloc:
            raise UserError(f"--storage {url} is no bucket, such as s3://bucket/prefix")
        self._bucket, prefix = place.netloc, place.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._s3 = _client()

    def put(self, file: Path, sha256: str) -> None:
        """Also where it is there: a content that is named anew is young again, and no sweep takes it."""
        with _answering():
            self._s3.upload_file(str(file), self._bucket, self._key(sha256))

    def open(self, sha256: str) -> BinaryIO:
        found: Any = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        try:
            with _answering(sha256):
                self._s3.download_fileobj(self._bucket, self._key(sha256), found)
        except BaseException:
            found.close()
            raise
        found.seek(0)
        return found

    def exists(self, sha256: str) -> bool:
        try:
            with _answering(sha256):
                self._s3.head_object(Bucket=self._bucket, Key=self._key(sha256))
        except MissingBlobError:
            return False
        return True

    def delete(self, sha256: str, *, before: float = inf) -> None:
        place = {"Bucket": self._bucket, "Key": self._key(sha256)}
        try:
            with _answering(sha256):
                if self._s3.head_object(**place)["LastModified"].timestamp() < before:
                    self._s3.delete_object(**place)
        except MissingBlobError:
            pass  # gone already

    def names(self) -> Iterator[tuple[str, float]]:
        with _answering():
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for one in (one for page in pages for one in page.get("Contents", ())):
                name = one["Key"].rpartition("/")[2]
                if _SHA256.fullmatch(name):
                    yield name, one["LastModified"].timestamp()

    def _key(self, sha256: str) -> str:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return f"{self._prefix}{sha256[:2]}/{sha256}"


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise UserError(f"--storage s3://... needs {error.name}: pip install 'palestra[hub,s3]'") from None
    bounds = Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 4, "mode": "standard"})
    return boto3.client("s3", config=bounds)


@contextmanager
def _answering(sha256: str = "") -> Iterator[None]:
    """Errors: MissingBlobError, where it is `sha256` that is asked for; OSError."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if sha256 and error.response.get("Error", {}).get("Code") in _MISSING:
            raise MissingBlobError(f"there is no content {sha256}") from None
        raise OSError(f"the bucket: {error}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise OSError(f"the bucket: {error}") from error
