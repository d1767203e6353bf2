"""What a trainer has on its device goes to host memory and comes back, to the bit, as the same tensors."""

import pytest
import torch
from torch import nn

from palestra.train.belongings import Belongings, has_room, state_of
from tests.unit.train.batches import make_batch

CPU = torch.device("cpu")


def test_room_beside_an_engine():
    gib = 2**30
    assert has_room(30 * gib, device_bytes=80 * gib, engine_share=0.5)
    assert not has_room(40 * gib, device_bytes=80 * gib, engine_share=0.5), "CUDA itself takes some"
    assert not has_room(0, device_bytes=80 * gib, engine_share=1.0)


def test_storages_are_emptied_and_filled_and_views_remain_views():
    base = torch.arange(12.0)
    tensors = [base.view(3, 4), base[2:], torch.arange(5), torch.zeros(0)]
    before = [tensor.clone() for tensor in tensors]
    belongings = Belongings(lambda: tensors, CPU, engine_share=0.9)
    for _ in range(2):  # host memory of the first time serves the second
        moved = belongings.move()
        assert moved == 12 * 4 + 5 * 8, "shared memory counts once"
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0, 0]
        belongings.bring_back()
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))
    tensors[0][0, 2] = 99
    assert tensors[1][0] == 99


def test_steps_around_a_turn_of_somebody_else_are_the_steps_without_it():
    """Control: forgetting the moments makes another model."""

    def stepped(between) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            model(torch.full((2, 4), step + 1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            between(model, optimizer)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def away(model, optimizer) -> None:
        belongings = Belongings(lambda: state_of(model, optimizer), CPU, engine_share=0.9)
        assert belongings.move() > 0
        assert not any(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        belongings.bring_back()

    plain = stepped(lambda *_: None)
    assert torch.equal(stepped(away), plain)
    assert not torch.equal(stepped(lambda _, optimizer: optimizer.state.clear()), plain)


def test_a_sharded_policy_trains_on_after_it_was_away(qwen, ranks):
    """FSDP keeps views of its shards by itself."""
    from palestra.algo.losses import policy_loss
    from palestra.config.schema import Train
    from palestra.core.ledger import Ledger
    from palestra.model.load import load_policy
    from palestra.train.optimizer import make_optimizer
    from palestra.train.packs import plan_step
    from palestra.train.step import train_step

    def trained(is_away: bool) -> list[torch.Tensor]:
        policy = load_policy(
            str(qwen),
            dtype=torch.float32,
            experts="grouped_mm",
            head_chunk_tokens=16,
            meshes=ranks.meshes,
            device=ranks.device,
        )
        optimizer = make_optimizer(policy, policy.decoder_layers, Train())
        belongings = Belongings(lambda: state_of(policy, optimizer), CPU, engine_share=0.9)
        for step in range(3):
            plan = plan_step(make_batch([6, 7], step=step, seed=step), rank=0, num_ranks=1, device=ranks.device)
            train_step(
                policy,
                optimizer,
                plan,
                rl_loss=policy_loss("mis", {}),
                lr=1e-2,
                max_grad_norm=1.0,
                ranks=ranks,
                ledger=Ledger("test"),
            )
            if is_away:
                belongings.move()
                belongings.bring_back()
        return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in policy.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(trained(True), trained(False), strict=True))


@pytest.mark.parametrize("share", [0.1, 0.95])
def test_on_a_cpu_nothing_moves(share):
    """The engine's memory is the host's."""
    tensor = torch.ones(3)
    belongings = Belongings(lambda: [tensor], CPU, engine_share=share)
    belongings.put_away()
    assert tensor.sum() == 3
    belongings.bring_back()
