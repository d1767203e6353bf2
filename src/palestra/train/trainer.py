"""The trainer's state and what can be done with it: load, train one batch, save, export. Both loops drive it."""

import time
from pathlib import Path
from typing import Any

import torch

from palestra.algo.losses import RolloutMasks, policy_loss, with_masks
from palestra.config import RunConfig
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import Ledger
from palestra.core.metrics import Mean, Metrics
from palestra.model.activations import Activations
from palestra.model.export import save_huggingface
from palestra.model.load import load_policy
from palestra.train import checkpoint
from palestra.train.checkpoint import TrainerState
from palestra.train.optimizer import LearningRate, make_optimizers, training_rate
from palestra.train.packs import plan_step
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
                activations=Activations(
                    recompute=config.train.recompute,
                    offload=config.train.offload_activations,
                    compile=config.train.compile,
                ),
            )
        self.version = 0
        self.use_fresh_optimizer(training_rate(config.train))

    def use_fresh_optimizer(self, rate: LearningRate) -> None:
        """Count from version 0 with new moments and this learning rate."""
        train = self._config.train
        self._optimizers = make_optimizers(self.policy, train)
        self._rate, self.version = rate, 0

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
        metrics = train_step(
            self.policy,
            self._optimizers,
            plan,
            rl_loss=self._rl_loss,
            lr=self._rate.at(self.version),
            max_grad_norm=self._config.train.max_grad_norm,
            ranks=self.ranks,
            ledger=ledger,
            lr_ess_power=self._config.train.lr_ess_power,
        )
        self.version += 1
        seconds = time.perf_counter() - started
        return metrics | {"train/step_s": Mean(seconds), "train/tokens_per_s": Mean(plan.num_tokens, seconds)}

    def save(self, ledger: Ledger, data: dict[str, Any] | None = None) -> Path:
        """The trainer's part of the checkpoint of `version`; its directory."""
        directory = self._checkpoint(self.version)
        with ledger.spend("checkpoint"):
            checkpoint.save(
                directory,
                TrainerState(version=self.version, data=data or {}),
                self.policy,
                self._optimizers,
                self.ranks,
            )
        return directory

    def resume(self, version: int, ledger: Ledger) -> dict[str, Any]:
        """Go back to the checkpoint of `version`; returns the state of the data that was saved with it."""
        with ledger.spend("load"):
            state = checkpoint.load(self._checkpoint(version), self.policy, self._optimizers)
        self.version = state.version
        return state.data

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
