"""Layers that keep less for their backward compute the same, and keep what they say."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palestra.config.schema import Train
from palestra.model import offload as offload_module
from palestra.model import recompute as recompute_module
from palestra.model.documents import documents_of
from palestra.model.policy import Policy
from palestra.model.recompute import PLAIN, Activations, keep_activations
from tests.unit.model import tiny

pytestmark = pytest.mark.slow

LENGTHS = [40, 3, 30, 7]
CPU = torch.device("cpu")
WAYS = [
    Activations("none", offload=True),
    Activations("full"),
    Activations("full", offload=True),
    Activations("selective"),
    Activations("selective", offload=True),
]
COMPILED = Activations(compile=True)
FAMILIES = ["Qwen3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM"]
Run = Callable[[str, Activations], dict[str, Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return cache(lambda family, **more: tiny.build(tmp_path_factory.mktemp("models"), family, **more))


@pytest.fixture(scope="module")
def run(models) -> Run:
    """Log-probabilities and gradients, each by its name."""

    def run(family: str, activations: Activations) -> dict[str, Tensor]:
        policy = tiny.unsharded(models(family, num_hidden_layers=3))
        _draw_all(policy)
        keep_activations(policy.decoder_layers, activations, CPU)
        logp = _forward(policy, LENGTHS)
        logp.sum().backward()
        found = {name: parameter.grad for name, parameter in policy.named_parameters()}
        return {"log-probability": logp.detach()} | {name: grad for name, grad in found.items() if grad is not None}

    return cache(run)


def _draw_all(policy: Policy) -> None:
    """No bias is left at zero, where mistakes do not show."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def _forward(policy: Policy, lengths: list[int]) -> Tensor:
    ids = torch.randint(4, 30, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    documents = documents_of(lengths)
    scored = torch.tensor([t for t in range(sum(lengths)) if t not in documents.ends.tolist()])
    return policy(ids, documents, scored, torch.ones(len(scored)))[0]


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_loss_and_gradients_are_equal_to_the_bit(run, family, way):
    assert _equal(run(family, way), run(family, PLAIN))


def test_a_kept_result_that_the_layer_changes_in_place_is_copied(run):
    """gpt-oss adds its biases to the very tensor that a matrix product returned."""
    with patch.object(recompute_module, "_written", lambda *call: ()):
        wrong = run.__wrapped__("GptOssForCausalLM", Activations("selective"))
    assert not _equal(wrong, run("GptOssForCausalLM", PLAIN))


def test_a_layer_is_given_what_it_sent_away_and_nothing_else(run):
    to_device = offload_module._Lane.to_device
    with patch.object(offload_module._Lane, "to_device", lambda lane, host: to_device(lane, host.roll(4))):
        wrong = run.__wrapped__("Qwen3ForCausalLM", Activations("none", offload=True))
    assert not _equal(wrong, run("Qwen3ForCausalLM", PLAIN))


class _Alive(TorchDispatchMode):
    """Storages that operations made, and how often each ran."""

    def __init__(self):
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.name()] += 1
        storages = [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._made += [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
        return out

    def num_bytes(self, policy: Policy) -> int:
        """Without the weights, of which operations return views."""
        weights = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
        alive = {ref.cdata: num for ref, num in self._made if not ref.expired()}
        return sum(num for storage, num in alive.items() if storage not in weights)


def _kept_bytes(path, way: Activations, num_tokens: int) -> tuple[int, int]:
    """Between forward and backward: on the device, and sent to the host."""
    sent: list[int] = []
    to_host = offload_module._Lane.to_host

    def counting(lane, flat):
        sent.append(flat.nbytes)
        return to_host(lane, flat)

    policy = tiny.unsharded(path)
    keep_activations(policy.decoder_layers, way, CPU)
    with patch.object(offload_module._Lane, "to_host", counting), _Alive() as alive:
        logp = _forward(policy, [num_tokens])
        return alive.num_bytes(policy) - sum(sent), sum(sent) if logp.requires_grad else 0


def test_what_two_more_layers_keep_is_counted_by_hand(models):
    tokens, heads, groups, width = 64, 4, 2, 8
    model, inner = tiny.QWEN["hidden_size"], tiny.QWEN["intermediate_size"]
    few, many = (models("Qwen3ForCausalLM", num_hidden_layers=num) for num in (2, 4))

    def of_two_layers(way: Activations) -> tuple[int, int]:
        pairs = zip(_kept_bytes(many, way, tokens), _kept_bytes(few, way, tokens), strict=True)
        return tuple(more - less for more, less in pairs)  # type: ignore[return-value]

    layer_input = 4 * tokens * model
    attention = (heads + 2 * groups) * width + heads * width + heads  # query, key, value; output, sums
    products = 4 * tokens * (attention + model + 2 * inner + model)
    full, selective = of_two_layers(Activations("full")), of_two_layers(Activations("selective"))
    assert full == (2 * layer_input, 0)
    assert selective == (2 * (layer_input + products), 0)
    plain = of_two_layers(PLAIN)
    assert plain[0] > selective[0]
    for way, kept in ((Activations("full"), full), (Activations("selective"), selective), (PLAIN, plain)):
        on_device, on_host = of_two_layers(Activations(way.recompute, offload=True))
        assert on_device <= 2 * 1024 * 4, "small ones stay"
        assert on_device + on_host == kept[0]


def test_a_mixture_of_experts_keeps_less(models):
    path = models("Glm4MoeForCausalLM", num_hidden_layers=3)
    kept = {recompute: _kept_bytes(path, Activations(recompute), 64)[0] for recompute in ("none", "selective", "full")}
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * kept["none"]


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_attention_is_computed_again_only_in_full(models, recompute, times):
    policy = tiny.unsharded(models("Qwen3ForCausalLM", num_hidden_layers=2))
    keep_activations(policy.decoder_layers, Activations(recompute), CPU)
    with _Alive() as alive:
        _forward(policy, [9]).sum().backward()
    assert alive.calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2 * times
    assert (alive.calls["aten::silu"] == 2) == (recompute == "none")


def test_what_went_to_the_host_comes_back_once(models):
    policy = tiny.unsharded(models("Qwen3ForCausalLM", num_hidden_layers=3))
    keep_activations(policy.decoder_layers, Activations(offload=True), CPU)
    loss = _forward(policy, [30]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this is the second"):
        loss.backward()


def test_nothing_is_kept_of_what_has_no_gradient(models):
    policy = tiny.unsharded(models("Qwen3ForCausalLM", num_hidden_layers=2))
    keep_activations(policy.decoder_layers, Activations("selective", offload=True), CPU)
    plain = tiny.unsharded(models("Qwen3ForCausalLM", num_hidden_layers=2))
    with torch.no_grad(), patch.object(offload_module.Offload, "run", None):
        assert torch.equal(_forward(policy, LENGTHS), _forward(plain, LENGTHS))


def test_compiling_and_selecting_do_not_go_together():
    with pytest.raises(ValueError, match=r"set train\.recompute to \"none\""):
        Train(compile=True, recompute="selective")
    assert Train(compile=True, recompute="full").compile


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_compiled_layers_compute_the_same(run):
    """As torch takes them apart into graphs, without the code it makes of those, which takes a minute on a CPU."""
    torch._dynamo.utils.counters.clear()
    plain = run("Qwen3ForCausalLM", PLAIN)
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        found = [run("Qwen3ForCausalLM", way) for way in (COMPILED, Activations("full", offload=True, compile=True))]
    for compiled in found:
        assert compiled.keys() == plain.keys()
        for name, value in plain.items():
            assert (compiled[name] - value).norm() <= 1e-5 * value.norm(), name
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "one layer is like the other"
