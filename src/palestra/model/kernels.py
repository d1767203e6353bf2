"""What computes attention over a pack: the fastest kernel that this device and this torch have for it.

`varlen` is torch's variable-length kernel, half precision on CUDA; `cudnn` the same with another kernel for long
documents; `flex` knows caps, sinks and values of another width
too; `padded` runs anywhere. Each is tried once, when it is the fastest that a model may take: that is when a policy is
checked. A pack's documents remember which were taken.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from palestra.core.errors import UserError
from palestra.model import cudnn, flex, padded, varlen
from palestra.model.context import Scores
from palestra.model.documents import Documents, documents_of


def attend_whole(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Over the documents of a whole pack, [T, H, D]: by the first of the context's kernels that can, or its last."""
    known, is_equal = documents.context.kernels, q_THD.shape[-1] == v_TGD.shape[-1]
    is_plain = scores.is_plain and is_equal and varlen.is_half_on_cuda(q_THD)
    fitting = (name for name in known[:-1] if _fits(name, is_plain, q_THD.shape[-1], scores.window))
    usable = (name for name in fitting if not why_not(name, q_THD.device))
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


def _fits(name: str, is_plain: bool, width: int, window: int | None) -> bool:
    if name == "cudnn":
        return is_plain and window is None and width <= cudnn.WIDEST and width % 8 == 0
    return name != "varlen" or is_plain


def _try(name: str, device: torch.device) -> None:
    """Errors: whatever a kernel raises; RuntimeError, if it computes something else."""
    if name == "cudnn" and torch.cuda.get_device_capability(device) < (9, 0):
        raise RuntimeError("it is the faster one from compute capability 9.0 on")
    inputs = [torch.randn(300, heads, 64, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
    documents = documents_of([170, 130], device)
    scores = Scores(0.1, window=None if name == "cudnn" else 64)
    attend = partial(cudnn.attend, long_tokens=150) if name == "cudnn" else _ATTEND[name]
    found, expected = (_with_gradients(way, inputs, documents, scores) for way in (attend, padded.attend))
    for one, other in zip(found, expected, strict=True):
        if not torch.allclose(one, other, rtol=0.05, atol=0.05 * float(other.abs().max())):
            raise RuntimeError("it computes something else")


def _with_gradients(
    attend: Callable[..., Tensor], inputs: Sequence[Tensor], documents: Documents, scores: Scores
) -> list[Tensor]:
    out = attend(*inputs, documents, scores)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


_ATTEND = {"cudnn": cudnn.attend, "varlen": varlen.attend, "flex": flex.attend, "padded": padded.attend}
