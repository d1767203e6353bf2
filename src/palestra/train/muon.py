"""Muon: momentum, orthogonalised matrix by matrix. Whatever the layout of the ranks, whole matrices are orthogonalised.

Legend: B matrices of one shape, a x b each; E experts.

A parameter of two dimensions is one matrix, one of three a matrix per expert. Experts that keep gate and up in one
parameter have two matrices each, as they have in a checkpoint: fusing them for the grouped product changes nothing.
Matrices that are whole on a rank are done there (experts sharded by expert); all others are dealt over the ranks
(`exchange`). Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale: Liu et al. 2025, arXiv:2502.16982;
dealing whole matrices by all-to-all: Ahn et al. 2025, arXiv:2504.05295, and arXiv:2512.16144.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_group_rank, get_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from palestra.core.errors import PalestraError
from palestra.model.holdings import Holding, holdings, is_sharded
from palestra.train.exchange import ROUND_ELEMENTS, Exchange, Index, Matrix, cut, group_of
from palestra.train.moments import Home, local

QUINTIC = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
_NO_MATRIX = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Scale = Literal["match_adamw", "spectral"]
Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Stored:
    """How a parameter holds its matrices: as [out, in] or transposed, `num` of them side by side."""

    num: int = 1
    interleaved: bool = False  # taking turns, rather than one after the other
    transposed: bool = False  # [in, out]

    def matrices(self, shape: Sequence[int]) -> list[tuple[slice, slice]]:
        """Rows and columns of each."""
        size = shape[-1] if self.transposed else shape[-2]
        if self.interleaved:
            outs = [slice(part, size, self.num) for part in range(self.num)]
        else:
            outs = [slice(part * size // self.num, (part + 1) * size // self.num) for part in range(self.num)]
        return [(slice(0, shape[-2]), out) if self.transposed else (out, slice(0, shape[-1])) for out in outs]

    def scale(self, shape: Sequence[int], rule: Scale) -> float:
        """What an orthogonal update of a matrix of the parameter is multiplied with, beside the learning rate.

        `match_adamw`: its root mean square is about that of AdamW's, 0.2, so that both share one learning rate.
        `spectral`: sqrt(out / in), where there are more outputs than inputs.
        """
        out, into = (shape[-1], shape[-2]) if self.transposed else (shape[-2], shape[-1])
        out //= self.num
        return 0.2 * math.sqrt(max(out, into)) if rule == "match_adamw" else math.sqrt(max(1.0, out / into))


def matrices_of(layers: Sequence[nn.Module]) -> dict[nn.Parameter, Stored]:
    """What Muon trains of decoder layers: all matrices but embeddings; not vectors, biases, or matrices of one row.

    Routers are among them, as in GLM-4.5 (arXiv:2508.06471) and INTELLECT-3. How experts are stored, they say
    themselves: transformers marks every module that its experts registry can replace.
    """
    found: dict[nn.Parameter, Stored] = {}
    for layer in layers:
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and _is_matrix(module, name, parameter):
                    found.setdefault(parameter, _stored(module, name, parameter))
    return found


def _is_matrix(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if isinstance(module, _NO_MATRIX) or name.endswith("bias") or parameter.dim() not in (2, 3):
        return False
    return min(parameter.shape[-2:]) > 1


def _stored(module: nn.Module, name: str, parameter: Tensor) -> Stored:
    if parameter.dim() != 3:
        return Stored()
    is_pair = name == "gate_up_proj" and getattr(module, "has_gate", False)
    return Stored(
        num=2 if is_pair else 1,
        interleaved=is_pair and not getattr(module, "is_concatenated", True),
        transposed=getattr(module, "is_transposed", False),
    )


def orthogonalize(matrices_Bab: Tensor, *, steps: int) -> Tensor:
    """The nearest matrix with all singular values 1, roughly: they are in 0.7 to 1.2 after 5 steps, unless tiny.

    By Newton-Schulz steps of the quintic polynomial that lifts small singular values fastest, in the dtype given.
    """
    is_tall = matrices_Bab.shape[-2] > matrices_Bab.shape[-1]
    x_Bab = matrices_Bab.mT if is_tall else matrices_Bab
    x_Bab = x_Bab / torch.linalg.vector_norm(x_Bab, dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram_Baa = x_Bab @ x_Bab.mT
        polynomial_Baa = torch.baddbmm(gram_Baa, gram_Baa, gram_Baa, beta=b, alpha=c)
        x_Bab = torch.baddbmm(x_Bab, polynomial_Baa, x_Bab, beta=a)
    return x_Bab.mT if is_tall else x_Bab


def working_dtype(parameter: Tensor) -> torch.dtype:
    """In which matrices travel and are orthogonalised: rounding to it first loses what the iteration loses anyway."""
    if parameter.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if parameter.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Update:
    """One parameter's shard in a step."""

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    scale: float


@dataclass(frozen=True)
class Updates:
    """What one step does to parts of shards. `settings`: the optimizer's group."""

    settings: Mapping[str, Any]
    home: Home

    def directions(self, parts: Sequence[tuple[Update, Index]]) -> Tensors:
        """Move the momenta of these parts on, and return what is to be orthogonalised. Once a step."""
        momentum, gradients = self.settings["momentum"], [update.gradient[index] for update, index in parts]
        with self.home.borrow([update.momentum[index] for update, index in parts], gradients[0].device) as averages:
            torch._foreach_lerp_(averages, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
            if self.settings["nesterov"]:
                return torch._foreach_lerp(gradients, averages, momentum)  # pyright: ignore[reportPrivateImportUsage]
            return [average.clone() for average in averages]

    def apply(self, parts: Sequence[tuple[Update, Index]], orthogonal: Tensors) -> None:
        """To parts of one scale."""
        lr = self.settings["lr"] * self.settings["lr_ratio"]
        shards = [update.parameter[index] for update, index in parts]
        torch._foreach_mul_(shards, 1 - lr * self.settings["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(shards, orthogonal, alpha=-lr * parts[0][0].scale)  # pyright: ignore[reportPrivateImportUsage]


class Muon:
    """Steps a fixed list of parameters. Making it is a collective, as is every step.

    Every rank of a mesh must have gradients of the same parameters; a parameter without one is left as it is.
    """

    def __init__(self, stored: Mapping[nn.Parameter, Stored], home: Home, *, dtype: torch.dtype | None = None):
        self._stored, self._home, self._dtype = stored, home, dtype
        self._groups: dict[DeviceMesh, ProcessGroup] = {}
        for parameter in stored:
            if not _is_whole_here(parameter):
                mesh = _mesh_of(parameter)
                self._groups[mesh] = self._groups.get(mesh) or group_of(mesh)
        self._plans: dict[tuple[int, ...], list[tuple[list[nn.Parameter], Exchange]]] = {}

    def step(self, settings: Mapping[str, Any], momenta: Mapping[Tensor, Tensor]) -> None:
        """`settings`: the optimizer's group. `momenta`: of every parameter of the group that has a gradient."""
        step = Updates(settings, self._home)
        updates = {
            parameter: self._update(parameter, settings, momenta[parameter])
            for parameter in settings["params"]
            if parameter.grad is not None
        }

        def transform(stack: Tensor) -> Tensor:
            return orthogonalize(stack, steps=settings["ns_steps"])

        for alike in self._whole(updates):
            stack = torch.stack(step.directions(alike))
            done = transform(stack.to(self._dtype or working_dtype(stack)).flatten(0, -3)).view(stack.shape)
            step.apply(alike, done.to(stack.dtype).unbind())
        for parameters, exchange in self._plan([one for one in updates if not _is_whole_here(one)]):
            here = [updates[parameter] for parameter in parameters]
            exchange.run(
                read=lambda which, index, here=here: step.directions([(here[which], index)])[0],
                transform=transform,
                write=lambda which, index, values, here=here: step.apply([(here[which], index)], [values]),
            )

    def _whole(self, updates: Mapping[nn.Parameter, Update]) -> Iterator[list[tuple[Update, Index]]]:
        """What is whole on this rank: parts of one shape and scale together, so many as fit a round."""
        together: dict[tuple[torch.dtype, float, torch.Size], list[tuple[Update, Index]]] = {}
        for parameter, update in updates.items():
            if _is_whole_here(parameter):
                for index in _parts(update.parameter, self._stored[parameter]):
                    kind = parameter.dtype, update.scale, update.parameter[index].shape
                    together.setdefault(kind, []).append((update, index))
        for (*_, shape), parts in together.items():
            at_once = max(1, ROUND_ELEMENTS // shape.numel())
            yield from (parts[first : first + at_once] for first in range(0, len(parts), at_once))

    def _update(self, parameter: nn.Parameter, settings: Mapping[str, Any], momentum: Tensor) -> Update:
        assert parameter.grad is not None
        scale = self._stored[parameter].scale(parameter.shape, settings["scale"])
        return Update(local(parameter.detach()), local(parameter.grad), local(momentum), scale)

    def _plan(self, parameters: Sequence[nn.Parameter]) -> list[tuple[list[nn.Parameter], Exchange]]:
        """An exchange for each mesh and dtype."""
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._plans:
            together: dict[tuple[DeviceMesh, torch.dtype], list[nn.Parameter]] = {}
            for parameter in parameters:
                dtype = self._dtype or working_dtype(parameter)
                together.setdefault((_mesh_of(parameter), dtype), []).append(parameter)
            self._plans[key] = [
                (alike, self._exchange(alike, mesh, dtype)) for (mesh, dtype), alike in together.items()
            ]
        return self._plans[key]

    def _exchange(self, parameters: Sequence[nn.Parameter], mesh: DeviceMesh, dtype: torch.dtype) -> Exchange:
        group = self._groups[mesh]
        known: dict[Any, list[Matrix]] = {}  # layers are alike: each kind of parameter is cut once
        matrices: list[Matrix] = []
        for which, parameter in enumerate(parameters):
            assert isinstance(parameter, DTensor)
            stored = self._stored[parameter]
            kind = (parameter.shape, parameter.placements, stored)
            if kind not in known:
                held = holdings(parameter.shape, mesh, parameter.placements)
                in_group = {get_group_rank(group, rank): one for rank, one in held.items()}
                _check(local(parameter), in_group[get_rank(group)])
                known[kind] = _cut_all(parameter.shape, stored, in_group)
            matrices += [replace(matrix, parameter=which) for matrix in known[kind]]
        return Exchange(matrices, group, device=local(parameters[0]).device, dtype=dtype)


def _cut_all(shape: Sequence[int], stored: Stored, held: dict[int, Holding]) -> list[Matrix]:
    """The matrices of a parameter, of every expert."""
    experts = [None] if len(shape) == 2 else range(shape[0])
    return [
        cut(0, rows, columns, expert, held, shape) for rows, columns in stored.matrices(shape) for expert in experts
    ]


def _is_whole_here(parameter: Tensor) -> bool:
    """Whether every matrix of which a rank has anything is there whole: then nothing is sent.

    A matrix that all ranks of a mesh have is dealt nevertheless, as they would all do the same work.
    """
    if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
        return True
    is_cut = is_sharded(parameter.device_mesh, parameter.placements, (parameter.dim() - 2, parameter.dim() - 1))
    return parameter.dim() == 3 and not is_cut


def _mesh_of(parameter: Tensor) -> DeviceMesh:
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh


def _parts(shard: Tensor, stored: Stored) -> Iterator[Index]:
    """Of a shard of whole matrices, so many matrices at a time that they fit a round."""
    for rows, columns in stored.matrices(shard.shape):
        if shard.dim() == 2:
            yield rows, columns
            continue
        at_once = max(1, ROUND_ELEMENTS // (shard.shape[1] * shard.shape[2]))
        for first in range(0, shard.shape[0], at_once):
            yield slice(first, first + at_once), rows, columns


def _check(shard: Tensor, held: Holding) -> None:
    expected = tuple(sum(run.length for run in runs) for runs in held.runs)
    if tuple(shard.shape) != expected:
        raise PalestraError(
            f"a shard has the shape {tuple(shard.shape)}, but its placements say {expected}: it cannot be put together"
        )
