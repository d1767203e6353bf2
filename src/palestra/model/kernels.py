"""What computes attention over a pack: the fastest kernel that this device and this torch have for it.

`varlen` is torch's variable-length kernel, half precision on CUDA; `flex` knows caps, sinks and values of another width
too; `padded` runs anywhere. Each is tried once, when it is the fastest that a model may take: that is when a policy is
checked. A pack's documents remember which were taken.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from palestra.core.errors import UserError
from palestra.model import flex, padded
from palestra.model.context import Scores
from palestra.model.documents import Documents, documents_of
from palestra.model.ring import is_half_on_cuda, told_of_groups


def attend_whole(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Over the documents of a whole pack, [T, H, D]: by the first of the context's kernels that can, or its last."""
    is_plain = scores.is_plain and q_THD.shape[-1] == v_TGD.shape[-1] and is_half_on_cuda(q_THD)
    known = documents.context.kernels
    usable = (name for name in known[:-1] if _fits(name, is_plain) and not why_not(name, q_THD.device))
    name = next(usable, known[-1])
    documents.taken.add(name)
    return _ATTEND[name](q_THD, k_TGD, v_TGD, documents, scores)


def known_kernels(device: torch.device, wanted: str = "auto") -> tuple[str, ...]:
    """Names, fastest first. `padded` works anywhere, the others are tried when they are first needed.

    Errors: UserError, if the one that is wanted does not work.
    """
    if wanted not in ("auto", "padded") and (reason := why_not(wanted, device)):
        raise UserError(f"train.attention={wanted!r} does not work here: {reason}; leave it at 'auto'")
    return tuple(name for name in _ATTEND if wanted in ("auto", name) or name == "padded")


def missing_kernels(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Those of `names` that do not work here, and why."""
    return {name: reason for name in names if (reason := why_not(name, device))}


@cache
def why_not(name: str, device: torch.device) -> str:
    """Empty, if it computes a small pack forward and backward."""
    if device.type != "cuda":
        return "it needs a GPU"
    try:
        with torch.enable_grad():
            _try(name, device)
    except Exception as error:  # a compiler, a driver or a library that is missing: each raises its own
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"
    return ""


def _fits(name: str, is_plain: bool) -> bool:
    return name != "varlen" or is_plain


def _try(name: str, device: torch.device) -> None:
    q, k, v = (torch.randn(300, heads, 64, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    out = _ATTEND[name](q, k, v, documents_of([170, 130], device), Scores(0.1, window=64))
    out.float().square().sum().backward()
    torch.cuda.synchronize(device)


def _varlen(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = scores.window
    out = varlen_attn(
        q_THD.contiguous(),
        k_TGD.contiguous(),
        v_TGD.contiguous(),
        documents.ends,
        documents.ends,
        documents.longest,
        documents.longest,
        scale=scores.scaling,
        window_size=(window - 1 if window is not None and window < documents.longest else -1, 0),
        **told_of_groups(q_THD, k_TGD),
    )
    assert isinstance(out, Tensor)
    return out


_ATTEND = {"varlen": _varlen, "flex": flex.attend, "padded": padded.attend}
