"""What a class of an environment declares: arguments, rewards, seats."""

import pytest

from palestra.core.errors import UserError
from palestra.env import Agent, Environment, Frozen, Task, metric, reward
from palestra.env.environment import has_group_rewards, scorers, seats


class Letters(Environment):
    alphabet: str
    num_letters: int = 3
    kinds: str | list[str] = "all"
    max_turns = 1

    def tasks(self):
        yield Task(prompt=self.alphabet[: self.num_letters])

    @reward
    def exact(self, task, rollout):
        return 1

    @metric
    def length(self, task, rollout):
        return len(rollout.reply)

    @reward(weight=0.5, group=True)
    def rank(self, task, rollouts):
        return [0 for _ in rollouts]


def test_arguments_are_set_and_defaults_stay():
    made = Letters(split="test", seed=5, alphabet="abcde", kinds=["a", "b"])
    assert (made.split, made.seed, made.alphabet, made.num_letters, made.kinds) == ("test", 5, "abcde", 3, ["a", "b"])
    assert Letters(alphabet="a", system="Be brief.", max_turns=2).max_turns == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"alphabet": "a", "num_leters": 2}, ["'num_leters'", "did you mean 'num_letters'"]),
        ({"alphabet": "a", "zzz": 2}, ["'zzz'", "it has: alphabet, kinds, max_tokens, max_turns"]),
        ({"alphabet": "a", "num_letters": "two"}, ["args.num_letters='two'", "Expected int, got str"]),
        ({"alphabet": "a", "tasks": []}, ["no argument 'tasks'"]),
        ({}, ["Letters", "args.alphabet"]),
    ],
)
def test_wrong_arguments_are_the_users_mistake(args, words):
    with pytest.raises(UserError) as raised:
        Letters(**args)
    for word in words:
        assert word in str(raised.value)


def test_scorers_come_in_the_order_they_are_written_base_first():
    class More(Letters):
        @metric
        def another(self, task, rollout):
            return 0

        def exact(self, task, rollout):  # overridden and not marked: no reward any more
            return 0

    assert [(s.name, s.kind, s.weight, s.group) for s in scorers(Letters)] == [
        ("exact", "reward", 1.0, False),
        ("length", "metric", 1.0, False),
        ("rank", "reward", 0.5, True),
    ]
    assert [s.name for s in scorers(More)] == ["length", "rank", "another"]
    assert has_group_rewards(Letters)
    assert not has_group_rewards(Environment)


def test_a_reward_with_other_parameters_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r"@reward .*bad takes \(self, rollout\); it must take \(self, task, rollout\)"):

        class Wrong(Environment):
            @reward
            def bad(self, rollout):
                return 1


def test_seats_are_the_agents_run_asks_for():
    class Chess(Environment):
        async def run(self, task, white, black: Agent): ...

    class Boxed(Environment):
        async def run(self, task, agent, box: dict): ...

    class Shop(Environment):
        async def run(self, task, seller, buyer: Frozen): ...

    class Alone(Environment):
        async def run(self, task, user: Frozen): ...

    assert dict(seats(Environment)) == {"agent": Agent}
    assert dict(seats(Chess)) == {"white": Agent, "black": Agent}
    assert dict(seats(Shop)) == {"seller": Agent, "buyer": Frozen}
    with pytest.raises(UserError, match="box: dict, which is not an Agent"):
        seats(Boxed)
    with pytest.raises(UserError, match="one of its parameters must train"):
        seats(Alone)
