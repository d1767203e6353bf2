"""Wheels and sdists, written as a push has them, from the source of one module."""

import io
import tarfile
import zipfile
from pathlib import Path

SOUND = '''
from palestra.env import Environment, Task, reward

class Echo(Environment):
    """Say the word again."""

    max_turns = 1

    def tasks(self):
        words = ["red", "green"] if self.split == "train" else ["blue"]
        for word in words:
            yield Task(prompt=f"Say {word}.", gold=word, answer=word, key=word)

    @reward
    def said(self, task, rollout):
        return rollout.reply == task.answer
'''

ENTRY = "[palestra.environments]\necho = palestra_echo:Echo\n"


def wheel(directory: Path, source: str = SOUND, *, requires: str = "palestra", entry: str = ENTRY) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "palestra_echo-0.1.0-py3-none-any.whl"
    info = "palestra_echo-0.1.0.dist-info"
    files = {
        "palestra_echo.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: palestra-echo\nVersion: 0.1.0\nRequires-Dist: {requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry,
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


def sdist(directory: Path, source: str = SOUND, *, setup: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path, top = directory / "palestra_echo-0.1.0.tar.gz", "palestra_echo-0.1.0"
    project = (
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "palestra-echo"\nversion = "0.1.0"\ndependencies = ["palestra"]\n'
        '[project.entry-points."palestra.environments"]\necho = "palestra_echo:Echo"\n'
        '[tool.setuptools]\npy-modules = ["palestra_echo"]\n'
    )
    files = {"pyproject.toml": project, "palestra_echo.py": source, "PKG-INFO": "Metadata-Version: 2.1\n"}
    if setup:
        files["setup.py"] = setup
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path
