"""What an evaluation says to people."""

import json

from palestra.algo.scores import scores
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.launch.evaluation import show
from palestra.wire.rundir import RunDir


def test_the_rewards_of_seats_stand_below_the_table(tmp_path, capsys):
    """In self-play the table has nothing but 0."""
    played = [
        RolloutRecord(
            rollout_id=number,
            environment="duel",
            task=Task(key=str(number)),
            ending=Ending.OK,
            metrics={"first.won": won, "second.won": -won, "tool_calls": 2.0},
        )
        for number, won in enumerate((1.0, -0.5))
    ]
    run = RunDir(tmp_path)
    run.summary.write_text(json.dumps({"wall_s": 1.0, "sets": {"duel": scores(played)}}))
    show(run, as_json=False)
    said = capsys.readouterr().err
    assert "duel: first.won 0.250, second.won -0.250\n" in said
    assert "tool_calls" not in said
