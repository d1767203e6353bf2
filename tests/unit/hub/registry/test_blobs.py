"""Contents by their SHA-256: whole or not there."""

import hashlib
import os

import pytest

from palestra.hub.registry.blobs import (
    Directory,
    MissingBlobError,
    TooLargeError,
    put_bytes,
    received,
    sweep,
    sweep_incoming,
)


@pytest.fixture
def blobs(tmp_path):
    return Directory(tmp_path / "blobs")


@pytest.fixture
def incoming(tmp_path):
    found = tmp_path / "incoming"
    found.mkdir()
    return found


def test_what_is_put_is_read_again_and_lies_under_its_hash(blobs, incoming, tmp_path):
    sha256 = put_bytes(blobs, b"content", incoming)
    assert sha256 == hashlib.sha256(b"content").hexdigest()
    assert blobs.exists(sha256)
    with blobs.open(sha256) as file:
        assert file.read() == b"content"
    assert [name for name, _ in blobs.names()] == [sha256]
    assert list(incoming.iterdir()) == []
    assert (tmp_path / "blobs" / sha256[:2] / sha256).is_file()


def test_twice_the_same_is_kept_once(blobs, incoming):
    assert put_bytes(blobs, b"a", incoming) == put_bytes(blobs, b"a", incoming)
    assert len(list(blobs.names())) == 1


def test_what_was_deleted_is_gone_and_may_be_deleted_again(blobs, incoming):
    sha256 = put_bytes(blobs, b"a", incoming)
    for _ in range(2):
        blobs.delete(sha256)
    assert not blobs.exists(sha256)
    with pytest.raises(MissingBlobError):
        blobs.open(sha256)


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "", "0" * 63, "0" * 64 + "\n"])
def test_a_name_that_is_no_hash_leads_nowhere(blobs, name):
    with pytest.raises(ValueError, match="SHA-256"):
        blobs.open(name)


def test_a_stream_stops_at_its_bound(blobs, incoming):
    taken = []

    def pieces():
        for number in range(1000):
            taken.append(number)
            yield b"x" * 10

    with pytest.raises(TooLargeError), received(pieces(), incoming, 35):
        pass
    assert len(taken) == 4
    assert list(incoming.iterdir()) == []
    with received([b"x" * 35], incoming, 35) as one:
        assert one.size == 35


def test_sweeping_takes_what_is_old_and_unnamed_alone(blobs, incoming, tmp_path):
    named, old, young = (put_bytes(blobs, text, incoming) for text in (b"named", b"old", b"young"))
    for sha256 in (named, old):
        os.utime(tmp_path / "blobs" / sha256[:2] / sha256, (1, 1))
    left = incoming / "upload-left"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    assert sweep(blobs, lambda: {named}, older_than_s=60) == 1
    assert sweep_incoming(incoming, older_than_s=60) == 1
    assert {name for name, _ in blobs.names()} == {named, young}
    assert not left.exists()
