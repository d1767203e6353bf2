"""`palestra sandbox run` and what `palestra serve sandbox` refuses: exit codes, what goes where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.launch.cli import main
from palestra.sandbox.tenants import Tenants

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-m", "palestra.launch.cli", "sandbox", "run"]

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the backend local is Linux's")


def run(file: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    file.write_text(text)
    return subprocess.run([*RUN, str(file), *words], capture_output=True, text=True, timeout=60)


@needs_linux
def test_a_programs_output_and_exit_code_are_the_commands(tmp_path: Path):
    (tmp_path / "in").write_text("given")
    code = "import sys, os; print(input(), os.getuid()); sys.stdout.flush(); print('bad', file=sys.stderr); sys.exit(7)"
    end = run(tmp_path / "a.py", code, "--stdin", str(tmp_path / "in"))
    assert (end.returncode, end.stdout) == (7, "given 1000\n")
    first, *rest = end.stderr.splitlines()
    assert first.startswith("sandbox: local, namespaces (")
    assert rest == ["bad"]
    assert run(tmp_path / "b.py", "print(1)").returncode == 0


@needs_linux
@pytest.mark.parametrize(
    ("code", "returned", "said"),
    [
        ("while True: pass", 124, "killed: its time of 2 s was over"),
        ("import ctypes; ctypes.string_at(0)", 128 + 11, ""),
        ("1/0", 1, "ZeroDivisionError"),
    ],
)
def test_every_end_has_its_code(tmp_path: Path, code: str, returned: int, said: str):
    end = run(tmp_path / "a.py", code, "--timeout-s", "2" if "while True" in code else "20")
    assert end.returncode == returned
    assert said in end.stderr


@needs_linux
def test_a_result_for_machines(tmp_path: Path):
    end = run(tmp_path / "a.py", "print('x'); raise SystemExit(3)", "--json")
    told = json.loads(end.stdout)
    assert end.returncode == 3
    assert (told["stdout"], told["exit_code"], told["status"]) == ("x\n", 3, "failed")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sandbox", "run", "nowhere.py"], "FILE=nowhere.py cannot be read: No such file"),
        (["sandbox", "run", __file__, "--stdin", "nowhere"], "--stdin=nowhere cannot be read"),
        (["sandbox", "run", __file__, "--timeout-s", "0"], "--timeout-s=0 must be above 0"),
        (["sandbox", "run", __file__, "--memory-mb", "1"], "memory_mb=1"),
        (["sandbox", "run", __file__, "--backend", "nothing"], "there is no sandbox 'nothing'"),
        (["sandbox", "run", __file__, "--backend", "http://127.0.0.1:1"], "PALESTRA_SANDBOX_TOKEN"),
        (["serve", "sandbox", "--backend", "http://x"], "is a service already"),
        (["serve", "sandbox", "--most", "0"], "--most=0 must be at least 1"),
        (["serve", "sandbox", "--drain-s", "0"], "--drain-s=0 must be above 0"),
        (["serve", "sandbox", "--port", "0", "--tokens", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["serve", "sandbox", "--token-for", "A B"], "--token-for='A B'"),
    ],
)
def test_mistakes_are_told_with_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PALESTRA_SANDBOX_TOKEN", raising=False)
    assert main(words) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "sandbox", "--port", port]) == 2
        assert f"port {port} of --port on 127.0.0.1 is in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_token_is_printed_once_and_its_lines_know_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["serve", "sandbox", "--token-for", "bob"]) == 0
    told = capsys.readouterr()
    token = told.err.strip().rpartition(" ")[2]
    assert token not in told.out  # which may go into the file
    (tmp_path / "tokens.toml").write_text(told.out)
    tenant = Tenants.read(tmp_path / "tokens.toml").of(f"Bearer {token}")
    assert tenant is not None
    assert tenant.name == "bob"
