"""`palestra serve proxy`: sessions by the keys of programs, and what becomes of them when they cannot be written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine

from palestra.config.load import load_tree
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.files import AppendFile
from palestra.core.records import RolloutRecord
from palestra.env.chat import load_tokenizer
from palestra.env.proxy import Proxy
from palestra.launch import serve
from palestra.launch.proxy import Recorder
from palestra.launch.proxy import serve as serve_proxy
from palestra.wire.runlog import read_rows

ASK: Any = [{"role": "user", "content": "a"}]


class Disk(AppendFile):
    """Full until it is told otherwise."""

    is_full = True

    def append(self, piece: bytes) -> int:
        if self.is_full:
            raise InfrastructureError("no space left")
        return super().append(piece)


def engine_client(engine: Engine) -> Any:
    async def stream(token_ids, sampling, **_: Any):
        return await engine(token_ids, sampling)

    return SimpleNamespace(serving=0, stream=stream)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "out.jsonl")
    yield disk
    disk.close()


@pytest.fixture
async def desk(tmp_path, disk):
    """A recorder before an engine that says two words, and its proxy."""
    tokenizer = load_tokenizer(build_family(tmp_path / "qwen3", FAMILIES["qwen3"]))
    config = load_tree({"log": {"name": "proxy"}, "model": {"path": "m"}}, []).config
    recorder = Recorder(engine_client(Engine(tokenizer, ["one", "two"])), tokenizer, config, disk)
    proxy = Proxy(meet=recorder.meet)
    recorder.forget = proxy.forget
    yield recorder, proxy
    await proxy.close()


async def ask(proxy: Proxy, key: str) -> None:
    async with openai.AsyncOpenAI(base_url=proxy.open(), api_key=key) as client:
        await client.chat.completions.create(model="m", messages=ASK)


def written(disk: Disk) -> list[str]:
    return [record.messages[-1]["content"] for record in read_rows(disk.path, RolloutRecord)]


async def test_a_session_that_a_full_disk_keeps_back_is_written_later_though_its_program_came_again(desk, disk, capsys):
    recorder, proxy = desk
    await ask(proxy, "key")
    await recorder.write_idle(0.0)
    assert "session 0 is tried again later: no space left" in capsys.readouterr().err
    await ask(proxy, "key")
    disk.is_full = False
    await recorder.write_idle(0.0)
    assert written(disk) == ["one", "two"]
    await recorder.write_all()
    assert written(disk) == ["one", "two"]


async def test_what_cannot_be_written_at_the_end_is_said_and_no_success(desk, disk):
    recorder, proxy = desk
    await ask(proxy, "one")
    await ask(proxy, "other")
    with pytest.raises(InfrastructureError, match="2 sessions are lost: no space left"):
        await recorder.write_all()


async def test_a_session_that_asked_just_now_goes_on(desk, disk):
    recorder, proxy = desk
    disk.is_full = False
    await ask(proxy, "key")
    await recorder.write_idle(60.0)
    assert written(disk) == []
    await recorder.write_idle(0.0)
    assert written(disk) == ["one"]


def test_a_place_that_cannot_be_written_is_said_before_anything_is_asked(tmp_path):
    config = load_tree({"log": {"name": "proxy"}, "model": {"path": "m"}}, []).config
    with pytest.raises(UserError, match=r"--to=.* cannot be written: Is a directory"):
        serve_proxy("http://127.0.0.1:9", config, port=0, to=tmp_path, idle_s=1.0)


def test_an_engine_that_does_not_answer_is_said(tmp_path):
    config = load_tree({"log": {"name": "proxy"}, "model": {"path": "m"}}, []).config
    with pytest.raises(UserError, match=r"no engine answers at http://127\.0\.0\.1:9"):
        serve_proxy("http://127.0.0.1:9", config, port=0, to=tmp_path / "out.jsonl", idle_s=1.0)


def test_sessions_that_never_rest_are_refused(tmp_path: Path):
    model = build_family(tmp_path, FAMILIES["qwen3"])
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    with pytest.raises(UserError, match="--idle-s=0 must be above 0"):
        serve.proxy(str(model), "http://127.0.0.1:9", [], port=0, to=tmp_path / "out.jsonl", idle_s=0.0)
