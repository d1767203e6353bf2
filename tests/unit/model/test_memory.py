import pytest
import torch

from palestra.core.errors import UserError
from palestra.model import memory
from palestra.model.fill import empty_model
from palestra.model.load import read_config
from tests.unit.model import tiny


def test_counts_parameters_without_making_them(tmp_path):
    config = read_config(str(tiny.build(tmp_path)))
    width, vocab, layers = 32, 31, 2
    attention = 2 * width * 8 * (4 + 2) + 2 * 8
    layer = attention + 3 * width * 64 + 2 * width
    assert empty_model(config, experts="grouped_mm").num_parameters() == vocab * width + layers * layer + width


@pytest.mark.parametrize(
    ("free", "frozen", "fits"), [(16, False, True), (15, False, False), (4, True, True), (3, True, False)]
)
def test_the_line_is_weights_gradients_and_two_moments_in_float32(monkeypatch, free, frozen, fits):
    """Of frozen weights it is the weights."""
    num = 1000
    monkeypatch.setattr(memory, "available_bytes", lambda: free * num)
    if fits:
        require(num, frozen=frozen)
    else:
        with pytest.raises(UserError, match=r"raise train\.shard"):
            require(num, frozen=frozen)


def require(
    num: int, *, num_gathered: int = 0, dtype: torch.dtype = torch.float32, num_shards: int = 1, **more
) -> None:
    memory.require_memory(
        num, num_gathered=num_gathered, dtype=dtype, num_shards=num_shards, device=torch.device("cpu"), **more
    )


@pytest.mark.parametrize(
    ("needed", "more"),
    [
        (16 + 2 * 0.1, {}),
        (12 + 2 * 0.1, {"moment_bytes": 4}),  # Muon
        (8 + 2 * 0.1, {"moment_bytes": 0}),  # offloaded
        (2 + 2 * 0.1, {"num_shards": 8}),  # a whole copy in use would be 4
        (16 / 4096 + 2 * 0.1, {"num_shards": 4096}),
    ],
)
def test_of_a_sharded_model_only_what_is_gathered_at_once_is_in_use(monkeypatch, needed, more):
    num = 4_096_000
    for free, fits in ((needed + 0.01, True), (needed - 0.01, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: int(free * num))
        if fits:
            require(num, num_gathered=num // 10, dtype=torch.bfloat16, **more)
        else:
            with pytest.raises(UserError, match=r"raise train\.shard"):
                require(num, num_gathered=num // 10, dtype=torch.bfloat16, **more)


@pytest.mark.parametrize(
    ("owners", "tensors", "expected"),
    [
        (1, 1, 2016 + 2 * (4816 + 6144)),
        (2, 1, 2016 + 9296 + (4816 + 3072)),  # now the dense one is the largest
        (2, 2, 2016 + 2 * (2408 + 3072)),
    ],
)
def test_what_is_gathered_at_once_by_hand(tmp_path, owners, tensors, expected):
    """Of one dense layer (9296) and two with experts (4816 and, of experts, 6144)."""
    model = empty_model(read_config(str(tiny.build(tmp_path, "Glm4MoeForCausalLM"))), experts="grouped_mm")
    layers = model.get_decoder().layers
    assert memory.gathered_at_once(model, layers, owners=owners, tensors=tensors) == expected
    assert model.num_parameters() == 2016 + 9296 + 2 * (4816 + 6144)


def test_reads_what_is_free():
    assert 1 << 20 < memory.available_bytes() < 1 << 45
