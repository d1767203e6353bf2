import pytest
import torch

from palestra.core.errors import UserError
from palestra.model import memory
from palestra.model.load import read_config
from tests.unit.model import tiny


def test_counts_parameters_without_making_them(tmp_path):
    config = read_config(str(tiny.build(tmp_path)))
    width, vocab, layers = 32, 31, 2
    attention = 2 * width * 8 * (4 + 2) + 2 * 8
    layer = attention + 3 * width * 64 + 2 * width
    assert memory.count_parameters(config) == vocab * width + layers * layer + width


@pytest.mark.parametrize(
    ("free", "frozen", "fits"), [(16, False, True), (15, False, False), (4, True, True), (3, True, False)]
)
def test_the_line_is_weights_gradients_and_two_moments_in_float32(tmp_path, monkeypatch, free, frozen, fits):
    """Of frozen weights it is the weights."""
    config = read_config(str(tiny.build(tmp_path)))
    num = memory.count_parameters(config)
    monkeypatch.setattr(memory, "available_bytes", lambda: free * num)
    if fits:
        memory.require_memory(config, dtype=torch.float32, num_shards=1, device=torch.device("cpu"), frozen=frozen)
    else:
        with pytest.raises(UserError, match=r"raise train\.shard"):
            memory.require_memory(config, dtype=torch.float32, num_shards=1, device=torch.device("cpu"), frozen=frozen)


def test_reads_what_is_free():
    assert 1 << 20 < memory.available_bytes() < 1 << 45
