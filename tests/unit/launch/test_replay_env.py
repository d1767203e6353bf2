"""`palestra replay --from replies`: rollouts played again as the run played them."""

from pathlib import Path

from palestra.config import RunConfig
from palestra.core.records import Task
from palestra.env.play import score
from palestra.env.sandbox import Sandboxes
from palestra.env.voice import ScriptVoice
from palestra.env.worker import set_stages
from palestra.launch.replay_env import _difference

PROGRAMS = f"{Path(__file__).parents[1] / 'env' / 'faulty.py'}:Programs"


async def test_programs_run_again_in_the_runs_sandbox():
    tree = {"log": {"name": "x"}, "model": {"path": "m"}, "env": {"mix": [{"id": PROGRAMS}], "sandbox": "unsafe"}}
    config = RunConfig.model_validate(tree)
    [stage] = set_stages(config).values()
    async with Sandboxes(config.env.sandbox, config.sandbox):
        record = await score(stage.environment, Task(prompt="?", answer="1\n"), ["echo 1"])
        assert record.reward == 1
        for said, words in (("echo 1", ""), ("echo 2", "1.0 was ok, 0.0 ok")):
            found = await _difference(record, [], stage, lambda *_, said=said: ScriptVoice([said]), config)
            assert found.endswith(words) if words else found == ""
