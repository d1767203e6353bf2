"""The trainer's state and what can be done with it: load, train one batch, save, export. Both loops drive it."""

import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from palestra.algo.losses import RolloutMasks, policy_loss, with_masks
from palestra.config import RunConfig
from palestra.config.schema import Balance
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import Ledger
from palestra.core.metrics import Mean, Metrics
from palestra.model.export import save_huggingface
from palestra.model.kernels import missing_kernels
from palestra.model.load import load_policy
from palestra.model.policy import Policy
from palestra.model.recompute import Activations
from palestra.train.background import Written
from palestra.train.belongings import Belongings, state_of
from palestra.train.checkpoint import Checkpoints, TrainerState
from palestra.train.optimizer import LearningRate, Optimizer, make_optimizer, training_rate
from palestra.train.packs import plan_step, samples_of, split
from palestra.train.ranks import Ranks
from palestra.train.step import train_step
from palestra.wire.batches import Batch
from palestra.wire.rundir import RunDir, checkpoint_dir

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """The policy at `version`, with its optimizer, on this rank. Every method is a collective."""

    def __init__(self, config: RunConfig, ranks: Ranks, ledger: Ledger):
        self._config, self._run, self.ranks = config, RunDir(config.run_dir), ranks
        try:
            loss = policy_loss(config.algo.loss, config.algo.loss_args)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._rl_loss = with_masks(loss, RolloutMasks(**config.algo.masks.model_dump(exclude_none=True)))
        with ledger.spend("load"):
            self.policy = load_policy(
                config.model_dir,
                dtype=DTYPES[config.model.dtype],
                experts=config.model.experts,
                head_chunk_tokens=config.train.head_chunk_tokens,
                meshes=ranks.meshes,
                device=ranks.device,
                lora=config.model.lora,
                seed=config.train.seed,
                moment_bytes=config.train.moment_bytes,
                activations=Activations(
                    recompute=config.train.recompute,
                    offload=config.train.offload_activations,
                    compile=config.train.compile,
                ),
                float8=config.train.float8,
                router_replay=config.train.router_replay,
            )
        if ranks.is_first:
            print(_told(self.policy, ranks.device), *self.policy.fallbacks, sep="\n", flush=True)
        _require_balance(self.policy, config.train.balance)
        self._rate, self.version = training_rate(config.train), 0
        self._optimizer = self._new_optimizer()
        self._checkpoints = Checkpoints(ranks, deadline_s=config.train.batch_deadline_s)
        self.saved_version = -1  # of the newest save that was begun, or resumed from
        self._notes: Metrics = {}  # of what happened beside the steps

    def use_fresh_optimizer(self, rate: LearningRate) -> None:
        """Count from version 0 with new moments and this learning rate."""
        self._optimizer.state.clear()  # there is no room for two sets of moments
        self._optimizer = self._new_optimizer()
        self._rate, self.version = rate, 0

    def _new_optimizer(self) -> Optimizer:
        return make_optimizer(self.policy, self.policy.decoder_layers, self._config.train)

    def train(self, batch: Batch, ledger: Ledger) -> Metrics:
        """Turn `version` into the next. Errors: InfrastructureError for the batch of another step."""
        if batch.step != self.version:
            raise InfrastructureError(
                f"got the batch of step {batch.step}, but the trainer holds version {self.version}"
            )
        started = time.perf_counter()
        with ledger.spend("plan"):
            meshes = self.ranks.meshes
            plan = plan_step(
                batch,
                rank=meshes.data_rank,
                num_ranks=meshes.num_data,
                device=self.ranks.device,
                context=meshes.context,
            )
        logprobs: list[torch.Tensor] = []
        metrics = train_step(
            self.policy,
            self._optimizer,
            plan,
            rl_loss=self._rl_loss,
            lr=self._rate.at(self.version),
            max_grad_norm=self._config.train.max_grad_norm,
            ranks=self.ranks,
            ledger=ledger,
            lr_ess_power=self._config.train.lr_ess_power,
            balance=self._config.train.balance,
            reshard_after=self._config.train.reshard_after,
            hear=logprobs.append,
        )
        if self._config.log.keep_logprobs and meshes.context.rank == 0 and plan.counts["rl"]:
            with ledger.spend("keep_logprobs"):
                samples = samples_of(batch, meshes.data_rank, meshes.num_data)
                self._run.logprobs.write(batch.step, meshes.data_rank, samples, split(batch, samples, logprobs))
        self.version += 1
        seconds = time.perf_counter() - started
        notes, self._notes = self._notes, {}
        times = {"train/step_s": Mean(seconds), "train/tokens_per_s": Mean(plan.num_tokens, seconds)}
        return metrics | times | notes

    def save(
        self, ledger: Ledger, data: dict[str, Any] | None = None, on_end: Callable[[], None] = lambda: None
    ) -> None:
        """Begin the trainer's part of the checkpoint of `version`: it is copied, then written beside the steps.

        `on_end` is called in another thread when `finish_save` need not wait any more. The save before must be
        finished.
        """
        with ledger.spend("checkpoint"):
            self._checkpoints.begin(
                self._checkpoint(self.version),
                TrainerState(version=self.version, data=data or {}),
                self.policy,
                self._optimizer,
                on_end,
            )
        self.saved_version = self.version

    @property
    def has_saved(self) -> bool:
        """Whether the save that was begun is at its end, well or not; the same on all ranks."""
        return self._checkpoints.has_ended

    def finish_save(self, ledger: Ledger) -> Written | None:
        """What was written by the save that was begun, if there is one; waits for it. Errors: InfrastructureError."""
        with ledger.spend("checkpoint"):
            written = self._checkpoints.finish()
        if written is not None:
            self._notes = {"train/checkpoint/write_s": Mean(written.write_s)}
        return written

    def resume(self, version: int, ledger: Ledger) -> dict[str, Any]:
        """Go back to the checkpoint of `version`; returns the state of the data that was saved with it."""
        with ledger.spend("load"):
            state = self._checkpoints.load(self._checkpoint(version), self.policy, self._optimizer)
        self.version = self.saved_version = state.version
        return state.data

    def belongings(self) -> Belongings:
        """What is on the device between two steps, for a trainer that does not have it for itself."""
        share = self._config.engine.gpu_share
        return Belongings(lambda: state_of(self.policy, self._optimizer), self.ranks.device, engine_share=share)

    def export(self, ledger: Ledger) -> Path:
        """The weights in Hugging Face layout, for transformers and vLLM."""
        directory = self._run.export
        with ledger.spend("export"):
            save_huggingface(
                self.policy,
                directory,
                dtype=DTYPES[self._config.model.dtype],
                source=self._config.model_dir,
                writes=self.ranks.is_first,
            )
        return directory

    def _checkpoint(self, version: int) -> Path:
        return checkpoint_dir(self._run, version) / "trainer"


def _told(policy: Policy, device: torch.device) -> str:
    """What attends over packs, and why nothing faster does."""
    taken, known = policy.attention_kernels, policy.context.kernels
    faster = takewhile(lambda name: name not in taken, known) if taken & set(known) else ()
    others = "; ".join(f"not {name}: {why}" for name, why in missing_kernels(faster, device).items())
    return f"attention over packs: {', '.join(sorted(taken))}" + (f" ({others})" if others else "")


def _require_balance(policy: Policy, balance: Balance) -> None:
    """Errors: UserError for what the model has nothing to balance by."""
    name = type(policy.model).__name__
    if balance.aux_loss and not len(policy.routers):
        raise UserError(f"train.balance.aux_loss={balance.aux_loss:g}, but {name} has no routers; set it to 0")
    if balance.bias_rate and not policy.routers.biases:
        raise UserError(
            f"train.balance.bias_rate={balance.bias_rate:g}, but the routers of {name} have no bias for their choice; "
            "set it to 0 and use train.balance.aux_loss"
        )
