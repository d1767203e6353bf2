"""A new author's path: the commands of docs/environments.md, one after the other, in an empty folder."""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_summary

DOCS = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """Programs of a virtual environment that has what this one has, so that what is installed stays here."""
    venv.create(tmp_path / "venv", symlinks=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    seen = [*dict.fromkeys(path for path in sys.path if path and Path(path).is_dir() and "lib/python" not in path)]
    (own / "all.pth").write_text("\n".join([f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})", *seen]))
    python = tmp_path / "venv" / "bin" / "python"
    program = python.with_name("palestra")
    program.write_text(f"#!{python}\nimport sys\nfrom palestra.launch.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return python.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_name_to_a_trained_policy(tmp_path, bin):
    [told] = re.findall(r"## From a name to a trained policy.*?```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    folder = tmp_path / "empty"
    folder.mkdir()
    said = ""
    for line in told.splitlines():
        program, *rest = shlex.split(line)
        done = subprocess.run([bin / program, *rest], cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        said += done.stdout
    assert "sums: 14 passed, 0 failed, 0 skipped" in said
    assert "3 passed" in said
    summary = read_summary(RunDir(folder / "outputs" / "sums"))
    assert summary is not None
    assert summary["reward_after"] > summary["reward_before"] + 0.05
    [evaluated] = (folder / "outputs" / "evals").iterdir()
    found = json.loads((evaluated / "summary.json").read_text())["sets"]["sums"]
    assert abs(found["reward"]["mean"] - summary["reward_after"]) < 0.2  # of the same policy, on 50 tasks
