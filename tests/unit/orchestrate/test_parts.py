"""State, sources and batcher on their own."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from palestra.algo.shaping import LengthShaping
from palestra.config.schema import Source
from palestra.core.errors import UserError
from palestra.core.metrics import Mean, merge
from palestra.core.records import ChatReply, Ending, PieceCredit, RolloutRecord, Sample, Seat, Span, Task, TurnSpan
from palestra.orchestrate.batcher import BatchRules, SourceRules, baselines, make_batch, moved
from palestra.orchestrate.buffer import length_added, outcome
from palestra.orchestrate.journal import recover
from palestra.orchestrate.report import finished_metrics, trained_metrics
from palestra.orchestrate.sources import TaskSources, seed_for
from palestra.orchestrate.state import (
    Average,
    Cursor,
    Group,
    GroupOpened,
    LoopState,
    Published,
    RolloutEnded,
    SeatReplied,
    SeatReply,
)
from palestra.orchestrate.trainer import Schedule, TrainerLink
from palestra.wire.batches import Batch, decode, encode, equal
from palestra.wire.messages import Finish, Tasks, TrainBatch


def record(
    rollout_id: int, reward: float, *, version: int = 0, ending: Ending = Ending.OK, tokens: int = 2
) -> RolloutRecord:
    sample = Sample(
        token_ids=[9, *range(tokens)],
        logprobs=[0.0] + [-0.25] * tokens,
        sampled=[0] + [1] * tokens,
        spans=(Span(version, 1, 1 + tokens),),
    )
    seats = (Seat(samples=(sample,)),) if ending != Ending.INVALID else ()
    return RolloutRecord(rollout_id=rollout_id, environment="e", task=Task(), ending=ending, reward=reward, seats=seats)


def group(group_id: int, records: list[RolloutRecord]) -> Group:
    size = len(records)
    return Group(group_id=group_id, source="e", task=Task(), size=size, records={r.rollout_id: r for r in records})


OWN = SourceRules(baseline="mean", advantage_scale="none", length=LengthShaping(max_tokens=8), temperature=0.7)
RULES = BatchRules(
    default=OWN,
    max_age=2,
    max_pack_tokens=16,
    num_ranks=1,
    reference_weight=0.0,
    teacher_weight=0.0,
    reward_weight=1.0,
)


def test_advantages_by_hand_and_an_invalid_member_counts_for_nothing():
    members = [record(0, 1.0), record(1, 0.0), record(2, 0.0, ending=Ending.INVALID), record(3, 0.5)]
    batch, _, trained = make_batch([group(0, members)], {}, step=0, attempt=1, rules=RULES)
    assert [r.rollout_id for r in trained] == [0, 1, 3]
    np.testing.assert_allclose(batch.advantage[batch.offsets[:-1]], [0.5, -0.5, 0.0])  # mean of 1, 0, 0.5 is 0.5
    assert set(batch.temperature.tolist()) == {np.float32(0.7)}


def test_a_member_past_the_age_bound_is_left_out_but_counts_in_the_baseline():
    members = [record(0, 1.0, version=5), record(1, 0.0, version=2)]
    batch, _, trained = make_batch([group(0, members)], {}, step=5, attempt=1, rules=RULES)
    assert [r.rollout_id for r in trained] == [0]
    np.testing.assert_allclose(batch.advantage, 0.5)


def told(
    rollout_id: int,
    reward: float,
    *,
    credits: dict[int, float],
    turns: int = 2,
    tokens: int = 1,
    pieces: Sequence[PieceCredit] = (),
) -> RolloutRecord:
    """A turn is so many tokens, after one of the environment's."""
    whole = 1 + tokens
    places = [(turn * whole + 1, (turn + 1) * whole) for turn in range(turns)]
    sample = Sample(
        token_ids=list(range(turns * whole)),
        logprobs=([0.0] + [-0.25] * tokens) * turns,
        sampled=([0] + [1] * tokens) * turns,
        spans=tuple(Span(0, *place) for place in places),
        turns=tuple(TurnSpan(turn, *place) for turn, place in enumerate(places)),
    )
    seats = (Seat(samples=(sample,), credits=credits, piece_credits=tuple(pieces)),)
    return RolloutRecord(
        rollout_id=rollout_id, environment="e", task=Task(), ending=Ending.OK, reward=reward, seats=seats
    )


def test_a_turn_is_not_praised_for_what_was_earned_before_it():
    members = [told(0, 1.0, credits={0: 1.0}), told(1, 0.5, credits={1: 0.5}), told(2, 0.0, credits={}, turns=1)]
    batch, _, _ = make_batch([group(0, members)], {}, step=0, attempt=1, rules=RULES)
    by_rollout = {
        int(batch.rollout[number]): batch.advantage[batch.offsets[number] : batch.offsets[number + 1]][1::2].tolist()
        for number in range(batch.num_samples)
    }
    # turn 0 is compared by the whole returns 1, 0.5, 0; turn 1 by what was earned from it on: 0 and 0.5
    assert by_rollout == {0: [0.5, -0.25], 1: [0.0, 0.25], 2: [-0.5]}


def said_worth(batch: Batch) -> dict[int, list[float]]:
    """By rollout, the advantages of its sampled tokens."""
    parts = zip(batch.rollout.tolist(), batch.offsets[:-1], batch.offsets[1:], strict=True)
    return {i: batch.advantage[start:end][batch.rl_weight[start:end] > 0].tolist() for i, start, end in parts}


def test_tokens_behind_a_piece_are_not_praised_for_it():
    found = told(0, 2.0, credits={0: 1.0}, turns=1, tokens=4, pieces=[PieceCredit(0, 2, 1.0)])
    other = told(1, 0.5, credits={}, turns=1, tokens=4)
    batch, _, _ = make_batch([group(0, [found, other])], {}, step=0, attempt=1, rules=RULES)
    # the turn: 2 and 0.5; behind the piece 1 is left, and of the other, which has none, still 0.5
    assert said_worth(batch) == {0: [0.75, 0.75, 0.25, 0.25], 1: [-0.75] * 4}
    of_turn = told(0, 2.0, credits={0: 1.0}, turns=1, tokens=4)
    batch, _, _ = make_batch([group(0, [of_turn, other])], {}, step=0, attempt=1, rules=RULES)
    assert said_worth(batch) == {0: [0.75] * 4, 1: [-0.75] * 4}


def test_a_piece_of_a_turn_is_of_the_turn_for_those_after_it():
    members = [
        told(0, 1.0, credits={0: 1.0}, tokens=3, pieces=[PieceCredit(0, 2, 0.25), PieceCredit(0, 1, 0.75)]),
        told(1, 0.5, credits={1: 0.5}, tokens=3),
    ]
    batch, _, _ = make_batch([group(0, members)], {}, step=0, attempt=1, rules=RULES)
    # in turn 0: 1, 0.25 and 0 against 0.5; in turn 1: 0 against 0.5
    assert said_worth(batch) == {0: [0.25, -0.125, -0.25, -0.25, -0.25, -0.25], 1: [-0.25] * 3 + [0.25] * 3}


def test_a_late_member_is_compared_behind_as_many_pieces_as_its_group_had():
    one = group(
        0,
        [
            told(0, 1.0, credits={0: 1.0}, turns=1, tokens=3, pieces=[PieceCredit(0, 1, 1.0)]),
            told(1, 0.5, credits={}, turns=1, tokens=3),
            told(
                2, 1.0, credits={0: 0.75}, turns=1, tokens=3, pieces=[PieceCredit(0, 1, 0.5), PieceCredit(0, 2, 0.25)]
            ),
        ],
    )
    first = msgspec.structs.replace(one, records={i: one.records[i] for i in (0, 1)})
    kept = baselines(first, RULES, {})
    assert {key: of.mean for key, of in kept.items()} == {"agent": 0.75, "agent@0": 0.75, "agent@0.1": 0.25}
    late = msgspec.structs.replace(one, settled={0, 1}, baselines=kept)
    batch, _, _ = make_batch([late], {}, step=0, attempt=1, rules=RULES)
    assert said_worth(batch) == {2: [0.25, 0.25, 0.0]}  # of 1, 0.5 and 0.25 that are left


def test_an_average_behind_a_piece_is_one_of_its_own():
    rules = replace(RULES, default=replace(OWN, baseline="moving_average"), average_decay=0.5)
    one = [group(0, [told(0, 1.0, credits={0: 0.5}, turns=1, tokens=2, pieces=[PieceCredit(0, 1, 0.5)])])]
    averages = {name: Average(0.25, 0.25) for name in ("e agent", "e agent@0", "e agent@0.1")}
    batch, _, _ = make_batch(one, {}, step=0, attempt=1, rules=rules, averages=averages)
    assert said_worth(batch) == {0: [0.75, 0.25]}
    assert {name: of.mean for name, of in moved(averages, one, rules).items()} == {
        "e agent": 0.625,
        "e agent@0": 0.625,
        "e agent@0.1": 0.375,
    }


def test_every_environment_of_a_mix_has_rules_of_its_own():
    warm = replace(OWN, temperature=1.5, weight=2.0, length=LengthShaping(max_tokens=2, penalty=1.0))
    groups = [group(0, [record(0, 1.0), record(1, 0.0)]), group(1, [record(2, 1.0), record(3, 0.0, tokens=1)])]
    groups[1] = msgspec.structs.replace(groups[1], source="other")
    batch, _, _ = make_batch(groups, {}, step=0, attempt=1, rules=replace(RULES, sources={"other": warm}))
    of = {
        int(rollout): (round(float(temperature), 6), float(batch.advantage[start]))
        for rollout, temperature, start in zip(batch.rollout, batch.temperature, batch.offsets[:-1], strict=True)
    }
    # rollouts 2 and 3: 1 - 2/2 and 0 - 1/2, so +0.25 and -0.25, twice as heavy
    assert of == {0: (0.7, 0.5), 1: (0.7, -0.5), 2: (1.5, 0.5), 3: (1.5, -0.5)}


def test_without_credit_by_turn_all_turns_have_the_rollouts_advantage():
    members = [told(0, 1.0, credits={}), told(1, 0.0, credits={})]
    batch, _, _ = make_batch([group(0, members)], {}, step=0, attempt=1, rules=RULES)
    assert set(np.abs(batch.advantage).tolist()) == {0.5}


def test_a_member_that_ends_late_is_compared_turn_by_turn_with_what_its_group_had():
    one = group(0, [told(0, 1.0, credits={0: 1.0}), told(1, 0.5, credits={1: 0.5}), told(2, 0.5, credits={0: 0.5})])
    first = msgspec.structs.replace(one, records={i: one.records[i] for i in (0, 1)})
    kept = baselines(first, RULES, {})
    assert {key: of.mean for key, of in kept.items()} == {"agent": 0.75, "agent@0": 0.75, "agent@1": 0.25}
    late = msgspec.structs.replace(one, settled={0, 1}, baselines=kept)
    batch, _, _ = make_batch([late], {}, step=0, attempt=1, rules=RULES)
    assert batch.advantage[1::2].tolist() == [-0.25, -0.25]


PAST = Average(0.25, 0.0725)  # a standard deviation of 0.1


def duel(rollout_id: int, won: float) -> RolloutRecord:
    """Zero-sum: what one seat wins the other loses."""
    (seat,) = record(rollout_id, reward=0.0).seats
    names = {"first": won, "second": -won}
    seats = tuple(msgspec.structs.replace(seat, name=name, rewards={"won": of}) for name, of in names.items())
    return msgspec.structs.replace(record(rollout_id, reward=0.0), seats=seats)


def test_in_self_play_seats_have_rewards_and_signal_though_all_rollouts_are_worth_the_same():
    played = [duel(0, 1.0), duel(1, -0.5)]
    for found, name in ((merge(map(finished_metrics, played)), "finished"), (trained_metrics(played, 3), "trained")):
        rewards = {key: metric for key, metric in found.items() if key.startswith(f"reward/{name}")}
        assert rewards == {
            f"reward/{name}": Mean(0.0, 2),
            f"reward/{name}/first": Mean(0.5, 2),
            f"reward/{name}/second": Mean(-0.5, 2),
        }
    assert outcome(group(0, played), drop_zero_signal=True) == "ready"
    assert outcome(group(0, [duel(0, 1.0), duel(1, 1.0)]), drop_zero_signal=True) == "zero_signal"
    assert not any(key.startswith("reward/finished/") for key in finished_metrics(record(0, 1.0)))


def test_a_moving_average_is_by_environment_and_seat_and_moves_after_the_batch():
    rules = replace(RULES, default=replace(OWN, baseline="moving_average"), average_decay=0.5)
    groups = [group(0, [record(0, 1.0), record(1, 1.0)]), group(1, [record(2, 0.0), record(3, 1.0)])]
    batch, _, _ = make_batch(groups, {}, step=0, attempt=1, rules=rules, averages={"e agent": PAST})
    of_rollout = dict(zip(batch.rollout.tolist(), batch.advantage[batch.offsets[:-1]].tolist(), strict=True))
    assert of_rollout == {0: 0.75, 1: 0.75, 2: -0.25, 3: 0.75}
    averages = moved({"e agent": PAST, "other agent": PAST}, groups, rules)
    assert averages["other agent"] == PAST
    assert averages["e agent"].mean == 0.5 * (0.5 * 0.25 + 0.5 * 1.0) + 0.5 * 0.5
    assert averages["e agent"].square == 0.5 * (0.5 * 0.0725 + 0.5 * 1.0) + 0.5 * 0.5
    assert moved({}, groups[:1], rules) == {"e agent": Average(1.0, 1.0)}
    assert moved({"e agent": PAST}, groups, RULES) == {"e agent": PAST}


def test_a_group_that_trains_in_parts_moves_the_average_once():
    rules = replace(RULES, default=replace(OWN, baseline="moving_average"), average_decay=0.25)
    one = group(0, [record(0, 1.0), record(1, 0.0)])
    early = msgspec.structs.replace(one, records={0: one.records[0]})
    late = msgspec.structs.replace(one, settled={0})
    found = moved(moved({"e agent": PAST}, [early], rules), [late], rules)["e agent"]
    assert found.mean == 0.5 * (0.5 * 0.25 + 0.5 * 1.0) + 0.5 * 0.0


def test_the_past_gives_the_scale_too_and_one_that_never_differed_gives_none():
    std = replace(RULES, default=replace(OWN, baseline="moving_average", advantage_scale="std"))
    one = [group(0, [record(0, 1.0), record(1, 1.0)])]
    batch, _, _ = make_batch(one, {}, step=0, attempt=1, rules=std, averages={"e agent": PAST})
    np.testing.assert_allclose(batch.advantage, 0.75 / 0.1, rtol=1e-6)
    batch, _, _ = make_batch(one, {}, step=0, attempt=1, rules=std, averages={"e agent": Average(0.25, 0.0625)})
    np.testing.assert_allclose(batch.advantage, 0.75)


def test_a_seat_that_was_ever_credited_counts_by_turn_whatever_its_group_is_worth():
    """Else only what succeeds would have turns, and its average would be its own."""
    rules = replace(RULES, default=replace(OWN, baseline="moving_average"))
    half = Average(0.5, 0.5)
    averages = {"e agent": half, "e agent@0": half, "e agent@1": half}
    lost = [group(0, [told(0, 0.0, credits={})])]
    batch, _, _ = make_batch(lost, {}, step=0, attempt=1, rules=rules, averages=averages)
    assert batch.advantage[1::2].tolist() == [-0.5, -0.5]
    assert moved(averages, lost, rules)["e agent@0"].mean < 0.5
    won = [group(0, [told(0, 1.0, credits={0: 1.0})])]
    batch, _, _ = make_batch(won, {}, step=0, attempt=1, rules=rules, averages=averages)
    assert batch.advantage[1::2].tolist() == [0.5, -0.5]


def test_late_members_without_credit_are_compared_turn_by_turn_too():
    one = group(0, [told(0, 1.0, credits={0: 1.0}), told(1, 1.0, credits={0: 1.0}), told(2, 0.0, credits={}, turns=3)])
    first = msgspec.structs.replace(one, records={i: one.records[i] for i in (0, 1)})
    late = msgspec.structs.replace(one, settled={0, 1}, baselines=baselines(first, RULES, {}))
    batch, _, _ = make_batch([late], {}, step=0, attempt=1, rules=RULES)
    assert batch.advantage[1::2].tolist() == [-1.0, 0.0, 0.0]  # of its third turn nobody knows better


def test_credit_at_different_turns_is_signal_though_all_are_worth_the_same():
    members = [told(0, 1.0, credits={0: 1.0}), told(1, 1.0, credits={1: 1.0})]
    assert outcome(group(0, members), drop_zero_signal=True) == "ready"
    assert outcome(group(0, [told(i, 1.0, credits={0: 1.0}) for i in (0, 1)]), drop_zero_signal=True) == "zero_signal"
    by_piece = [told(i, 1.0, credits={0: 1.0}, tokens=4, pieces=[PieceCredit(0, 1 + i, 1.0)]) for i in (0, 1)]
    assert outcome(group(0, [*by_piece, told(2, 1.0, credits={0: 1.0})]), drop_zero_signal=True) == "ready"
    assert outcome(group(0, by_piece), drop_zero_signal=True) == "zero_signal"


def test_a_first_group_has_no_average_and_is_compared_with_itself():
    rules = replace(RULES, default=replace(OWN, baseline="moving_average"))
    batch, _, _ = make_batch([group(0, [record(0, 1.0), record(1, 0.0)])], {}, step=0, attempt=1, rules=rules)
    assert set(batch.advantage.tolist()) == {0.5, -0.5}


def test_what_the_endpoint_of_a_seat_said_is_found_again_until_its_rollout_ends(tmp_path):
    journal = recover(tmp_path, None)
    journal.record(GroupOpened(group_id=0, source="e", task=Task(), size=2, cursor_epoch=0, cursor_taken=1))
    reply = ChatReply(message={"role": "assistant", "content": "hm"}, finish_reason="stop", num_tokens=1)
    journal.record(SeatReplied(rollout_id=0, reply=SeatReply(call=1, prompt_hash=9, reply=reply)))
    journal.close()
    again = recover(tmp_path, None)
    assert again.state.seat_reply_to(0, 1, 9) == reply
    assert [again.state.seat_reply_to(*other) for other in ((1, 1, 9), (0, 0, 9), (0, 1, 8))] == [None] * 3
    again.record(RolloutEnded(record=record(0, 1.0)))
    assert again.state.seat_reply_to(0, 1, 9) is None
    again.close()


def test_a_sample_has_the_version_of_its_oldest_token():
    members = [record(0, 1.0, version=5), record(1, 0.0, version=4)]
    batch, _, _ = make_batch([group(0, members)], {}, step=6, attempt=1, rules=RULES)
    assert batch.version.tolist() == [5, 4]
    assert batch.age.tolist() == [1, 2]


def test_length_is_taken_off_before_advantages_and_the_reward_stays():
    # full is 8 tokens, of which the last 4 cost up to 1; 2 tokens of any cost 0.1
    shaping = LengthShaping(max_tokens=8, penalty=0.4, overlong_tokens=4, overlong_penalty=1.0)
    members = [record(0, 1.0, tokens=2), record(1, 1.0, tokens=6), record(2, 0.0, tokens=4)]
    # 1 - 0.1 = 0.9; 1 - 0.3 - 0.5 = 0.2; 0 - 0.2 = -0.2; their mean is 0.3
    rules = replace(RULES, default=replace(OWN, length=shaping))
    batch, _, trained = make_batch([group(0, members)], {}, step=0, attempt=1, rules=rules)
    np.testing.assert_allclose(batch.advantage[batch.offsets[:-1]], [0.6, -0.1, -0.5], atol=1e-6)
    assert [r.reward for r in trained] == [1.0, 1.0, 0.0]
    assert [length_added(r.seats[0], shaping) for r in trained] == pytest.approx([-0.1, -0.8, -0.2])
    plain, _, _ = make_batch([group(0, members)], {}, step=0, attempt=1, rules=RULES)
    np.testing.assert_allclose(plain.advantage[plain.offsets[:-1]], [1 / 3, 1 / 3, -2 / 3], atol=1e-6)
    equal = group(0, [record(0, 1.0, tokens=2), record(1, 1.0, tokens=6)])
    assert outcome(equal, drop_zero_signal=True) == "zero_signal"  # length alone is no signal


def test_a_batch_survives_the_wire_to_the_bit():
    batch, _, _ = make_batch([group(0, [record(0, 1.0), record(1, 0.0, tokens=7)])], {}, step=1, attempt=2, rules=RULES)
    assert equal(decode(encode(batch)), batch)


async def test_sources_mix_by_weight_cover_every_task_once_per_epoch_and_resume_anywhere():
    async def list_tasks(source, epoch, offset, count):
        names = [f"{source}{i}" for i in range(10)][offset : offset + count]
        return Tasks(request_id=0, tasks=[Task(prompt=n) for n in names], exhausted=offset + count >= 10)

    mix = (Source(id="a", weight=3.0), Source(id="b", weight=1.0))
    sources = TaskSources(mix, list_tasks, seed=1, chunk_tasks=4)
    taken = [await sources.next(group_id) for group_id in range(400)]
    of_a = [task.prompt for label, task, _ in taken if label == "a"]
    assert 0.65 < len(of_a) / 400 < 0.85
    for epoch in range(len(of_a) // 10):
        assert sorted(of_a[10 * epoch : 10 * epoch + 10]) == sorted(f"a{i}" for i in range(10))
    assert of_a[:10] != [f"a{i}" for i in range(10)], "chunks are shuffled"

    for stop in (1, 3, 4, 9, 10, 37, 123):
        cursors: dict[str, Cursor] = {label: cursor for label, _, cursor in taken[:stop]}
        resumed = TaskSources(mix, list_tasks, seed=1, chunk_tasks=4)
        resumed.resume(cursors)
        again = [await resumed.next(group_id) for group_id in range(stop, stop + 30)]
        assert [(a, b.prompt) for a, b, _ in again] == [(a, b.prompt) for a, b, _ in taken[stop : stop + 30]]


async def test_an_environment_that_raises_or_is_empty_is_the_users_to_fix():
    async def raises(source, epoch, offset, count):
        return Tasks(request_id=0, tasks=[], exhausted=True, error="ValueError: no such file words.txt")

    async def empty(source, epoch, offset, count):
        return Tasks(request_id=0, tasks=[], exhausted=True)

    for list_tasks, words in ((raises, "no such file words.txt"), (empty, "has no tasks")):
        with pytest.raises(UserError, match=words):
            await TaskSources((Source(id="a"),), list_tasks, seed=0, chunk_tasks=4).next(0)


async def test_tasks_that_are_refused_are_passed_over_and_a_source_of_nothing_else_is_an_error():
    async def list_tasks(source, epoch, offset, count):
        names = [f"{source}{i}" for i in range(10)][offset : offset + count]
        return Tasks(request_id=0, tasks=[Task(prompt=n) for n in names], exhausted=offset + count >= 10)

    refused = {"a3", "a7"}
    mix = (Source(id="a"),)
    sources = TaskSources(
        mix, list_tasks, seed=1, chunk_tasks=4, refuses=lambda source, task: str(task.prompt) in refused
    )
    taken = [(await sources.next(group_id))[1].prompt for group_id in range(16)]
    for epoch in range(2):
        assert sorted(taken[8 * epoch : 8 * epoch + 8]) == sorted({f"a{i}" for i in range(10)} - refused)
    refused |= {f"a{i}" for i in range(10)}
    with pytest.raises(UserError, match="every task of environment 'a' is quarantined"):
        await sources.next(16)


def test_versions_in_the_journal_never_go_back():
    state = LoopState()
    for version in (3, 3, 5):
        state.apply(Published(version=version))
    with pytest.raises(ValueError, match="version 4 published after version 5"):
        state.apply(Published(version=4))


def test_events_that_cannot_follow_are_refused():
    state = LoopState()
    opened = GroupOpened(group_id=0, source="e", task=Task(), size=2, cursor_epoch=0, cursor_taken=1)
    state.apply(opened)
    with pytest.raises(ValueError, match="group 1 is next"):
        state.apply(opened)
    state.apply(RolloutEnded(record=record(0, 1.0)))
    with pytest.raises(ValueError, match="rollout 0 ended twice"):
        state.apply(RolloutEnded(record=record(0, 1.0)))


def test_an_event_that_cannot_follow_does_not_stay_in_the_journal(tmp_path):
    journal = recover(tmp_path, None)
    journal.record(GroupOpened(group_id=0, source="e", task=Task(), size=2, cursor_epoch=0, cursor_taken=1))
    journal.record(RolloutEnded(record=record(0, 1.0)))
    with pytest.raises(ValueError, match="rollout 0 ended twice"):
        journal.record(RolloutEnded(record=record(0, 1.0)))
    journal.record(RolloutEnded(record=record(1, 0.0)))
    journal.close()
    again = recover(tmp_path, None)
    again.close()
    assert set(again.state.groups[0].records) == {0, 1}


def make_link(next_step: int, *, published: int = -1) -> tuple[TrainerLink, list]:
    sent = []

    async def send(message):
        sent.append(message)

    return TrainerLink(
        send, Schedule(steps=100, publish_every=1, save_every=50), next_step=next_step, published=published
    ), sent


def batch(step: int, *, publish: bool, save: bool = False) -> TrainBatch:
    return TrainBatch(step=step, publish=publish, save=save)


async def test_a_restarted_trainer_gets_the_batches_it_lost_in_order_and_publishes_only_the_last():
    link, sent = make_link(57)
    await link.ready(50)
    assert sent == [batch(s, publish=s == 56) for s in range(50, 57)]


async def test_a_trainer_that_died_beside_the_loop_stages_only_what_engines_do_not_have():
    link, sent = make_link(0)
    await link.ready(0)
    for step in range(3):
        await link.ship(step)
    await link.note_loaded(2)
    link.gone()
    sent.clear()
    await link.ship(3)
    assert sent == [], "there is nobody to hear of it"
    assert not link.has_room(4)
    await link.ready(1)
    assert sent == [batch(1, publish=False), batch(2, publish=True), batch(3, publish=True)]
    assert link.is_outdated(1)
    assert not link.is_outdated(2)
    link.gone()
    await link.finish()
    sent.clear()
    await link.ready(4)
    assert sent == [Finish()]


async def test_a_new_orchestrator_goes_on_with_what_the_living_trainer_staged():
    link, sent = make_link(58, published=56)
    link.note_trained(56)  # said before it was ready, to another orchestrator
    assert not link.has_room(58)
    await link.ready(57, staged=57)
    assert sent == [batch(57, publish=True)]
    assert not link.is_current
    await link.note_loaded(57)
    assert link.is_current


async def test_a_new_orchestrator_does_not_go_back_to_what_a_trainer_staged_that_trains_again():
    link, sent = make_link(58, published=56)
    await link.ready(53, staged=50)
    assert link.is_outdated(50)
    assert sent == [batch(s, publish=s == 57) for s in range(53, 58)]


async def test_a_trainer_that_caught_up_without_staging_is_asked_to_stage():
    link, sent = make_link(58, published=58)
    await link.ready(58, staged=50)
    assert sent == [batch(57, publish=True)]


def test_seeds_depend_on_every_part():
    assert seed_for(1, "a") == seed_for(1, "a")
    assert len({seed_for(1, "a"), seed_for(1, "b"), seed_for(2, "a"), seed_for("1", "a")}) == 4
