"""Images: what hostile archives cannot do, what layers mean, what digests are held against, and laws of the cache."""

import fcntl
import gzip
import io
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox.backends.root import image_root
from palestra.sandbox.images import _root_of, archives, prune, root_of
from palestra.sandbox.images.cache import Cache
from palestra.sandbox.images.packages import debian_image, pip_image
from palestra.sandbox.images.unpack import Bounds, Tree
from tests.unit.sandbox.archives import config_of, docker_files, oci_files, saved, tar_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "palestra" / "images"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


def layered(top: Path, *layers: bytes, **options) -> Tree:
    tree = Tree(top, "image x", **options)
    for layer in layers:
        tree.add(io.BytesIO(layer), is_layer=True)
    return tree


def shown(top: Path) -> dict[str, str]:
    """Each file's text, each link's target after `-> `, each empty directory as `/`."""
    found = {}
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            place = Path(directory, name)
            key = str(place.relative_to(top))
            if place.is_symlink():
                found[key] = f"-> {os.readlink(place)}"
            elif place.is_file():
                found[key] = place.read_text()
            elif not any(place.iterdir()):
                found[key] = "/"
    return found


def outside(top: Path) -> list[str]:
    return sorted(p.name for p in (top.parent / "outside").iterdir())


# --- hostile archives


@pytest.mark.parametrize(
    "name", ["/etc/x", "../outside/x", "a/../../outside/x", "a/..", "./..", "..", "//x", "a/" * 300 + "x"]
)
def test_a_name_that_leads_out_is_refused(top: Path, name: str):
    with pytest.raises(UserError, match="leads out of the image"):
        layered(top, tar_of((name, "file", b"evil")))
    assert outside(top) == ["kept"]
    assert shown(top) == {}


@pytest.mark.parametrize("target", ["../outside", "{top}/../outside", "/outside", "b", "../../../../outside"])
def test_what_comes_through_a_link_stays_inside(top: Path, target: str):
    """The link means what it would mean with the image for a root."""
    layered(top, tar_of(("a", "link", target.format(top=top)), ("a/x", "file", b"1")))
    assert outside(top) == ["kept"]
    assert [p.read_text() for p in top.rglob("x") if not p.is_symlink()] == ["1"]


def test_negative_control_without_following_links_by_hand_a_file_lands_outside(top: Path):
    with tarfile.open(fileobj=io.BytesIO(tar_of(("a", "link", "../outside"), ("a/x", "file", b"1")))) as tar:
        for member in tar:
            tar.extract(member, top, **({"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}))
    assert outside(top) == ["kept", "x"]


def test_a_file_is_not_written_through_a_link_of_its_name(top: Path):
    layered(top, tar_of(("a", "link", "../outside/kept"), ("a", "file", b"1")))
    assert (top.parent / "outside" / "kept").read_text() == "kept"
    assert shown(top) == {"a": "1"}


def test_a_file_is_not_written_into_a_hard_link_of_its_name(top: Path):
    layered(top, tar_of(("a", "file", b"1"), ("b", "hard", "a"), ("b", "file", b"2")))
    assert shown(top) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("target", ["../outside/kept", "/etc/passwd", "missing", "d", "."])
def test_a_hard_link_to_what_is_no_file_inside_is_refused(top: Path, target: str):
    with pytest.raises(UserError, match=r"leads out|no file in it"):
        layered(top, tar_of(("d", "dir", None), ("b", "hard", target)))


def test_a_hard_link_through_a_link_stays_inside(top: Path):
    with pytest.raises(UserError, match="no file in it"):
        layered(top, tar_of(("a", "link", "../outside"), ("b", "hard", "a/kept")))
    assert not os.path.lexists(top / "b")


def test_a_hard_link_inside_is_one_file(top: Path):
    layered(top, tar_of(("a", "file", b"1"), ("d/b", "hard", "./a")))
    assert os.path.samefile(top / "a", top / "d/b")


def test_devices_and_pipes_are_left_out_and_no_file_keeps_special_bits(top: Path):
    devices = [(f"dev{kind}", kind, None) for kind in ("3", "4", "6")]
    layered(top, tar_of(*devices, ("su", "file", b"#!"), mode=0o6755))
    assert list(shown(top)) == ["su"]
    assert stat.S_IMODE((top / "su").stat().st_mode) == 0o755


def test_what_only_its_owner_could_read_can_be_read(top: Path):
    layered(top, tar_of(("d", "dir", None), ("d/x", "file", b"1"), mode=0o600))
    assert stat.S_IMODE((top / "d").stat().st_mode) == 0o755
    assert stat.S_IMODE((top / "d/x").stat().st_mode) == 0o644


def test_links_in_circles_are_refused(top: Path):
    with pytest.raises(UserError, match="circles"):
        layered(top, tar_of(("a", "link", "b"), ("b", "link", "a"), ("a/x", "file", b"1")))


def test_a_directory_below_a_file_is_refused(top: Path):
    with pytest.raises(UserError, match="no directory"):
        layered(top, tar_of(("a", "file", b"1"), ("a/x/y", "file", b"1")))


def test_bounds(top: Path):
    small = tar_of(("a", "file", bytes(5000)), ("b", "file", bytes(5000)))
    with pytest.raises(UserError, match="more than 9000 bytes when unpacked"):
        layered(top, small, bounds=Bounds(most_bytes=9000))
    with pytest.raises(UserError, match="more than 1 files"):
        layered(top, small, bounds=Bounds(most_entries=1))
    assert layered(top, small, bounds=Bounds(most_bytes=len(small), most_entries=2)).num_bytes == len(small)


def test_bounds_count_all_layers_together(top: Path):
    one = tar_of(("a", "file", b"1"))
    with pytest.raises(UserError, match="when unpacked"):
        layered(top, one, one, bounds=Bounds(most_bytes=2 * len(one) - 1))


def sparse(name: str, num_bytes: int) -> bytes:
    """An archive with one file that is a hole: a few hundred bytes say how long it is."""
    entry, map_of_it = tarfile.TarInfo(name), b"0\n".ljust(512, b"\0")
    entry.size = len(map_of_it)
    said = {"major": "1", "minor": "0", "name": name, "realsize": str(num_bytes)}
    entry.pax_headers = {f"GNU.sparse.{key}": value for key, value in said.items()}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry, io.BytesIO(map_of_it))
    return made.getvalue()


def test_holes_count_as_what_they_become(top: Path):
    hole = sparse("a", 600_000)
    assert len(hole) < 20_000
    layered(top, hole, bounds=Bounds(most_bytes=1_000_000))
    assert (top / "a").stat().st_size == 600_000
    with pytest.raises(UserError, match="more than 1000000 bytes when unpacked"):
        layered(top, hole, sparse("b", 600_000), bounds=Bounds(most_bytes=1_000_000))


def test_a_bomb_is_stopped_while_it_is_decompressed(tmp_path: Path, top: Path):
    bomb = saved(tmp_path / "bomb.tar", oci_files([tar_of(*((f"{n}", "file", bytes(400_000)) for n in range(50)))]))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(UserError, match="more than 1000000 bytes when unpacked"):
        archives.unpack(bomb, top, bounds=Bounds(most_bytes=1_000_000))
    assert sum(p.stat().st_size for p in top.rglob("*")) <= 1_000_000


def test_a_header_of_gigabytes_is_not_read_into_memory(top: Path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    with pytest.raises(UserError, match="a header of 4294967296 bytes"):
        layered(top, info.tobuf() + bytes(10_240))


@pytest.mark.parametrize("length", [100, 700, 1536])
def test_a_torn_archive_is_refused_and_the_cache_has_nothing_of_it(tmp_path: Path, cache_home: Path, length: int):
    whole = saved(tmp_path / "whole.tar", docker_files([tar_of(("a", "file", bytes(9000)))]))
    torn = tmp_path / "torn.tar"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size - 10_240 - length])
    with pytest.raises(UserError, match=r"torn|missing|no image|not as OCI"):
        _root_of(str(torn))
    assert [p.name for p in cache_home.iterdir() if not p.name.startswith("etc-")] == []


# --- layers


def test_a_whiteout_takes_away_what_layers_before_had_and_nothing_of_its_own(top: Path):
    lower = tar_of(("d/a", "file", b"1"), ("d/b", "file", b"1"), ("gone/x/y", "file", b"1"))
    upper = tar_of(("d/b", "file", b"2"), ("d/.wh.a", "file", b""), ("d/.wh.b", "file", b""), (".wh.gone", "file", b""))
    layered(top, lower, upper)
    assert shown(top) == {"d/b": "2"}


@pytest.mark.parametrize("is_first", [True, False])
def test_an_opaque_directory_has_its_own_layer_alone(top: Path, is_first: bool):
    own, mark = [("d/sub/new", "file", b"2")], [("d/.wh..wh..opq", "file", b"")]
    lower = tar_of(("d/old", "file", b"1"), ("d/sub/old", "file", b"1"), ("e", "file", b"1"))
    layered(top, lower, tar_of(*(mark + own if is_first else own + mark)))
    assert shown(top) == {"d/sub/new": "2", "e": "1"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "a/.wh..."])
def test_a_whiteout_that_names_nothing_is_refused(top: Path, name: str):
    with pytest.raises(UserError, match="whiteout"):
        layered(top, tar_of(("a/x", "file", b"1")), tar_of((name, "file", b"")))
    assert outside(top) == ["kept"]


def test_a_whiteout_through_a_link_takes_nothing_away_outside(top: Path):
    layered(
        top, tar_of(("a", "link", "../outside")), tar_of(("a/.wh.kept", "file", b""), ("a/.wh..wh..opq", "file", b""))
    )
    assert outside(top) == ["kept"]


def test_a_directory_takes_the_place_of_a_link_in_layers_and_follows_it_in_packages(top: Path):
    lower, upper = tar_of(("usr/lib/a", "file", b"1"), ("lib", "link", "usr/lib")), tar_of(("lib", "dir", None))
    layered(top, lower, upper)
    assert (top / "lib").is_dir()
    assert not (top / "lib").is_symlink()
    merged = top.parent / "merged"
    merged.mkdir()
    layered(merged, lower, upper, tar_of(("lib/b", "file", b"2")), follows_links=True)
    assert shown(merged) == {"usr/lib/a": "1", "usr/lib/b": "2", "lib": "-> usr/lib"}


# --- OCI and docker


LOWER = tar_of(("bin/tool", "file", b"v1"), ("etc/os", "file", b"x"))
UPPER = tar_of(("bin/tool", "file", b"v2"), ("etc/.wh.os", "file", b""))


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True, timeout=20).stdout


@pytest.mark.parametrize("pack", [gzip.compress, bytes, _zstd], ids=["gzip", "plain", "zstd"])
def test_an_oci_archive_is_its_layers_in_order(tmp_path: Path, top: Path, pack):
    if pack is _zstd and shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    config = config_of([LOWER, UPPER], config={"Env": ["PATH=/opt/bin:/bin", "A=b=c", "no", "HOME=/root"]})
    place = saved(tmp_path / "i.tar", oci_files([LOWER, UPPER], pack=pack, config=config))
    assert archives.unpack(place, top) == {"PATH": "/opt/bin:/bin", "A": "b=c", "HOME": "/root"}
    assert shown(top) == {"bin/tool": "v2", "etc": "/"}


def test_a_layout_directory_and_a_docker_archive_are_the_same_image(tmp_path: Path, top: Path):
    for name, content in oci_files([LOWER, UPPER]).items():
        (tmp_path / "layout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "layout" / name).write_bytes(content)
    archives.unpack(tmp_path / "layout", top)
    other = tmp_path / "other"
    other.mkdir()
    archives.unpack(saved(tmp_path / "d.tar", docker_files([LOWER, UPPER])), other)
    assert shown(top) == shown(other) == {"bin/tool": "v2", "etc": "/"}


def test_every_blob_is_held_against_its_digest(tmp_path: Path, top: Path):
    """One bit changed, in each of them in turn."""
    files = oci_files([LOWER, UPPER], pack=bytes)
    blobs = [name for name in files if name.startswith("blobs/")]
    assert len(blobs) == 4
    for name in blobs:
        forged = bytes([files[name][0] ^ 1]) + files[name][1:]
        with pytest.raises(UserError, match="torn, or forged"):
            archives.unpack(saved(tmp_path / "f.tar", {**files, name: forged}), top)
    archives.unpack(saved(tmp_path / "f.tar", files), top)  # negative control


def test_a_layer_is_held_against_its_diff_id(tmp_path: Path, top: Path):
    lying = config_of([LOWER])
    with pytest.raises(UserError, match="torn, or forged"):
        archives.unpack(saved(tmp_path / "f.tar", docker_files([UPPER], config=lying)), top)
    with pytest.raises(UserError, match="torn, or forged"):
        archives.unpack(saved(tmp_path / "f.tar", oci_files([UPPER], config=lying)), top)


def test_a_blob_that_is_missing_is_named(tmp_path: Path, top: Path):
    files = docker_files([LOWER])
    files.pop("0/layer.tar")
    with pytest.raises(UserError, match=r"0/layer.tar is missing"):
        archives.unpack(saved(tmp_path / "f.tar", files), top)


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b"not json", b'{"manifests": [1]}', b'{"manifests": [{"digest": "sha256:../../etc"}]}']
)
def test_an_index_of_anything_is_an_error_of_its_author(tmp_path: Path, top: Path, text: bytes):
    with pytest.raises(UserError):
        archives.unpack(saved(tmp_path / "f.tar", {"index.json": text}), top)


def test_an_image_of_another_architecture_is_refused(tmp_path: Path, top: Path):
    config = config_of([LOWER]) | {"architecture": "s390x"}
    with pytest.raises(UserError, match="made for s390x"):
        archives.unpack(saved(tmp_path / "f.tar", oci_files([LOWER], config=config)), top)


# --- the text of an image


@pytest.mark.parametrize(
    "image",
    ["nothing/there", "pip:", "debian: ", "docker:alpine", "a.tar", "pip:../x", "pip:x@http://y/z.tar.gz", "pip:-r"],
)
async def test_what_is_no_image_is_an_error_that_names_the_forms(image: str):
    with pytest.raises(UserError, match=r"an image is a directory|names no package"):
        await root_of(image)


def test_a_file_that_is_no_archive(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="an image is a directory"):
        _root_of(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("word", ["--download-dir=/x", "gcc;id", "Gcc", "g cc", "-o", "gcc-"])
def test_a_word_that_is_no_package_of_debian(word: str):
    with pytest.raises(UserError, match="names no package of Debian"):
        debian_image(Cache(), [word])


async def test_packages_of_this_interpreter_are_not_put_into_an_image():
    with pytest.raises(UserError, match=r"\+pip:six"):
        await root_of("/", ("six",))


def test_only_one_whole_file_system(tmp_path: Path):
    for name in ("a", "b+pip"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"there is no .*b\+pip\+"):
        _root_of(f"{tmp_path}/b+pip+{tmp_path}/a")
    assert _root_of(f"{tmp_path}/b+pip").has_own_python  # a plus in a path is a plus in a path


def test_wheels_need_a_python_in_a_whole_file_system(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="need a python3 in it"):
        _root_of(f"{tmp_path}/a+pip:six")


def test_no_link_of_an_image_is_followed_here(tmp_path: Path):
    """What is bound is a file or a directory of the image itself."""
    top, etc = tmp_path / "top", tmp_path / "ours"
    for place in ("etc", "var/lib", "home", "usr"):
        (top / place).mkdir(parents=True)
    etc.mkdir()
    (etc / "passwd").write_text("ours")
    for link in ("etc/passwd", "secret", "var/secret", "home/secret", "opt"):
        (top / link).symlink_to("/etc/shadow")
    root = image_root(top, etc=etc, environment={}, site=tmp_path)
    assert all(os.path.realpath(source) == source for source, _ in root.binds)
    assert {link for link, _ in root.links} == {"/secret", "/var/secret", "/home/secret", "/opt"}
    assert "/etc/passwd" not in {target for _, target in root.binds}


def test_more_places_than_can_be_shown_are_an_error_that_says_so(tmp_path: Path):
    for number in range(65):
        (tmp_path / "a" / str(number)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"65 files .* at most 64"):
        _root_of(str(tmp_path / "a"))
    (tmp_path / "a" / "0").rmdir()
    assert len(_root_of(str(tmp_path / "a")).binds) == 64


# --- wheels


def _wheel(place: Path, name: str, *, requires: str = "") -> None:
    """Made by hand, the same each time: building one would need its build system."""
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 7\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    place.mkdir(exist_ok=True)
    with zipfile.ZipFile(place / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(zipfile.ZipInfo(file), text)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "wheels"
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(place), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return place


def test_the_same_wheels_are_the_same_image(wheels: Path, cache_home: Path):
    _wheel(wheels, "tiny_one")
    first = pip_image(Cache(), ["tiny_one"], None)
    assert (first.directory / "tiny_one.py").read_text() == "VALUE = 7\n"
    shutil.rmtree(wheels)
    assert pip_image(Cache(), ["tiny_one"], None) == first  # remembered: nothing is asked again
    _wheel(wheels, "tiny_one")
    assert pip_image(Cache(), ["tiny_one==1.0"], None) == first  # asked, and found to be the same
    assert len(list(cache_home.glob("pip-*"))) == 1


def test_pip_says_what_is_wrong(wheels: Path, cache_home: Path):
    wheels.mkdir()
    with pytest.raises(UserError, match="No matching distribution found for tiny_two"):
        pip_image(Cache(), ["tiny_two"], None)
    assert [p.name for p in cache_home.iterdir()] == []


def _source_package(tmp_path: Path) -> tuple[Path, Path]:
    """A package that says by a file that its setup.py ran."""
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='evil', version='1')\n"
    place = tmp_path / "evil-1.tar.gz"
    content = tar_of(("evil-1/setup.py", "file", setup.encode()), ("evil-1/PKG-INFO", "file", b"Name: evil\n"))
    place.write_bytes(gzip.compress(content))
    return place, ran


def test_no_setup_program_runs_even_if_a_wheel_depends_on_it_by_its_address(wheels: Path, tmp_path: Path):
    source, ran = _source_package(tmp_path)
    _wheel(wheels, "tiny_three", requires=f"Requires-Dist: evil @ file://{source}")
    with pytest.raises(UserError):
        pip_image(Cache(), ["tiny_three"], None)
    assert not ran.exists()


def test_negative_control_pip_alone_runs_it(wheels: Path, tmp_path: Path):
    source, ran = _source_package(tmp_path)
    _wheel(wheels, "tiny_three", requires=f"Requires-Dist: evil @ file://{source}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--only-binary", ":all:", "--no-build-isolation"]
    subprocess.run(
        [*command, "--target", str(tmp_path / "t"), "tiny_three"], timeout=60, check=False, capture_output=True
    )
    assert ran.exists()


# --- the cache


def _fill(size: int):
    def fill(top: Path) -> dict[str, str]:
        (top / "x").write_bytes(os.urandom(size))
        return {"SIZE": str(size)}

    return fill


def _make_elsewhere(home: Path, *names: str) -> None:
    """By a process of its own, which then uses them no more."""
    code = (
        "import sys, os, pathlib\nfrom palestra.sandbox.images.cache import Cache\n"
        "for name in sys.argv[1:]:\n"
        "    image = Cache().built(name, lambda top: (top / 'x').write_bytes(os.urandom(100_000)) and {})\n"
    )
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "XDG_CACHE_HOME": str(home.parent.parent), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, *names], env=environment, check=True, timeout=60)


def test_an_image_is_built_once_and_what_fails_leaves_nothing(cache_home: Path):
    cache, calls = Cache(), []

    def fill(top: Path) -> dict[str, str]:
        calls.append(top)
        return {"A": "b"}

    assert cache.built("one", fill) == cache.built("one", fill)
    assert len(calls) == 1

    def fail(top: Path) -> dict[str, str]:
        (top / "half").touch()
        raise UserError("torn")

    with pytest.raises(UserError, match="torn"):
        cache.built("two", fail)
    assert [p.name for p in cache_home.iterdir()] == ["one"]


def test_the_second_of_two_builders_throws_its_own_away(cache_home: Path):
    cache = Cache()

    def slow(top: Path) -> dict[str, str]:
        """Meanwhile somebody else is done."""
        (top / "x").write_text("second")
        _make_elsewhere(cache_home, "one")
        return {}

    image = cache.built("one", slow)
    assert len((image.directory / "x").read_bytes()) == 100_000
    assert [p.name for p in cache_home.iterdir()] == ["one"]


def test_prune_takes_the_least_recently_used_first_and_none_in_use(cache_home: Path):
    _make_elsewhere(cache_home, "old", "new", "used", "oldest")
    for age, name in ((10, "new"), (20, "old"), (30, "oldest"), (99, "used")):
        os.utime(cache_home / name, (1e9 - age, 1e9 - age))
    fd = os.open(cache_home / "used", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert prune(10**9) == []
        assert prune(250_000) == ["oldest", "old"]
        assert prune(0) == ["new"]
        assert [p.name for p in cache_home.iterdir()] == ["used"]
    finally:
        os.close(fd)
    assert prune(0) == ["used"]  # negative control: it was the lock that held it


def test_what_this_process_uses_stays_until_its_end(cache_home: Path):
    image = Cache().built("mine", _fill(1000))
    assert prune(0) == []
    assert image.directory.is_dir()


def test_what_a_killed_builder_left_is_swept_and_what_a_living_one_has_is_not(cache_home: Path):
    cache = Cache()
    (cache_home / ".building-dead").mkdir()
    with cache.building() as work:
        assert not (cache_home / ".building-dead").exists()
        cache.sweep()
        assert work.is_dir()
    assert list(cache_home.iterdir()) == []


def _built_at_once(home: str, barrier, sizes) -> None:
    os.environ["XDG_CACHE_HOME"] = home
    barrier.wait(timeout=30)
    image = Cache().built("same", _fill(50_000))
    sizes.put(((image.directory / "x").stat().st_size, image.environment))


def test_processes_that_build_the_same_at_once_share_one(cache_home: Path, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier, sizes = context.Barrier(4), context.Queue()
    home = str(tmp_path / "cache")
    workers = [context.Process(target=_built_at_once, args=(home, barrier, sizes)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [sizes.get(timeout=30) for _ in workers] == [(50_000, {"SIZE": "50000"})] * 4
    for worker in workers:
        worker.join(timeout=30)
    assert [p.name for p in cache_home.iterdir()] == ["same"]
