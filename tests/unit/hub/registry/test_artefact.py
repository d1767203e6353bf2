"""What is refused as an artefact, each beside one that differs in nothing else and is taken."""

import gzip
import io
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from palestra.hub.registry import artefact
from palestra.hub.registry.artefact import Artefact, BadArtefactError, Bounds
from tests.unit.hub.registry.packages import core, link, sdist, wheel, zipped

SMALL = Bounds(max_unpacked_bytes=40 << 20, max_members=50)


def read(tmp_path: Path, made: tuple[str, bytes], bounds: Bounds = SMALL) -> Artefact:
    file = tmp_path / "upload"
    file.write_bytes(made[1])
    return artefact.read(file, made[0], bounds)


def refused(tmp_path: Path, made: tuple[str, bytes], saying: str, bounds: Bounds = SMALL) -> None:
    with pytest.raises(BadArtefactError, match=saying):
        read(tmp_path, made, bounds)


@pytest.mark.parametrize("make", [wheel, sdist])
def test_metadata_is_what_the_artefact_says(tmp_path, make):
    requires = ["palestra", "Some.Thing[extra]>=2; python_version>'3'"]
    found = read(tmp_path, make(requires=requires, python=">=3.11", summary="Guess", keywords="Words, word GAME,<b>"))
    assert (found.project, found.version, found.kind) == ("palestra-words", "1.0", make.__name__)
    assert found.requires_python == ">=3.11"
    assert found.summary == "Guess"
    assert found.tags == ("words", "word-game")
    assert found.dependencies == (("palestra", "palestra"), ("some-thing", requires[1]))
    assert found.readme.startswith("# Words")
    assert found.readme_type == "text/markdown"
    assert found.metadata.startswith(b"Metadata-Version: 2.1\nName: palestra-words\n")


def test_nothing_of_it_is_run(tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')".encode()
    root = "palestra_words-1.0"
    read(tmp_path, wheel(files={"palestra_words/setup.py": code, "x.pth": b"import os\n"}))
    read(tmp_path, sdist(members=[(tarfile.TarInfo(f"{root}/setup.py"), code)]))
    assert not mark.exists()


@pytest.mark.parametrize(
    "filename",
    [
        "words.exe",
        "words-1.0.zip",
        "words.whl",
        "a/words-1.0.tar.gz",
        "words-x.y.tar.gz",
        "w\n-1.0.tar.gz",
        'words-1.0-py3-none-a";b.whl',
        "words-1.0-py3-none-a#b.whl",
    ],
)
def test_a_file_that_is_called_otherwise_is_refused(tmp_path, filename):
    refused(
        tmp_path, (filename, wheel()[1]), "neither a wheel|no name of an artefact|wheel filename|sdist filename|version"
    )


@pytest.mark.parametrize("make", [wheel, sdist])
def test_metadata_of_another_project_or_version_is_refused(tmp_path, make):
    refused(tmp_path, make(metadata=core("numpy", "1.0")), "its metadata that it is 'numpy'")
    refused(tmp_path, make(metadata=core("palestra-words", "1.1")), "its metadata of version '1.1'")
    refused(tmp_path, make(metadata="Metadata-Version: 2.1\n\n"), "its metadata that it is ''")
    read(tmp_path, make(metadata=core("Palestra.Words", "1.0")))


def test_a_wheel_of_another_directory_is_refused(tmp_path):
    refused(tmp_path, wheel(directory="numpy-1.0.dist-info"), "its directory is 'numpy-1.0.dist-info'")
    two = wheel(files={"numpy-1.0.dist-info/METADATA": core("numpy", "1.0").encode()})
    refused(tmp_path, two, "one .dist-info directory; this has 2")


def test_a_version_local_to_a_machine_is_refused(tmp_path):
    refused(tmp_path, wheel(version="1.0+cuda"), "local to a machine")


@pytest.mark.parametrize(
    ("of_core", "saying"),
    [
        ({"python": "three"}, "Requires-Python"),
        ({"requires": ["not a requirement!"]}, "Requires-Dist"),
        ({"requires": [f"a{number}" for number in range(501)]}, "501 dependencies"),
    ],
)
def test_metadata_that_no_installer_reads_is_refused(tmp_path, of_core, saying):
    refused(tmp_path, wheel(**of_core), saying)


def test_zero_bytes_are_refused(tmp_path):
    refused(tmp_path, wheel(readme="a\0b"), "zero bytes")


# --- paths and links

PATHS = ["../evil.py", "/etc/passwd", "a/../../b.py", "C:\\x.py", "c:/x.py", "a\\b.py", "new\nline.py"]


@pytest.mark.parametrize("path", PATHS)
def test_a_member_of_a_wheel_that_leads_out_is_refused(tmp_path, path):
    refused(tmp_path, wheel(files={path: b"x"}), "leads out|no path within")
    read(tmp_path, wheel(files={"fine/x.py": b"x"}))


@pytest.mark.parametrize("path", PATHS)
def test_a_member_of_an_sdist_that_leads_out_is_refused(tmp_path, path):
    root = "" if path.startswith(("/", "c:")) else "palestra_words-1.0/"
    refused(tmp_path, sdist(members=[(tarfile.TarInfo(root + path), b"x")]), "leads out|no path within")
    read(tmp_path, sdist(members=[(tarfile.TarInfo("palestra_words-1.0/fine/x.py"), b"x")]))


def test_an_sdist_keeps_to_its_directory(tmp_path):
    refused(tmp_path, sdist(members=[(tarfile.TarInfo("elsewhere/x.py"), b"x")]), "outside palestra_words-1.0/")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_an_sdist_are_refused(tmp_path, kind):
    refused(tmp_path, sdist(members=[link("palestra_words-1.0/x", "/etc/passwd", kind)]), "link or a device")


def test_a_symbolic_link_in_a_wheel_is_refused(tmp_path):
    name, content = wheel()
    made = io.BytesIO(content)
    info = zipfile.ZipInfo("palestra_words/x")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path, (name, made.getvalue()), "link or a device")


def test_two_members_of_one_name_are_refused(tmp_path):
    name, content = wheel()
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("palestra_words/__init__.py", "other")
    refused(tmp_path, (name, made.getvalue()), "two members are called")


# --- bombs


def test_what_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    zeros = bytes(30 << 20)
    refused(tmp_path, wheel(files={"x": zeros}), "100 times its size")
    refused(tmp_path, sdist(members=[(tarfile.TarInfo("palestra_words-1.0/x"), zeros)]), "100 times its size")
    read(tmp_path, wheel(files={"x": bytes(10 << 20)}))  # small enough to harm nobody


def test_more_than_the_bound_unpacked_is_refused(tmp_path):
    tight = Bounds(max_unpacked_bytes=1 << 20)
    refused(tmp_path, wheel(files={"x": bytes(1 << 20)}), "1048576 bytes when unpacked", tight)
    refused(
        tmp_path,
        sdist(members=[(tarfile.TarInfo("palestra_words-1.0/x"), bytes(1 << 20))]),
        "1048576 bytes when unpacked",
        tight,
    )
    read(tmp_path, wheel(files={"x": bytes(1000)}), tight)


def test_more_members_than_the_bound_are_refused(tmp_path):
    many = {f"m/{number}": b"" for number in range(60)}
    refused(tmp_path, wheel(files=many), "at most 50")
    members = [(tarfile.TarInfo(f"palestra_words-1.0/{name}"), b"") for name in many]
    refused(tmp_path, sdist(members=members), "more than 50 members")


def test_a_wheel_that_says_less_than_it_unpacks_to_is_refused(tmp_path):
    """The size in the list of members is made small; the content is what it was."""
    name, content = wheel(files={"x": b"a" * 5000})
    places = [at for at in range(len(content)) if content.startswith(b"PK\x01\x02", at)]
    (place,) = [at for at in places if content[at + 46 : at + 47] == b"x" and content[at + 28] == 1]
    forged = bytearray(content)
    struct.pack_into("<I", forged, place + 24, 10)
    refused(tmp_path, (name, bytes(forged)), "no whole zip archive")


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_is_unpacked_without_a_bound_is_refused(tmp_path, how):
    """A kilobyte of it becomes a gigabyte before any of it is looked at."""
    name, content = wheel()
    made = io.BytesIO(content)
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr("x", b"\0" * (8 << 20), how)
    refused(tmp_path, (name, made.getvalue()), "use deflate", Bounds(max_ratio=10**6))


def test_metadata_are_kept_up_to_their_bound(tmp_path):
    made = wheel(metadata=core("palestra-words", "1.0", readme="a" * (3 << 20)))
    refused(tmp_path, made, "METADATA is larger than 2097152 bytes", Bounds(max_ratio=10**6))


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    info = tarfile.TarInfo("palestra_words-1.0/x")
    info.pax_headers = {"comment": "a" * (3 << 20)}
    refused(tmp_path, sdist(members=[(info, b"")]), "a header of more than")


def test_a_list_of_members_that_would_fill_the_memory_is_refused(tmp_path):
    files = {f"m/{number}/{'x' * 480}": b"" for number in range(9000)}
    refused(tmp_path, wheel(files=files), "list of members", Bounds(max_members=100_000))


# --- torn and doubled


@pytest.mark.parametrize("make", [wheel, sdist])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_torn_file_is_refused(tmp_path, make, share):
    name, content = make(files={"x": bytes(range(256)) * 64}) if make is wheel else make()
    refused(tmp_path, (name, content[: int(len(content) * share)]), "no whole|is missing")


def test_a_flipped_byte_is_refused(tmp_path):
    name, content = wheel(files={"x": bytes(range(256)) * 64})
    flipped = bytearray(content)
    flipped[60] ^= 0xFF  # within the first member
    refused(tmp_path, (name, bytes(flipped)), "no whole zip archive|no path within|two members|one .dist-info|said")


@pytest.mark.parametrize("make", [wheel, sdist])
def test_whatever_is_broken_is_refused_and_nothing_else_is_raised(tmp_path, make):
    draw = random.Random(0)
    name, content = make(requires=["palestra"], python=">=3.11")
    taken = 0
    for _ in range(300):
        broken = bytearray(gzip.decompress(content) if make is sdist else content)
        for _ in range(draw.randrange(1, 6)):
            broken[draw.randrange(min(len(broken), 3000))] = draw.randrange(256)
        packed = gzip.compress(bytes(broken), 1) if make is sdist else bytes(broken)
        try:
            read(tmp_path, (name, packed))
            taken += 1  # the bytes that were changed say nothing
        except BadArtefactError:
            pass
    assert taken < 250


def test_a_name_in_a_wheel_that_is_no_text_is_refused(tmp_path):
    name, content = wheel(files={"ä": b""})
    refused(tmp_path, (name, content.replace("ä".encode(), b"\xff\xff")), "no whole zip archive")


def test_something_before_the_archive_is_refused(tmp_path):
    name, content = wheel()
    refused(tmp_path, (name, b"#!/bin/sh\nevil\n" + content), "before the archive")


def test_a_wheel_without_its_files_is_refused(tmp_path):
    refused(tmp_path, ("palestra_words-1.0-py3-none-any.whl", zipped({"a": b""})), "one .dist-info")


# --- looking inside


@pytest.mark.parametrize("make", [wheel, sdist])
def test_members_are_listed_and_read_to_a_bound(make):
    _, content = make()
    kind = make.__name__
    listed = artefact.members(kind, io.BytesIO(content))
    name = next(one.name for one in listed if one.name.endswith(("METADATA", "PKG-INFO")))
    assert artefact.member(kind, io.BytesIO(content), name, 16) == b"Metadata-Version"
    assert artefact.member(kind, io.BytesIO(content), "no/such", 16) is None
