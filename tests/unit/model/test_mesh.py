"""Process groups of a layout: as few as its sets of ranks, and apart where collectives go on at once."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from palestra.model import mesh
from tests.one_rank import ranks_of_one


def test_the_same_ranks_have_one_group_for_all_that_goes_on_in_turns():
    meshes, again = ranks_of_one().meshes, ranks_of_one().meshes
    in_turns = [meshes.ranks["fsdp"].get_group(), meshes.root["fsdp"].get_group(), meshes.data, meshes.everyone]
    assert {group.group_name for group in in_turns} == {meshes.tokens.group_name}
    assert again.tokens is meshes.tokens


def test_what_goes_on_beside_the_gathering_of_weights_has_its_own():
    meshes = ranks_of_one().meshes
    apart = [meshes.tokens, meshes.experts["ep"].get_group(), meshes.ranks["tensor"].get_group(), meshes.beside]
    assert len({group.group_name for group in apart}) == 4


def test_collectives_of_every_group_wait_as_long_as_the_worlds(monkeypatch):
    """`train.batch_deadline_s`, and not what torch gives to groups."""
    ranks_of_one()
    before, wanted = waits(dist.group.WORLD), timedelta(seconds=77)
    monkeypatch.setattr(mesh, "_MADE", {})
    _set_pg_timeout(wanted, dist.group.WORLD)
    try:
        meshes = ranks_of_one().meshes
        groups = [meshes.tokens, meshes.beside, meshes.experts["ep"].get_group(), mesh.group_among([0])]
        plain = dist.new_group([0])
    finally:
        _set_pg_timeout(before, dist.group.WORLD)
    assert {waits(group) for group in groups} == {wanted}
    assert waits(plain) != wanted  # the control


def waits(group) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
