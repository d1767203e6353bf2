"""`train.float8`, emulated: rounded to float8 as on a GPU that has it, multiplied as on any."""

import pytest
import torch
from torch import Tensor, nn

from palestra.core.errors import UserError
from palestra.model.documents import documents_of
from palestra.model.float8 import require_float8, use_float8
from palestra.model.policy import Policy
from tests.unit.model import tiny

LENGTHS = [12, 3, 30, 7]


def _policy(path, *, float8: bool) -> Policy:
    policy = tiny.unsharded(path).to(torch.bfloat16)
    if float8:
        use_float8(policy.decoder_layers, keep=policy.routers.modules, emulate=True)
    return policy


def _logps(policy: Policy, lengths: list[int], ids: Tensor) -> Tensor:
    documents = documents_of(lengths)
    scored = torch.tensor([t for t in range(sum(lengths)) if t not in documents.ends.tolist()])
    logp, _ = policy(ids, documents, scored, torch.ones(len(scored)))
    return logp


def _ids() -> Tensor:
    return torch.randint(4, 30, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM"])
def test_it_is_near_and_its_gradients_point_the_same_way(tmp_path, family):
    path = tiny.build(tmp_path, family)
    found = []
    for float8 in (False, True):
        policy = _policy(path, float8=float8)
        logp = _logps(policy, LENGTHS, _ids())
        logp.sum().backward()
        grads = torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])
        found.append((logp.detach(), grads))
    (plain, plain_grads), (rounded, rounded_grads) = found
    assert not torch.equal(plain, rounded), "it is used at all"
    assert float(torch.corrcoef(torch.stack([plain, rounded]))[0, 1]) > 0.98
    assert float(torch.cosine_similarity(plain_grads, rounded_grads, dim=0)) > 0.9


def test_a_product_is_as_near_as_its_three_bits_of_mantissa_allow():
    """Each factor is within 2^-4 of itself, evenly: a norm's error is below that. Control: one bit less."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 128, bias=False)).bfloat16()
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    exact = x.double() @ layer[0].weight.detach().double().T
    assert use_float8([layer], emulate=True) == 1
    error = float((layer(x).detach().double() - exact).norm() / exact.norm())
    assert 0.01 < error < 2**-4
    coarse = x.to(torch.float8_e5m2).double() @ layer[0].weight.detach().to(torch.float8_e5m2).double().T
    assert float((coarse - exact).norm() / exact.norm()) > 2**-4


def test_a_token_does_not_depend_on_what_else_is_in_its_pack(tmp_path):
    """Control: a scale of a whole tensor does."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    path, ids = tiny.build(tmp_path), _ids()
    by_row, by_tensor = _policy(path, float8=True), _policy(path, float8=False)
    for layer in by_tensor.decoder_layers:
        convert_to_float8_training(layer, config=Float8LinearConfig(emulate=True))
    apart = {}
    for name, policy in (("row", by_row), ("tensor", by_tensor)):
        with torch.no_grad():
            alone = torch.cat(
                [_logps(policy, [n], one) for n, one in zip(LENGTHS, ids.split(LENGTHS), strict=True) if n > 1]
            )
            apart[name] = float((_logps(policy, LENGTHS, ids) - alone).abs().max())
    assert apart["row"] < 0.02
    assert apart["tensor"] > 2 * apart["row"]


def test_matrices_of_layers_alone_and_no_router(tmp_path):
    policy = _policy(tiny.build(tmp_path, "Glm4MoeForCausalLM"), float8=True)
    found = {name for name, module in policy.named_modules() if type(module).__name__ == "Float8Linear"}
    linear = {name for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    assert found
    assert linear - found == {"model.lm_head"}
    assert not any("gate" in name.split(".")[-1] and "proj" not in name for name in found)


def test_names_and_weights_are_the_same(tmp_path):
    path = tiny.build(tmp_path)
    plain, rounded = (_policy(path, float8=float8).state_dict() for float8 in (False, True))
    assert plain.keys() == rounded.keys()
    assert all(torch.equal(plain[name], rounded[name]) for name in plain)


def test_a_device_without_it_is_refused():
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 9\.0 .* here is a CPU"):
        require_float8(torch.device("cpu"))
