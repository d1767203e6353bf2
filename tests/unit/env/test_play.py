"""One rollout: endings, limits, seats, forks; what raises is never a reward."""

import asyncio
import time

import msgspec
import pytest

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending, PieceCredit, Reply, RolloutRecord, Sampling, Task
from palestra.env import AgentError, Environment, Frozen, metric, reward, scoring
from palestra.env.chat import Conversation, load_tokenizer, reply
from palestra.env.chat.reply import split_thinking
from palestra.env.play import play, score
from palestra.env.rescore import rescore
from palestra.env.scoring import InvalidRollout, score_group
from palestra.env.voice import PolicyVoice
from tests.unit.env.tiny import last_user_text, policy, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def playing(tokenizer):
    """Play a task with a policy whose replies `speak` makes from the rendered prompt."""

    async def run(environment, task, speak=last_user_text, *, max_tokens=50, max_model_len=200, call=None, seed=0):
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=tokenizer.stop_ids)
        call = call or policy(tokenizer, speak)

        def voice(seat: str) -> PolicyVoice:
            return PolicyVoice(Conversation(tokenizer), call, sampling, max_model_len=max_model_len)

        return await play(environment, task, voice, rollout_id=4, source="echo", seed=seed)

    return run


class Echo(Environment):
    """Reward 1 for saying the prompt."""

    @reward
    def exact(self, task, rollout):
        return rollout.reply == task.prompt

    @metric
    async def length(self, task, rollout):
        await asyncio.sleep(0)
        return len(rollout.reply)


class Countdown(Environment):
    """Goes on until the agent says stop."""

    async def run(self, task, agent):
        message = task.prompt
        while True:
            if await agent(message) == "stop":
                agent.rewards["stopped"] = 1.0
                return
            message = "again"

    @reward(weight=0.5)
    def turns(self, task, rollout):
        return rollout.num_turns


# --- endings


async def test_ok(playing):
    began_at, began = time.time(), time.perf_counter()
    record = await playing(Echo(system="Say it."), Task(prompt="hello", key="k"))
    took_s = time.perf_counter() - began
    assert (record.rollout_id, record.environment, record.task.key) == (4, "echo", "k")
    assert (record.ending, record.reward, record.error) == (Ending.OK, 1.0, "")
    assert (record.rewards, record.metrics) == ({"exact": 1.0}, {"length": 5.0})
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    assert (record.num_turns, record.num_sampled_tokens, record.versions) == (1, 6, (0,))
    assert 0 < record.wall_s <= took_s
    assert began_at + record.wall_s <= record.ended_at + 0.01
    assert record.ended_at <= time.time()


async def test_a_reply_cut_by_max_tokens_is_truncated_and_scored(playing):
    record = await playing(Echo(), Task(prompt="hello"), max_tokens=3)
    assert (record.ending, record.reward, record.metrics) == (Ending.TRUNCATED, 0.0, {"length": 3.0})
    assert "cut off after 3 tokens" in record.error


async def test_a_reply_of_a_given_length_is_whole_and_the_next_one_is_as_ever(playing, tokenizer):
    asked: list[Sampling] = []

    class Measured(Environment):
        async def run(self, task, agent):
            await agent(task.prompt, num_tokens=3)
            await agent("again")

    async def call(token_ids: list[int], sampling: Sampling) -> Reply:
        asked.append(sampling)
        return await policy(tokenizer, lambda prompt: "hello")(token_ids, sampling)

    record = await playing(Measured(), Task(prompt="x"), call=call)
    assert (record.ending, record.num_sampled_tokens) == (Ending.OK, 3 + 6)
    assert [(one.max_tokens, one.ignores_stop) for one in asked] == [(3, True), (50, False)]
    assert asked[0].stop_token_ids == ()
    assert asked[1].stop_token_ids == tokenizer.stop_ids


async def _an_unfinished_thought_is_no_answer(playing):
    record = await playing(Echo(), Task(prompt="x"), lambda prompt: "<think>maybe x", max_tokens=7)
    assert (record.ending, record.metrics) == (Ending.TRUNCATED, {"length": 0.0})
    record = await playing(Echo(), Task(prompt="x"), lambda prompt: "<think>maybe</think>x")
    assert (record.ending, record.reward) == (Ending.OK, 1.0)
    assert record.messages[-1] == {"role": "assistant", "content": "x", "reasoning_content": "maybe"}


async def test_an_unfinished_thought_is_no_answer(playing):
    await _an_unfinished_thought_is_no_answer(playing)


async def test_negative_control_an_unfinished_thought_taken_for_an_answer_is_caught(playing, monkeypatch):
    def lenient(text, **how):
        answer, thought, is_finished = split_thinking(text, **how)
        return answer if is_finished else thought, thought, True

    monkeypatch.setattr(reply, "split_thinking", lenient)
    with pytest.raises(AssertionError):
        await _an_unfinished_thought_is_no_answer(playing)


async def test_max_tokens_is_cut_to_what_the_context_holds(playing, tokenizer):
    asked: list[tuple[int, int]] = []

    async def call(token_ids: list[int], sampling: Sampling) -> Reply:
        asked.append((len(token_ids), sampling.max_tokens))
        return await policy(tokenizer, lambda prompt: "y" * 99)(token_ids, sampling)

    record = await playing(Echo(), Task(prompt="x" * 10), call=call, max_tokens=30, max_model_len=40)
    assert asked == [(15, 25)]  # <bos> u xxxxxxxxxx <eos> <bos> a
    assert (record.ending, record.num_sampled_tokens) == (Ending.TRUNCATED, 25)


async def test_a_prompt_that_does_not_fit_is_truncated_without_a_call(playing):
    record = await playing(Echo(), Task(prompt="x" * 300), speak=lambda prompt: pytest.fail("the engine was asked"))
    assert (record.ending, record.reward, record.num_turns, record.num_sampled_tokens) == (Ending.TRUNCATED, 0.0, 0, 0)
    assert "engine.max_model_len=200" in record.error


async def test_the_turn_limit_ends_run_and_rewards_count(playing):
    record = await playing(Countdown(max_turns=3), Task(prompt="go"), lambda prompt: "no")
    assert (record.ending, record.num_turns, record.reward) == (Ending.TRUNCATED, 3, 1.5)
    assert record.error == "agent has had max_turns=3 turns"
    stopped = await playing(Countdown(max_turns=3), Task(prompt="go"), lambda prompt: "stop")
    assert (stopped.ending, stopped.reward, stopped.rewards) == (Ending.OK, 1.5, {"stopped": 1.0, "turns": 1.0})
    assert stopped.seats[0].rewards == {"stopped": 1.0}


async def test_without_a_turn_limit_the_context_ends_the_rollout(playing):
    record = await playing(Countdown(), Task(prompt="go"), lambda prompt: "no")
    assert record.ending == Ending.TRUNCATED
    assert record.num_turns > 5


async def test_a_rule_the_agent_broke_is_failed_and_scored(playing):
    class Strict(Echo):
        async def run(self, task, agent):
            await agent(task.prompt)
            raise AgentError("illegal move")

    record = await playing(Strict(), Task(prompt="x"))
    assert (record.ending, record.error, record.reward) == (Ending.FAILED, "illegal move", 1.0)


@pytest.mark.parametrize(
    "raised", [ValueError("boom"), SystemExit(2), asyncio.CancelledError(), BaseExceptionGroup("g", [SystemExit()])]
)
async def test_whatever_run_raises_is_invalid(playing, raised):
    class Crashing(Echo):
        async def run(self, task, agent):
            await agent(task.prompt)
            raise raised

    record = await playing(Crashing(), Task(prompt="x"))
    assert (record.ending, record.reward, record.rewards, record.seats) == (Ending.INVALID, 0.0, {}, ())
    assert f"run raised {type(raised).__name__}" in record.error
    assert "raise raised" in record.error  # the line of the author's file
    assert len(record.messages) == 2


async def test_an_author_cannot_swallow_limits_and_failures(playing):
    class Deaf(Echo):
        async def run(self, task, agent):
            for _ in range(20):
                try:
                    await agent(task.prompt)
                except Exception:
                    pass

    async def broken(token_ids, sampling):
        raise InfrastructureError("engine-0 is gone")

    limited = await playing(Deaf(max_turns=2), Task(prompt="x"))
    assert (limited.ending, limited.num_turns) == (Ending.TRUNCATED, 2)
    failed = await playing(Deaf(), Task(prompt="x"), call=broken)
    assert (failed.ending, failed.error) == (Ending.INVALID, "engine-0 is gone")


async def test_an_aborted_reply_is_invalid(playing, tokenizer):
    async def abort(token_ids, sampling):
        return Reply(token_ids=[], logprobs=[], spans=(), finish_reason="abort")

    record = await playing(Echo(), Task(prompt="x"), call=abort)
    assert (record.ending, record.rewards) == (Ending.INVALID, {})
    assert "'abort'" in record.error


async def test_a_cancelled_rollout_is_cancelled(playing):
    async def never(token_ids, sampling):
        await asyncio.Event().wait()

    task = asyncio.create_task(playing(Echo(), Task(prompt="x"), call=never))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- rewards that are none


class Raising(Environment):
    @reward
    def bad(self, task, rollout):
        return {}["missing"]


async def _a_raising_reward_is_invalid() -> None:
    record = await score(Raising(), Task(prompt="x"), ["y"])
    assert (record.ending, record.rewards, record.seats) == (Ending.INVALID, {}, ())
    assert "reward bad raised KeyError: 'missing'" in record.error


async def test_a_reward_that_raises_is_invalid():
    await _a_raising_reward_is_invalid()


async def test_negative_control_a_raising_reward_scored_zero_is_caught(monkeypatch):
    real = scoring._called

    async def swallow(*args):
        try:
            return await real(*args)
        except InvalidRollout:
            return 0.0

    monkeypatch.setattr(scoring, "_called", swallow)
    with pytest.raises(AssertionError):
        await _a_raising_reward_is_invalid()


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), [1.0]])
async def test_a_reward_that_is_no_finite_number_is_invalid(value):
    class Odd(Environment):
        @reward
        def odd(self, task, rollout):
            return value

    record = await score(Odd(), Task(prompt="x"), ["y"])
    assert record.ending == Ending.INVALID
    assert "reward odd is" in record.error


async def test_a_reward_given_in_run_must_be_a_number_and_have_its_own_name():
    class Twice(Echo):
        given: dict = {}

        async def run(self, task, agent):
            await agent(task.prompt)
            agent.rewards.update(self.given)

    assert "'exact' was given in run" in (await score(Twice(given={"exact": 1}), Task(prompt="x"), ["x"])).error
    assert (
        "agent.rewards['own'] is 'a' (str)" in (await score(Twice(given={"own": "a"}), Task(prompt="x"), ["x"])).error
    )
    fine = await score(Twice(given={"own": 2}), Task(prompt="x"), ["x"])
    assert (fine.reward, fine.rewards) == (3.0, {"own": 2.0, "exact": 1.0})


# --- conversations


async def test_replies_a_prompt_quotes_are_not_the_agents(playing):
    task = Task(
        prompt=[
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "quoted"},
            {"role": "user", "content": "2"},
        ]
    )
    seen: list[list[str]] = []

    class Quoting(Environment):
        @reward
        def none(self, task, rollout):
            seen.append(rollout.replies)
            return 0

    await playing(Quoting(system="S"), task, lambda prompt: "mine")
    await score(Quoting(), task, [])
    assert seen == [["mine"], []]


async def test_the_systems_message_stands_first_unless_the_prompt_has_one(playing):
    own = Task(prompt=[{"role": "system", "content": "own"}, {"role": "user", "content": "x"}])
    record = await playing(Echo(system="given"), own)
    assert [message["content"] for message in record.messages] == ["own", "x", "x"]


async def test_later_turns_extend_the_tokens(playing):
    record = await playing(Countdown(max_turns=3), Task(prompt="go"), lambda prompt: "no")
    [seat] = record.seats
    [sample] = seat.samples
    assert sum(sample.sampled) == 3 * len("no.")  # with <eos>
    assert len(sample.logprobs) == len(sample.token_ids) == len(sample.sampled)


async def test_seats_have_conversations_and_rewards_of_their_own(playing):
    class Debate(Environment):
        async def run(self, task, pro, con):
            pro.system, con.system = "for", "against"
            said = await pro(task.prompt)
            await con(said)
            pro.rewards["win"], con.rewards["win"] = 1.0, 0.0

        @reward
        def civil(self, task, rollout):
            return 0.25 * (rollout.reply == task.prompt)

    record = await playing(Debate(), Task(prompt="topic"))
    assert [(seat.name, seat.rewards, len(seat.samples)) for seat in record.seats] == [
        ("pro", {"win": 1.0}, 1),
        ("con", {"win": 0.0}, 1),
    ]
    assert (record.reward, record.rewards) == (0.25, {"civil": 0.25})  # seats keep theirs
    assert record.metrics == {"pro.win": 1.0, "con.win": 0.0}
    [again] = await rescore(Debate(), [record])
    assert (again.reward, again.rewards, again.metrics) == (record.reward, record.rewards, record.metrics)
    assert [message["content"] for message in record.messages] == ["for", "topic", "topic"]


async def test_seats_that_play_at_once_reach_their_limits_together(playing):
    class Parallel(Environment):
        async def run(self, task, one, two):
            async with asyncio.TaskGroup() as group:
                for agent in (one, two):
                    group.create_task(self.talk(task, agent))

        async def talk(self, task, agent):
            while True:
                await agent(task.prompt)

    record = await playing(Parallel(max_turns=2), Task(prompt="x"))
    assert record.ending == Ending.TRUNCATED


async def test_forks_train_under_their_seat_and_share_only_the_past(playing):
    class Branching(Environment):
        async def run(self, task, agent):
            await agent("ab")
            other = agent.fork()
            await agent("left")
            await other("right")
            other.rewards["forked"] = 1.0
            assert other.messages[:2] == agent.messages[:2]

    record = await playing(Branching(), Task())
    assert (record.ending, record.error) == (Ending.OK, "")
    [seat] = record.seats
    assert [sum(sample.sampled) for sample in seat.samples] == [len("ab.left."), len("right.")]
    assert (record.reward, [m["content"] for m in record.messages]) == (1.0, ["ab", "ab", "left", "left"])


async def test_chance_in_run_depends_on_the_rollouts_seed_alone(playing):
    class Dice(Environment):
        async def run(self, task, agent):
            await agent(str(agent.random.random()))

    said = [(await playing(Dice(), Task(), seed=seed)).messages[0]["content"] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


# --- groups


class Ranked(Echo):
    @reward(group=True, weight=2.0)
    async def best(self, task, rollouts):
        longest = max(len(rollout.reply) for rollout in rollouts)
        return (len(rollout.reply) == longest for rollout in rollouts)


async def members(*replies: str) -> list[RolloutRecord]:
    return [await score(Ranked(), Task(prompt="xx"), [text]) for text in replies]


async def test_group_rewards_reach_the_members_that_ended_in_their_order():
    first, second = await members("x", "xx")
    lost = RolloutRecord(rollout_id=9, environment="", task=first.task, ending=Ending.INVALID, error="gone")
    scored = await score_group(Ranked(), [first, lost, second])
    assert scored[1] == lost
    assert [scored[0].rewards, scored[2].rewards] == [{"exact": 0.0, "best": 0.0}, {"exact": 1.0, "best": 1.0}]
    assert [scored[0].reward, scored[2].reward] == [0.0, 3.0]
    assert await score_group(Ranked(), [lost]) == [lost]


async def test_a_group_reward_that_raises_or_miscounts_is_an_error():
    class Miscounting(Echo):
        @reward(group=True)
        def bad(self, task, rollouts):
            return [1.0]

    with pytest.raises(InvalidRollout, match="reward bad returned 1 numbers for 2 rollouts"):
        await score_group(Miscounting(), await members("x", "y"))


class Careless(Environment):
    """Puts into its rollout what no wire carries. `how` is the prompt."""

    async def run(self, task, agent):
        match task.prompt:
            case "key":
                agent.rewards[7] = 1.0
            case "type":
                await agent(Text("hello"))
                return
            case "surrogate":
                await agent("hello")
                agent.messages.append({"role": "user", "content": "\ud83d"})
                return
            case "info":
                task.info["handle"] = object()
        await agent("hello")

    @reward
    def right(self, task, rollout):
        return 10**400 if task.prompt == "huge" else 10**5000 if task.prompt == "longer" else 1.0


class Text(str):
    """As numpy's strings are: msgpack knows no subclass."""


@pytest.mark.parametrize("how", ["key", "type", "surrogate", "info", "huge", "longer"])
async def test_what_cannot_be_sent_makes_the_rollout_invalid_and_nothing_else(playing, how: str):
    record = await playing(Careless(), Task(prompt=how, key=how))
    assert record.ending is Ending.INVALID
    assert "cannot be sent" in record.error or "finite numbers" in record.error
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=RolloutRecord)
    assert (sent.task.key, sent.task.prompt, sent.reward, sent.seats) == (how, how, 0.0, ())
    assert (await playing(Careless(), Task(prompt="fine"))).ending is Ending.OK


@pytest.mark.parametrize(
    ("name", "value"),
    [("rewards", 1.0), ("rewards", None), ("tool_box", None), ("messages", None), ("credits", 3), ("credits", {0: 1})],
)
async def test_an_agent_whose_parts_run_replaced_makes_its_rollout_invalid_and_ends_nothing(playing, name, value):
    class Replacing(Environment):
        async def run(self, task, agent):
            await agent("hello")
            setattr(agent, name, value)

    record = await playing(Replacing(), Task(prompt="x", key="k"))
    assert (record.ending, record.reward, record.seats) == (Ending.INVALID, 0.0, ())
    assert "what run left raised" in record.error or "messages" in record.error
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=RolloutRecord).task.key == "k"


async def test_a_fork_has_a_chance_of_its_own_and_the_same_again(playing):
    drawn: list[float] = []

    class Branches(Environment):
        async def run(self, task, agent):
            await agent(task.prompt)
            first, second = agent.fork(), agent.fork()
            drawn.extend(a.random.random() for a in (agent, first, second, first.fork(), second.fork()))

        @reward
        def one(self, task, rollout):
            return 1.0

    for _ in range(2):
        await playing(Branches(), Task(prompt="hi"), seed=3)
    assert drawn[:5] == drawn[5:]
    assert len(set(drawn)) == 5


# --- seats that do not train, and credit by turn


class Shop(Environment):
    """A seller and a buyer who is only played."""

    system, tools = "Sell.", ()

    async def run(self, task, seller, buyer: Frozen):
        buyer.system = "Buy."
        offer = await seller(task.prompt)
        answer = await buyer(offer)
        seller.rewards["sold"] = float(answer == "yes")
        buyer.rewards["glad"] = 0.5


def by_name(prompt: str) -> str:
    return "yes" if "Buy." in prompt else "apples"


async def test_a_frozen_seat_is_played_and_is_no_part_of_what_trains(playing):
    record = await playing(Shop(), Task(prompt="?"), by_name)
    assert [seat.name for seat in record.seats] == ["seller"]
    assert (record.ending, record.reward, record.rewards) == (Ending.OK, 1.0, {"sold": 1.0})
    assert record.metrics == {"buyer.glad": 0.5}
    assert (record.num_turns, record.num_tokens, record.num_sampled_tokens) == (1, 7, 7)
    assert [message["content"] for message in record.messages] == ["Sell.", "?", "apples"]


async def test_a_seat_that_the_recipe_freezes_keeps_system_and_tools_of_the_environment(tokenizer):
    class Duel(Environment):
        system = "Play."

        async def run(self, task, one, other):
            await one(task.prompt)
            other.rewards["won"] = float(await other("x") == "Play.")

    def voice(seat: str) -> PolicyVoice:
        call = policy(tokenizer, lambda prompt: "Play." if "Play." in prompt else "no")
        return PolicyVoice(Conversation(tokenizer), call, Sampling(stop_token_ids=tokenizer.stop_ids), max_model_len=90)

    record = await play(Duel(), Task(prompt="a"), voice, frozen={"other"})
    assert [seat.name for seat in record.seats] == ["one"]
    assert (record.rewards, record.metrics) == ({}, {"other.won": 1.0})


async def test_credit_is_of_the_turn_that_earned_it_and_tokens_say_their_turn(playing):
    class Steps(Environment):
        async def run(self, task, agent):
            await agent("a")
            agent.credit("found", 0.25)
            fork = agent.fork()
            await fork("bb")
            fork.credit("found", 0.5)
            await agent("ccc")
            agent.rewards["done"] = 1.0

    record = await playing(Steps(), Task())
    (seat,) = record.seats
    assert (seat.rewards, seat.credits, record.reward) == ({"found": 0.75, "done": 1.0}, {0: 0.25, 1: 0.5}, 1.75)
    turns = [(span.turn, span.end - span.start) for sample in seat.samples for span in sample.turns]
    assert sorted(turns) == [(0, 2), (1, 3), (2, 4)]  # what was said, and its end
    for sample in seat.samples:
        said = {place for span in sample.turns for place in range(span.start, span.end)}
        assert said == {place for place, sampled in enumerate(sample.sampled) if sampled}


async def test_forks_that_speak_at_the_same_time_earn_each_for_what_it_said_itself(playing):
    """The planted fault: a last turn that forks share is that of whichever spoke last."""

    class Parallel(Environment):
        async def run(self, task, agent):
            await agent("start")
            agent.fork().credit("inherited", 3.0)
            one, other = agent.fork(), agent.fork()
            await asyncio.gather(one("first"), other("second"))
            one.credit("good", 1.0, of="first")
            other.credit("good", 2.0, of="second")
            agent.credit("good", 0.5, of="start")

    record = await playing(Parallel(), Task())
    assert (record.ending, record.error) == (Ending.OK, "")
    assert record.seats[0].credits == {0: 3.5, 1: 1.0, 2: 2.0}


async def test_credit_of_a_piece_is_of_the_tokens_up_to_its_end(playing):
    class Steps(Environment):
        async def run(self, task, agent):
            await agent("one, two, one, three")
            agent.credit("found", 0.25, of="one")
            agent.credit("found", 0.5, of="two")
            agent.credit("found", 1.0)
            fork = agent.fork()
            await fork("four")
            fork.credit("more", 2.0, of="ou")

    record = await playing(Steps(), Task())
    (seat,) = record.seats
    assert (seat.rewards, seat.credits) == ({"found": 1.75, "more": 2.0}, {0: 1.75, 1: 2.0})
    assert seat.piece_credits == (PieceCredit(0, 13, 0.25), PieceCredit(0, 8, 0.5), PieceCredit(1, 3, 2.0))
    assert seat.cuts(0) == {8: 0.5, 13: 0.25}
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=RolloutRecord)
    assert sent.seats[0].cuts(1) == {3: 2.0}


async def test_credit_of_what_was_not_said_is_a_mistake_with_and_without_a_model(playing):
    class Steps(Environment):
        async def run(self, task, agent):
            await agent("one")
            agent.credit("found", 0.25, of="eno")

    for record in (await playing(Steps(), Task()), await score(Steps(), Task(), ["one"])):
        assert record.ending == Ending.INVALID
        assert "the reply does not say 'eno'" in record.error
    assert (await score(Steps(), Task(), ["enough"])).reward == 0.25


async def test_who_has_said_nothing_earns_nothing(playing):
    class Early(Environment):
        async def run(self, task, agent):
            agent.credit("found", 1.0)

    record = await playing(Early(), Task())
    assert record.ending == Ending.INVALID
    assert "has said nothing" in record.error


async def test_known_answers_may_be_given_by_seat():
    record = await score(Shop(), Task(prompt="?"), {"seller": ["pears"], "buyer": ["yes"]})
    assert (record.reward, record.messages[-1]["content"]) == (1.0, "pears")
    assert (await score(Shop(), Task(prompt="?"), ["pears", "no"])).reward == 0.0


async def test_a_cut_context_begins_anew_and_what_was_said_before_trains(playing):
    heard: list[str] = []

    def speak(prompt: str) -> str:
        heard.append(prompt)
        return f"r{len(heard)}"

    class Long(Environment):
        system, max_turns = "S.", 3

        async def run(self, task, agent):
            await agent("aaa")
            assert agent.reply == "r1"
            agent.compact("so far")
            assert agent.reply == "r1"
            await agent("bbb")
            await agent("ccc")
            await agent("too many")

        @reward
        def last(self, task, rollout):
            return rollout.replies == ["r2", "r3"]

    record = await playing(Long(), Task(), speak)
    assert (record.ending, record.reward) == (Ending.TRUNCATED, 1.0)
    assert ["aaa" in prompt for prompt in heard] == [True, False, False]
    assert ["so far" in prompt and "S." in prompt for prompt in heard] == [False, True, True]
    samples = record.seats[0].samples
    assert [[span.turn for span in sample.turns] for sample in samples] == [[0], [1, 2]]
    assert record.num_sampled_tokens == 3 * 3
