"""What computes attention over a pack: the fastest kernel that this device and this torch have for it.

`varlen` is torch's variable-length kernel, half precision on CUDA; `flex` knows caps, sinks and values of another width
too; `padded` runs anywhere. Which there are is tried once, when the trainer starts; a pack's documents remember which
were taken.
"""

import torch
from torch import Tensor

from palestra.core.errors import UserError
from palestra.model import flex, padded
from palestra.model.context import Scores
from palestra.model.documents import Documents, documents_of
from palestra.model.ring import is_half_on_cuda


def attend_whole(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Over the documents of a whole pack, [T, H, D]."""
    is_plain = scores.is_plain and q_THD.shape[-1] == v_TGD.shape[-1] and is_half_on_cuda(q_THD)
    name = next(name for name in documents.context.kernels if name != "varlen" or is_plain)
    documents.taken.add(name)
    return _ATTEND[name](q_THD, k_TGD, v_TGD, documents, scores)


def usable_kernels(device: torch.device, wanted: str = "auto") -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of those that work here, fastest first, and of those that do not, why. `padded` always does.

    Errors: UserError, if the one that is wanted does not.
    """
    tried = [name for name in ("varlen", "flex") if wanted in ("auto", name)]
    why = {name: _why_not(name, device) if device.type == "cuda" else "it needs a GPU" for name in tried}
    missing = {name: reason for name, reason in why.items() if reason}
    if wanted in missing:
        raise UserError(f"train.attention={wanted!r} does not work here: {missing[wanted]}; leave it at 'auto'")
    return (*(name for name in tried if name not in missing), "padded"), missing


def _why_not(name: str, device: torch.device) -> str:
    """Empty, if it computes a small pack forward and backward."""
    q, k, v = (torch.randn(300, heads, 64, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    try:
        out = _ATTEND[name](q, k, v, documents_of([170, 130], device), Scores(0.1, window=64))
        out.float().square().sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler, a driver or a library that is missing: each raises its own
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no words'}"
    return ""


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
        enable_gqa=q_THD.shape[1] != k_TGD.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


_ATTEND = {"varlen": _varlen, "flex": flex.attend, "padded": padded.attend}
