import pytest

from palestra.config.schema import Train
from palestra.core.errors import UserError
from palestra.train.ranks import join


@pytest.mark.parametrize(("replicate", "shard", "started"), [(1, 2, None), (2, 2, "2"), (1, 1, "2")])
def test_the_wrong_number_of_ranks_is_the_users_error(monkeypatch, replicate, shard, started):
    if started is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(
        UserError, match=f"needs {replicate * shard} ranks, but {started or 1} were started; start with"
    ):
        join(Train(replicate=replicate, shard=shard), deadline_s=10)


def test_one_rank_is_all_ranks(ranks):
    assert ranks.is_first
    assert ranks.from_first("message") == "message"
