"""A hub as `palestra serve hub` starts it, in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

from palestra.hub.client import Client

_START_S = 60.0


@dataclass
class Running:
    """`token` is the first administrator's, who is called hub-admin."""

    url: str
    token: str
    process: subprocess.Popen[str]
    data: Path
    environ: dict[str, str] = field(default_factory=dict)

    def client(self, token: str | None = None) -> Client:
        return Client(self.url, token=self.token if token is None else token)

    def with_token(self, token: str) -> str:
        return self.url.replace("://", f"://__token__:{token}@")

    def palestra(self, *words: str, **more) -> subprocess.CompletedProcess[str]:
        """A command of the command line, logged in where `login` was called."""
        command = [sys.executable, "-m", "palestra.launch.cli", *words]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=180, **more)


@contextlib.contextmanager
def running(data: Path, *words: str, token: str = "") -> Iterator[Running]:
    """`token`: of a hub that was started before, which does not say it again."""
    command = [sys.executable, "-m", "palestra.launch.cli", "serve", "hub", "--data", str(data), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = Timer(_START_S, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        assert said.startswith("hub: "), process.stderr.read()
        if not token:
            token = re.search(r"palestra_\S+", process.stderr.readline())[0]  # pyright: ignore[reportOptionalSubscript]
        late.cancel()
        environ = {**os.environ, "XDG_CONFIG_HOME": str(data / "config")}
        yield Running(said.removeprefix("hub: ").strip().rstrip("/"), token, process, data, environ)
    finally:
        late.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=10)
