"""A trainer of one rank in the test's own process."""

import torch
import torch.distributed as dist

from palestra.model.mesh import make_meshes
from palestra.train.ranks import Ranks


def join_alone() -> None:
    """Make a process group of this process, unless it has one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def ranks_of_one() -> Ranks:
    join_alone()
    return Ranks(rank=0, num=1, device=torch.device("cpu"), meshes=make_meshes("cpu"))
