"""A bucket is a store of contents like a directory: against moto's stand-in for S3."""

import hashlib
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.hub.registry.blobs import Directory, MissingBlobError, put_bytes, sweep
from palestra.hub.registry.s3 import Bucket

moto = pytest.importorskip("moto", reason="needs moto and boto3")
pytestmark = pytest.mark.filterwarnings("ignore")  # botocore's and moto's own


@pytest.fixture(params=["s3", "directory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if request.param == "directory":
        yield Directory(tmp_path / "blobs")
        return
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with moto.mock_aws():
        boto3.client("s3").create_bucket(Bucket="team")
        yield Bucket("s3://team/hub/blobs")


def test_what_is_put_is_read_again(blobs, tmp_path: Path):
    content = b"a wheel" * 999
    sha256 = put_bytes(blobs, content, tmp_path)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert put_bytes(blobs, content, tmp_path) == sha256
    with blobs.open(sha256) as file:
        assert file.read(7) == b"a wheel"
        file.seek(-5, 2)
        assert file.read() == b"wheel"
    assert [name for name, _ in blobs.names()] == [sha256]
    assert blobs.exists(sha256)


def test_what_is_not_there(blobs, tmp_path: Path):
    sha256 = put_bytes(blobs, b"a", tmp_path)
    blobs.delete(sha256)
    blobs.delete(sha256)
    assert not blobs.exists(sha256)
    with pytest.raises(MissingBlobError):
        blobs.open(sha256)
    with pytest.raises(ValueError, match="no SHA-256"):
        blobs.exists("../" + "a" * 61)


def test_what_nobody_names_is_swept(blobs, tmp_path: Path):
    kept, other = (put_bytes(blobs, content, tmp_path) for content in (b"a", b"b"))
    assert sweep(blobs, lambda: {kept}, older_than_s=3600) == 0  # the control: it is young
    assert sweep(blobs, lambda: {kept}, older_than_s=-10) == 1
    assert (blobs.exists(kept), blobs.exists(other)) == (True, False)


def test_a_bucket_that_is_not_there_is_an_error_of_the_store(blobs):
    if isinstance(blobs, Directory):
        pytest.skip("of buckets alone")
    with pytest.raises(OSError, match="the bucket"):
        list(Bucket("s3://nobody").names())
    with pytest.raises(UserError, match="no bucket"):
        Bucket("http://team/x")
