"""Programs that others wrote speak for an agent, as they come from PyPI: `mini-swe-agent`, `pydantic-ai`."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from palestra.core.deadline import within
from palestra.core.records import Ending
from palestra.env import Agent
from palestra.env.chat import ChatTokenizer, load_tokenizer
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine, played, require_exact_and_no_other

if TYPE_CHECKING:
    from pydantic_ai.models import Model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PROGRAM_S = 200.0
ROOM = 16_000  # tokens: mini-swe-agent explains much


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> ChatTokenizer:
    return load_tokenizer(build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"]))


def calls(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# --- mini-swe-agent: a process of its own, told what to do by a file and whom to ask by its environment

TASK = "The function quadruple in four.py is wrong."
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
CODE = "def quadruple(n):\n    return n + n\n"
REPAIRED = CODE.replace("n + n", "4 * n")
WORK = (
    "<think>\nFirst I look.\n</think>\n\nI read the file.\n" + calls("bash", command="cat four.py"),
    calls("bash", command="sed -i 's/n + n/4 * n/' four.py") + "\n" + calls("bash", command="cat four.py"),
    "It is done.",  # calls no tool: the program forgets that this was said, and complains
    calls("bash", command=SUBMIT),
)
SPEAKS: dict[str, dict[str, str]] = {
    "chat": {"model_name": "openai/policy"},
    "responses": {"model_name": "openai/policy", "model_class": "litellm_response"},
    "messages": {"model_name": "anthropic/policy"},
}


@dataclass
class Watching(Engine):
    """Notes the arguments of all processes that were started, whenever it is asked."""

    arguments: set[str] = field(default_factory=set)

    async def __call__(self, token_ids, sampling):
        self.arguments |= {" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
        return await super().__call__(token_ids, sampling)


async def mini_swe_agent(agent: Agent, dialect: str, directory: Path) -> dict[str, Any]:
    """Plays `TASK` in `directory`. What it says of itself at the end."""
    own = {"run": {"task": TASK}, "model": SPEAKS[dialect], "environment": {"cwd": str(directory)}}
    (told := directory / "own.yaml").write_text(json.dumps(own))
    provider = SPEAKS[dialect]["model_name"].partition("/")[0].upper()
    variables = {
        f"{provider}_API_BASE": agent.url if dialect == "messages" else f"{agent.url}/v1",
        f"{provider}_API_KEY": agent.key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it asks no other host
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "MSWEA_GLOBAL_CONFIG_DIR": str(directory / "settings"),
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "1",
        "PATH": os.environ["PATH"],
    }
    words = ["--yolo", "--exit-immediately", "-c", "mini.yaml", "-c", str(told), "-o", str(directory / "end.json")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "minisweagent.run.mini", *words),
        env=variables,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        shown, _ = await within(PROGRAM_S, process.communicate(), waiting_for="mini-swe-agent to submit its work")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, shown.decode()
    return json.loads((directory / "end.json").read_text())


@pytest.mark.parametrize("dialect", SPEAKS)
async def test_mini_swe_agent_repairs_a_file_and_exactly_what_was_sampled_trains(qwen, dialect, tmp_path):
    (file := tmp_path / "four.py").write_text(CODE)
    engine, ends, keys = Watching(qwen, WORK), [], []

    async def program(agent: Agent) -> None:
        keys.append(agent.key)
        ends.append(await mini_swe_agent(agent, dialect, tmp_path))

    record = await played(program, engine, max_model_len=ROOM)
    assert (record.ending, record.error) == (Ending.OK, "")
    assert (ends[0]["info"]["exit_status"], file.read_text()) == ("Submitted", REPAIRED)
    require_exact_and_no_other(record, engine)
    assert [len(sample.turns) for sample in record.seats[0].samples] == [3, 1]
    assert [TASK in prompt and '"name": "bash"' in prompt for prompt in engine.prompts] == [True] * 4
    assert [json.dumps(REPAIRED)[1:-1] in prompt for prompt in engine.prompts] == [False, False, True, True]
    assert any("minisweagent" in words for words in engine.arguments)
    assert [words for words in engine.arguments if TASK in words or keys[0] in words] == []


# --- pydantic-ai: in this process, in all dialects

QUESTION = "2 + 3, then times 4?"
SUMS = (
    "<think>\nOne after the other.\n</think>\n\n" + calls("add", a=2, b=3),
    "And now both.\n" + calls("add", a=5, b=5) + "\n" + calls("add", a=10, b=10),
    "<think>\n20\n</think>\n\nIt is 20.",
)


def pydantic_model(agent: Agent, dialect: str) -> "Model":
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if dialect == "messages":
        return AnthropicModel("policy", provider=AnthropicProvider(base_url=agent.url, api_key=agent.key))
    provider = OpenAIProvider(base_url=f"{agent.url}/v1", api_key=agent.key)
    return (OpenAIChatModel if dialect == "chat" else OpenAIResponsesModel)("policy", provider=provider)


async def pydantic_ai(agent: Agent, dialect: str, *, stream: bool) -> str:
    """Asks `QUESTION`. The answer."""
    from pydantic_ai import Agent as Framework

    framework = Framework(pydantic_model(agent, dialect), instructions="Be brief.")

    @framework.tool_plain
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    async def listen(_: object, events: AsyncIterable[object]) -> None:
        async for _ in events:
            pass

    async with framework:
        return (await framework.run(QUESTION, event_stream_handler=listen if stream else None)).output


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", SPEAKS)
async def test_pydantic_ai_calls_its_tools_and_exactly_what_was_sampled_trains(qwen, dialect, stream):
    engine, answers = Engine(qwen, SUMS), []

    async def program(agent: Agent) -> None:
        answers.append(await pydantic_ai(agent, dialect, stream=stream))

    record = await played(program, engine)
    assert (record.ending, record.error, answers) == (Ending.OK, "", ["It is 20."])
    require_exact_and_no_other(record, engine)
    assert [len(sample.turns) for sample in record.seats[0].samples] == [3]
    assert "Be brief." in engine.prompts[0]
    assert engine.prompts[2].count("<tool_response>") == 3
