"""The packed attention equals plain attention on each document alone, forward and backward."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from palestra.core.errors import UserError
from palestra.model import cudnn, kernels, padded
from palestra.model.attention import packed_attention
from palestra.model.context import Context, Scores
from palestra.model.documents import documents_of
from palestra.model.flex import BLOCK_TOKENS, block_mask
from palestra.model.kernels import attend_whole, known_kernels, missing_kernels

# flex runs by torch's slow reference here
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

LENGTHS = [[5], [1, 1, 2], [7, 3, 7], [70, 3, 40, 33, 9], [16] * 5]
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def _inputs(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, num_tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One document [1, H, L, D] with a loop over queries: the definition."""
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    rows = []
    for t in range(q.shape[2]):
        first = 0 if window is None else max(0, t - window + 1)
        scores = (q[0, :, t, None] * k[0, :, first : t + 1]).sum(-1) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None].to(scores.dtype)], dim=1)
        share = scores.softmax(-1)[:, : t + 1 - first]
        rows.append((share[..., None] * v[0, :, first : t + 1]).sum(1))
    return torch.stack(rows)[None]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"),
    [(None, None, False), (4, None, False), (None, 0.7, False), (None, None, True), (3, 0.7, True)],
)
@pytest.mark.parametrize("kernel", ["padded", "flex"])
def test_equals_attention_on_each_document(lengths, window, softcap, with_sinks, kernel):
    q, k, v = _inputs(sum(lengths))
    if kernel == "flex":  # its gradients are for GPUs alone: tests/gpu/test_packed_attention.py
        q, k, v = (x.detach() for x in (q, k, v))
    sinks = torch.tensor([0.1, -0.5, 1.0, 2.0]) if with_sinks else None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    out, _ = packed_attention(
        nn.Module(),
        q,
        k,
        v,
        None,
        documents=documents_of(lengths, context=Context((kernel,))),
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = torch.cat(
        [_by_hand(*(x[:, :, a:b] for x in (q, k, v)), **options) for a, b in pairwise(ends)],
        dim=1,
    )
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if softcap or with_sinks else {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(out, expected, **tolerance)
    if kernel == "flex":
        return
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    grads = torch.autograd.grad((out * direction).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **tolerance)


def test_documents_do_not_see_each_other():
    """To the bit: another document's tokens change nothing, although they lie in the same group."""
    lengths = [9, 12, 11]
    q, k, v = _inputs(sum(lengths))
    other = [x.detach().clone() for x in (q, k, v)]
    for x in other:
        x[:, :, 9:21] += 5.0  # the second document
    outs = [packed_attention(nn.Module(), *x, None, documents=documents_of(lengths))[0] for x in ((q, k, v), other)]
    assert torch.equal(outs[0][:, :9], outs[1][:, :9])
    assert torch.equal(outs[0][:, 21:], outs[1][:, 21:])
    assert not torch.equal(outs[0][:, 9:21], outs[1][:, 9:21])


def test_positions_restart_with_each_document():
    assert documents_of([3, 1, 2]).positions.tolist() == [[0, 1, 2, 0, 0, 1]]


def test_layout_wastes_little_on_unequal_lengths():
    """One document of 1000 tokens does not pad a hundred of 10 to its length."""
    documents = documents_of([1000, *[10] * 100])
    assert documents.source.numel() == 2000
    assert sorted(documents.groups) == [(1, 1000), (100, 10)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_token_has_one_slot(lengths):
    documents = documents_of(lengths)
    assert documents.source[documents.slot].tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"documents": None}, "documents"),
    ],
)
def test_refuses_what_it_does_not_honour(arguments, said):
    q, k, v = _inputs(3)
    with pytest.raises(ValueError, match=said):
        packed_attention(nn.Module(), q, k, v, None, **{"documents": documents_of([3]), **arguments})


def test_refuses_a_mask():
    q, k, v = _inputs(3)
    with pytest.raises(ValueError, match="mask"):
        packed_attention(nn.Module(), q, k, v, torch.ones(3, 3), documents=documents_of([3]))


def test_an_empty_document_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        documents_of([3, 0])


@pytest.mark.parametrize("window", [None, 40, 130, 300])
def test_blocks_that_flex_skips_hold_nothing_and_those_it_takes_whole_hold_all(window):
    """Against the mask written out, over documents that begin and end within blocks and one that spans several."""
    lengths = [5, 300, 1, 128, 700, 60]
    documents = documents_of(lengths)
    num, window = sum(lengths), window or documents.longest
    mask = block_mask(documents.ends, len(documents.slot), window)
    at = torch.arange(num)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = at[:, None] - at
    seen = (distance >= 0) & (distance < window) & (document[:, None] == document)
    said = mask.mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    assert torch.equal(said, seen)
    padded = torch.nn.functional.pad(seen, (0, -num % BLOCK_TOKENS, 0, -num % BLOCK_TOKENS))
    blocks = padded.unflatten(1, (-1, BLOCK_TOKENS)).unflatten(0, (-1, BLOCK_TOKENS)).transpose(1, 2)
    some, whole = blocks.flatten(2).any(-1), blocks.flatten(2).all(-1)
    partly, fully = (torch.zeros_like(some) for _ in range(2))
    assert mask.full_kv_indices is not None
    assert mask.full_kv_num_blocks is not None
    for found, counts, indices in (
        (partly, mask.kv_num_blocks, mask.kv_indices),
        (fully, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            found[row, indices[0, 0, row, :count].long()] = True
    assert torch.equal(fully, whole)
    assert not (some & ~(partly | fully)).any()  # nothing seen is skipped
    assert (partly & ~some).sum() <= len(lengths)  # and next to nothing computed for nothing


def test_values_may_have_another_width_than_keys():
    q, k = (x.detach() for x in _inputs(12)[:2])
    v = torch.randn(1, KEY_HEADS, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    outs = [
        packed_attention(nn.Module(), q, k, v, None, documents=documents_of([7, 5], context=Context((kernel,))))[0]
        for kernel in ("padded", "flex")
    ]
    torch.testing.assert_close(*outs, atol=1e-10, rtol=1e-10)


def test_the_fastest_kernel_that_works_is_taken_and_the_others_are_told_with_the_reason():
    cpu = torch.device("cpu")
    assert known_kernels(cpu) == ("cudnn", "varlen", "flex", "padded")
    assert known_kernels(cpu, "padded") == ("padded",)
    with pytest.raises(UserError, match=r"train\.attention='flex' does not work here: it needs a GPU"):
        known_kernels(cpu, "flex")
    documents = documents_of([5, 3], context=Context(known_kernels(cpu)))
    attend_whole(*(torch.randn(8, 2, 4) for _ in range(3)), documents, Scores(1.0))
    assert documents.taken == {"padded"}
    assert missing_kernels(("varlen", "flex"), cpu) == {"varlen": "it needs a GPU", "flex": "it needs a GPU"}


def test_long_documents_are_taken_alone_and_those_between_them_together():
    assert list(cudnn._runs((3, 9, 9, 2, 1, 8), 8)) == [
        (0, 1, False),
        (1, 2, True),
        (2, 3, True),
        (3, 5, False),
        (5, 6, True),
    ]
    assert list(cudnn._runs((3, 2), 8)) == [(0, 2, False)]


@pytest.mark.parametrize("longest", [0, 7, 100])
def test_documents_one_by_one_and_together_make_what_they_make_in_batches(monkeypatch, longest):
    """With the kernels of a GPU replaced by ones that run here: how they are cut and put together."""
    lengths = [3, 9, 9, 2, 1, 8]
    q, k, v = (torch.randn(sum(lengths), heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    documents, scores = documents_of(lengths), Scores(0.3)

    def some(q, k, v, ends, longest, scores):
        assert longest == max(ends.diff().tolist())
        return padded.attend(q, k, v, documents_of(ends.diff().tolist()), scores)

    monkeypatch.setattr(cudnn, "attend_some", some)
    monkeypatch.setattr(cudnn, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    found = cudnn.attend(q, k, v, documents, scores, long_tokens=longest)
    torch.testing.assert_close(found, padded.attend(q, k, v, documents, scores))


def test_kernels_slower_than_the_one_that_is_taken_are_never_tried(monkeypatch):
    """One that is compiled when it is tried costs half a minute."""
    tried = []
    monkeypatch.setattr(kernels, "why_not", lambda name, device: tried.append(name) or "")
    monkeypatch.setattr(kernels, "_fits", lambda name, *_: name != "cudnn")
    monkeypatch.setitem(kernels._ATTEND, "varlen", lambda q, *_: q)
    documents = documents_of([5, 3], context=Context(("varlen", "flex", "padded")))
    for _ in range(2):
        attend_whole(*(torch.randn(8, 2, 4) for _ in range(3)), documents, Scores(1.0))
    assert documents.taken == {"varlen"}
    assert set(tried) == {"varlen"}
