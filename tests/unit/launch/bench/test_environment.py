"""Forced lengths: what is asked of the engine is what the law says, and the bare client asks for the same."""

from pathlib import Path

from tests.unit.env.tiny import answer, save_tokenizer

from palestra.config import load
from palestra.core.records import Ending, Reply, Sampling
from palestra.env.chat import Conversation, load_tokenizer
from palestra.env.play import play
from palestra.env.voice import PolicyVoice
from palestra.launch.bench.environment import ForcedLengths
from palestra.launch.bench.lead import asks_of
from palestra.launch.bench.loop import RECIPE
from palestra.orchestrate.sources import seed_for

ENVIRONMENT = ForcedLengths(median_tokens=8, prompt_tokens=5)


async def played(tmp_path: Path, seed: int, *, max_model_len: int = 500):
    tokenizer, asked = load_tokenizer(save_tokenizer(tmp_path)), []

    async def call(token_ids: list[int], sampling: Sampling) -> Reply:
        asked.append((token_ids, sampling))
        return answer(tokenizer, ("az" * 999)[: sampling.max_tokens - 1], sampling)

    def voice(seat: str) -> PolicyVoice:
        sampling = Sampling(max_tokens=400, stop_token_ids=tokenizer.stop_ids)
        return PolicyVoice(Conversation(tokenizer), call, sampling, max_model_len=max_model_len)

    record = await play(ENVIRONMENT, next(ENVIRONMENT.tasks()), voice, seed=seed)
    return record, asked


async def test_a_reply_has_the_length_of_its_rollout(tmp_path: Path):
    for seed in range(8):
        record, [(_, sampling)] = await played(tmp_path, seed)
        assert (sampling.ignores_stop, sampling.stop_token_ids) == (True, ())
        assert record.num_sampled_tokens == sampling.max_tokens
        assert record.ending == Ending.OK  # as long as asked: not cut


async def test_a_reply_that_the_context_cuts_short_is_truncated(tmp_path: Path):
    lengths = {}
    for seed in range(8):
        _, [(_, lengths[seed])] = await played(tmp_path, seed)
    longest = max(lengths, key=lambda seed: lengths[seed].max_tokens)
    record, _ = await played(tmp_path, longest, max_model_len=12)
    assert record.ending == Ending.TRUNCATED


async def test_the_bare_client_asks_for_what_the_loop_asks(tmp_path: Path):
    args = "{prompt_tokens=5, median_tokens=8}"
    mix = f'env.mix=[{{id="palestra.launch.bench.environment:ForcedLengths", name="forced", args={args}}}]'
    config = load(RECIPE, [mix, "algo.group_size=4", "train.seed=3"]).config
    asks = await asks_of(config, load_tokenizer(save_tokenizer(tmp_path)), 2)
    assert len(asks) == 8
    assert len({ask.num_tokens for ask in asks}) > 3
    assert [ask.token_ids == asks[0].token_ids for ask in asks] == [True] * 4 + [False] * 4
    for rollout_id, ask in enumerate(asks):
        record, _ = await played(tmp_path, seed_for(3, "play", rollout_id))
        assert record.num_sampled_tokens == ask.num_tokens
        assert ask.seed == seed_for(3, rollout_id // 4, 0) + rollout_id % 4
