"""The schema of a run. Each fact is stated once; what follows from it is a property; validators check, never assign."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = float
Loss = Literal["mis", "tis", "cispo", "gspo", "dppo", "ppo_clip", "none"]
BaselineKind = Literal["mean", "leave_one_out", "moving_average"]  # of a group; or of a seat, over the groups before
AdvantageScale = Literal["none", "std"]
Dtype = Literal["float32", "bfloat16"]
ReshardAfter = Literal["forward", "backward", "step"]
Place = Literal["tensorboard", "wandb", "trackio"]
VLLM_GPU_SHARE = 0.92  # gpu-memory-utilization, where nobody says otherwise


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted`, for messages: "2 or 4"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, [*below, *above]))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Log(Section):
    """Where a run writes and how much it keeps."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")  # of the run: its directory within `outputs`
    outputs: Path = Path("outputs")  # where runs lie
    keep_batches: bool = True  # every batch stays, for `palestra replay`; otherwise only those a kept checkpoint needs
    keep_rollouts: bool = True  # conversations stay, for `palestra view` and `palestra replay`
    keep_logprobs: bool = (
        True  # the trainer's, of every trained token, for `palestra view`: 4 bytes each, beside batches
    )
    to: tuple[Place, ...] = ()  # where metrics are told besides metrics.jsonl: "tensorboard", "wandb", "trackio"
    project: str = Field(default="palestra", min_length=1, max_length=100)  # there
    keep_weights: bool = False  # every staged version stays, for `palestra replay --from weights`: a model each


class Build(Section):
    """A model made from a configuration class of transformers instead of loaded: architecture and its fields."""

    architecture: str  # a class of transformers, such as Qwen3ForCausalLM
    config: dict[str, Any] = {}  # fields of its configuration class
    alphabet: str = Field(min_length=1)  # one token per character, in this order, after pad, bos, eos and unk
    words: tuple[str, ...] = ()  # further tokens, of several characters
    seed: int = Field(default=0, ge=0)  # of its first weights


class Lora(Section):
    """Train low-rank adapters beside frozen weights, instead of the weights."""

    rank: int = Field(default=16, ge=1, le=512)  # of the two matrices of an adapter
    alpha: PositiveFloat = 32.0  # adapters count alpha / rank times, with use_rslora alpha / sqrt(rank)
    targets: Literal["all-linear"] | tuple[str, ...] = (
        "all-linear"  # ends of names of linear layers in the decoder, and "experts"
    )
    use_rslora: bool = False  # rank-stabilised scale
    dropout: float = 0.0  # must be 0: engine and trainer would differ

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.dropout:
            raise ValueError(
                f"model.lora.dropout={self.dropout} would make trainer and engine two different policies; set it to 0"
            )
        if not self.targets:
            raise ValueError('model.lora.targets is empty; name layers, or leave it out for "all-linear"')
        if "experts" in self.targets and self.rank % 8:
            raise ValueError(
                f"model.lora.rank={self.rank}: grouped products want a multiple of 8 for adapters of experts; set it "
                f"to {self.rank // 8 * 8 + 8}, or leave experts out of model.lora.targets"
            )
        return self


class Model(Section):
    """The policy: a Hugging Face directory or hub name, or a `build`."""

    path: str | None = None  # a directory in Hugging Face layout, or a name on its hub; or give `model.build`
    build: Build | None = None
    dtype: Dtype = "bfloat16"  # of the forward pass; masters are float32
    experts: Literal["grouped_mm", "eager", "batched_mm"] = "grouped_mm"  # how transformers computes experts
    lora: Lora | None = None  # None trains all weights

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.build is None):
            raise ValueError("give exactly one of model.path (a directory or hub name) and model.build (a new model)")
        return self


class SftSource(Section):
    """Rows with `messages`, or `prompt` and `completion`: a JSONL or Parquet file, or a Hugging Face data set."""

    path: str  # a .jsonl, .ndjson or .parquet file, or a data set of a directory or hub
    weight: PositiveFloat = 1.0  # share among the sources
    split: str = "train"  # of a data set

    @property
    def file(self) -> Path | None:
        """None for a data set, of a directory or a hub."""
        path = Path(self.path)
        return path if path.suffix in (".jsonl", ".ndjson", ".parquet") else None


class WarmUp(Section):
    """Supervised steps on `data.sources` before version 0, with an optimizer of their own."""

    steps: int = Field(default=0, ge=0)  # 0: none
    samples_per_step: PositiveInt = 64  # rows of a step
    lr: PositiveFloat = 1e-3  # learning rate at its highest
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # of the learning rate
    lr_warmup_steps: int = Field(default=10, ge=0)  # over which it rises


class Data(Section):
    """Supervised data, mixed by weight and streamed."""

    sources: tuple[SftSource, ...] = ()
    max_tokens: PositiveInt = 4096  # longer rows are dropped and counted
    shuffle_rows: int = Field(default=10_000, ge=0)  # size of the shuffle buffer; 0 keeps the order
    warmup: WarmUp = WarmUp()


class Masks(Section):
    """Rollouts that train nothing although they are in the batch, whatever the loss: see docs/stability.md. All off."""

    geometric_low: float | None = Field(default=None, ge=0)  # a rollout whose geometric mean ratio is below this
    geometric_high: PositiveFloat | None = None  # or above this
    negative_mismatch: PositiveFloat | None = None  # of negative advantage, with mean(engine - trainer logprob) above

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.geometric_low, self.geometric_high
        if low is not None and high is not None and low >= high:
            raise ValueError(f"algo.masks.geometric_low={low} must be less than geometric_high={high}")
        return self


class Length(Section):
    """What length takes off a reward before advantages; the reward itself is recorded as it was. All off."""

    max_tokens: PositiveInt | None = None  # sampled in a rollout: what counts as full; default: sampling.max_tokens
    penalty: float = Field(default=0.0, ge=0)  # of a full rollout; shorter ones lose in proportion
    overlong_tokens: int = Field(
        default=0, ge=0
    )  # the last so many tokens before full are where the soft penalty grows
    overlong_penalty: float = Field(default=1.0, ge=0)  # at full and beyond


class Frozen(Section):
    """A model with the policy's tokens whose weights never change, behind an engine of its own (settings: `engine`)."""

    path: str  # Hugging Face directory or hub name
    weight: PositiveFloat  # of its component of the loss, or of its advantages
    max_in_flight: PositiveInt = 32  # samples that its engine is asked about at once


class Reference(Frozen):
    """What the policy is pulled to: `weight` x KL, a component of the loss beside the policy's."""


class Teacher(Frozen):
    """Who says how likely every sampled token is: `weight` x (teacher - engine logprob), centred, is its advantage."""

    replaces_reward: bool = False  # advantages are the teacher's alone


class Algo(Section):
    """What a step trains on and how a token is weighed."""

    loss: Loss = "mis"  # see docs/stability.md
    loss_args: dict[str, float | str] = {}  # of the loss, such as {low = 0.2, high = 5.0}
    groups_per_step: PositiveInt = 16  # groups that a step trains
    group_size: PositiveInt = 16  # rollouts of one task
    baseline: BaselineKind = "mean"  # what is taken off a reward
    average_decay: Fraction = Field(default=0.95, ge=0, lt=1)  # of moving_average: weight of the past, group by group
    advantage_scale: AdvantageScale = "none"  # what it is divided by then
    masks: Masks = Masks()
    length: Length = Length()
    reference: Reference | None = None
    teacher: Teacher | None = None
    drop_zero_signal: bool = True  # groups with equal rewards, where those have no signal
    max_age: int = Field(default=8, ge=0)  # a rollout older than this never trains
    pace_age: float = Field(default=1.0, ge=0)  # dispatch is paced to this mean age (Little's law)
    stuck_s: PositiveFloat = 60  # members without progress for so long do not hold their group up: it trains in parts
    window_groups: int | None = Field(default=None, ge=0)  # a batch reaches this far past the oldest open group

    @property
    def rollouts_per_step(self) -> int:
        return self.groups_per_step * self.group_size

    @property
    def max_outstanding(self) -> int:
        """Rollouts dispatched and not in the engines' weights: mean age + 1 steps of them, or what trains until the
        next publish where that is more."""
        return int(self.rollouts_per_step * (1 + min(self.pace_age, self.max_age)))

    @property
    def frozen(self) -> dict[str, Frozen]:
        """Models whose weights never change, by name."""
        return {
            name: model
            for name, model in (("reference", self.reference), ("teacher", self.teacher))
            if model is not None
        }

    @property
    def filters_groups(self) -> bool:
        """With a teacher, or a baseline from other groups, every group has signal."""
        return self.drop_zero_signal and self.teacher is None and self.baseline != "moving_average"

    @property
    def window(self) -> int:
        """In groups. With `max_age` 0 batches take groups strictly in dispatch order."""
        if self.window_groups is not None:
            return self.window_groups
        return 2 * self.groups_per_step if self.max_age else 0


class SamplingConfig(Section):
    """How training rollouts are sampled. The trainer applies the same temperature to its logits."""

    temperature: PositiveFloat = 1.0  # of engines and trainer
    top_p: Fraction = Field(default=1.0, gt=0, le=1)  # must be 1
    top_k: int = Field(default=0, ge=0)  # must be 0
    max_tokens: PositiveInt = 1024  # per reply

    @model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"sampling.top_p={self.top_p} and sampling.top_k={self.top_k} cut the distribution that the trainer "
                "computes log-probabilities of; train with top_p=1 and top_k=0 (evaluations may cut)"
            )
        return self


class Balance(Section):
    """What keeps the experts of a mixture evenly used. Both off; a model without experts takes neither."""

    aux_loss: float = Field(default=0.0, ge=0)  # weight of the load-balancing loss (arXiv:2101.03961)
    bias_rate: float = Field(
        default=0.0, ge=0
    )  # of the routers' bias per step, where a family has one (arXiv:2408.15664)


class Muon(Section):
    """How `train.optimizer = "muon"` steps the matrices of decoder layers. All else is stepped by AdamW."""

    momentum: float = Field(default=0.95, ge=0, lt=1)  # of the running mean of gradients
    nesterov: bool = True  # looks ahead by a step
    ns_steps: int = Field(default=5, ge=1, le=20)  # of Newton-Schulz
    scale: Literal["match_adamw", "spectral"] = "match_adamw"  # 0.2 sqrt(max(out, in)), or sqrt(max(1, out / in))
    lr_ratio: PositiveFloat = 1.0  # of the matrices' learning rate to train.lr


class Train(Section):
    """The trainer process."""

    steps: PositiveInt = 100  # optimizer steps
    seed: int = Field(default=0, ge=0)  # of everything drawn by chance: order of tasks, sampling, adapters
    shard: PositiveInt = 1  # ranks that share one copy of the weights (FSDP2)
    replicate: PositiveInt = 1  # copies
    context_parallel: PositiveInt = 1  # ranks that share each pack; the weights are sharded over them too
    context_kind: Literal["ulysses", "ring"] = "ulysses"  # ulysses: must divide the attention heads; ring: any
    tensor_parallel: PositiveInt = 1  # ranks that split each matrix, as transformers' plan for the family says
    reshard_after: ReshardAfter = "forward"  # gathered weights are kept for a pass, for a pack, or for all of a step
    expert_parallel: PositiveInt = 1  # ranks among shard x context x tensor_parallel that own different experts
    attention: Literal["auto", "cudnn", "varlen", "flex", "padded"] = "auto"  # auto: the fastest kernel that works here
    recompute: Literal["none", "selective", "full"] = "none"  # what a backward computes again rather than keeps
    offload_activations: bool = False  # what is kept for the backward waits in host memory
    compile: bool = False  # layers by torch.compile, while they train
    float8: bool = False  # linear products of layers in float8 (torchao); compute capability 9.0 and later
    router_replay: bool = False  # routers choose the experts that the engine chose; engines on GPUs only
    balance: Balance = Balance()
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of layers
    muon: Muon = Muon()
    offload_optimizer: bool = False  # its moments are in host memory, and on the device only while they are used
    lr: PositiveFloat = 1e-6  # learning rate at its highest
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = Field(default=0.0, ge=0)  # decoupled
    max_grad_norm: PositiveFloat = 1.0  # longer gradients are clipped to it
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"  # of the learning rate
    lr_warmup_steps: int = Field(default=0, ge=0)  # over which it rises
    lr_decay_steps: int = Field(default=0, ge=0)  # wsd, which needs it: length of the decay at the end
    lr_ess_power: float = Field(default=0.0, ge=0)  # lr x (effective sample share)^this; 0.5 suits Adam, 0 is off
    samples_per_step: PositiveInt = 64  # supervised runs; in RL a step trains groups_per_step x group_size rollouts
    max_pack_tokens: PositiveInt = 4096  # tokens of one forward
    head_chunk_tokens: PositiveInt = 1024  # tokens whose logits exist at once
    checkpoint_every: PositiveInt = 50  # steps
    keep_checkpoints: PositiveInt = 2  # the newest; older ones are removed
    threads: PositiveInt = 1  # CPU threads of each rank
    batch_deadline_s: PositiveFloat = 1800  # a wait for a batch longer than this is an error

    @model_validator(mode="after")
    def _divides(self) -> Self:
        sharing = self.num_sharing
        if sharing % self.expert_parallel:
            raise ValueError(
                f"train.expert_parallel={self.expert_parallel} does not divide the {sharing} ranks of train.shard="
                f"{self.shard} x train.context_parallel={self.context_parallel} x train.tensor_parallel="
                f"{self.tensor_parallel}; set it to {nearest_divisors(sharing, self.expert_parallel)}, or train.shard "
                f"to {-(-self.shard // self.expert_parallel) * self.expert_parallel}"
            )
        pieces = self.context_parallel * (2 if self.context_kind == "ring" and self.context_parallel > 1 else 1)
        if self.max_pack_tokens % pieces:
            lower = self.max_pack_tokens // pieces * pieces
            raise ValueError(
                f"train.max_pack_tokens={self.max_pack_tokens} cannot be cut into {pieces} equal pieces for "
                f"train.context_parallel={self.context_parallel} ({self.context_kind}); set it to "
                f"{' or '.join(str(tokens) for tokens in (lower, lower + pieces) if tokens)}"
            )
        return self

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.schedule == "wsd" and not self.lr_decay_steps:
            raise ValueError(
                "train.schedule=wsd needs train.lr_decay_steps >= 1: with 0 the learning rate never falls; set it, "
                "or train.schedule=constant"
            )
        return self

    @model_validator(mode="after")
    def _multiplies_in_one_way(self) -> Self:
        if self.float8 and self.tensor_parallel > 1:
            raise ValueError(
                f"train.float8=true is not there for train.tensor_parallel={self.tensor_parallel}; set one of them back"
            )
        return self

    @model_validator(mode="after")
    def _replays_what_is_not_compiled(self) -> Self:
        if self.router_replay and self.compile:
            raise ValueError("train.router_replay=true is not there for train.compile=true; set one of them back")
        return self

    @model_validator(mode="after")
    def _keeps_in_one_way(self) -> Self:
        if self.compile and self.recompute == "selective":
            raise ValueError(
                'train.compile=true chooses by itself what is computed again; set train.recompute to "none", or to '
                '"full" where memory is short'
            )
        return self

    @property
    def num_ranks(self) -> int:
        return self.replicate * self.num_sharing

    @property
    def num_sharing(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.shard * self.context_parallel * self.tensor_parallel

    @property
    def moment_bytes(self) -> int:
        """What the optimizer has of a parameter on the device between two steps; of Muon, of a matrix of a layer."""
        return 0 if self.offload_optimizer else 4 if self.optimizer == "muon" else 8

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of them with one context or tensor axis, that train different packs."""
        return self.replicate * self.shard


class Engine(Section):
    """vLLM, unmodified. `args` are further flags of its server, e.g. {"max-num-seqs": 64}."""

    replicas: PositiveInt = 1  # engines of the policy
    tensor_parallel: PositiveInt = 1  # GPUs of one engine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: what the installed vLLM computes on
    dtype: Dtype | None = None  # default: model.dtype
    max_model_len: PositiveInt = 4096  # tokens of a prompt and its reply
    max_in_flight: PositiveInt = 256  # rollouts per engine, at most; fewer where its cache is too small for them
    load_every_s: PositiveFloat = 1.0  # between two readings of an engine's gauges, by which rollouts are admitted
    join_max_tokens: int = Field(default=64, ge=0)  # up to here equal prompts of a group share a request
    kv_cache_gib: PositiveFloat = 1.0  # CPU
    threads: PositiveInt = 1  # CPU
    args: dict[str, Any] = {}  # further flags of vLLM's server
    healthy_s: PositiveFloat = 600  # from start to first answer
    call_s: PositiveFloat = 600  # an engine whose next token of a reply takes longer is started again
    stream_tokens: PositiveInt = 16  # a reply is streamed in pieces of so many tokens

    @property
    def gpu_share(self) -> float:
        """Of a GPU's memory, that vLLM takes for itself."""
        return float(self._said.get("gpu-memory-utilization", VLLM_GPU_SHARE))

    @property
    def is_quantized(self) -> bool:
        """As it is started; a model that is stored so says it itself."""
        return self._said.get("quantization") is not None

    @property
    def _said(self) -> dict[str, Any]:
        return {name.removeprefix("--").replace("_", "-"): value for name, value in self.args.items()}


class Sync(Section):
    """How new weights reach the engines: as files; `ipc`, where trainer and engine are on one GPU; `nccl`, sent from
    the trainer's GPUs to the engines'; `nccl_m2n`, from all of them to one engine, by shards; `sparse_nccl`, only what
    changed."""

    kind: Literal["files", "ipc", "nccl", "nccl_m2n", "sparse_nccl"] = "files"  # see docs/trainer.md
    kv: Literal["keep", "recompute"] = "keep"  # of replies on their way: caches stay, or prompts are prefilled again
    wait: bool = False  # rollouts that run end before a load, none starts meanwhile; otherwise they go on across it
    at_once: PositiveInt = 1  # engines that load at a time
    every: PositiveInt = 1  # steps between publishes
    staging: Path | None = None  # default: shared memory on one machine
    difference: bool = False  # stage only what changed since the version before, where that is smaller
    full_every: int = Field(default=16, ge=2)  # with difference: at least every so many publishes is whole
    local: Path | None = None  # on engines' machines: copies of what they load, where staging is far from them
    tolerance: PositiveFloat | None = None  # mean |trainer - engine| log-probability of the probe; default by dtype
    probe_tokens: int = Field(default=128, ge=2)  # of the sequence that proves a publish
    deadline_s: PositiveFloat = 300  # of one load

    @model_validator(mode="after")
    def _writes_files(self) -> Self:
        if self.kind != "files" and (self.difference or self.local is not None):
            raise ValueError(f"sync.kind={self.kind} writes no files: leave sync.difference and sync.local out")
        return self

    @property
    def is_sent(self) -> bool:
        """Versions go from the trainer's memory to engines that wait for them."""
        return self.kind in ("nccl", "nccl_m2n", "sparse_nccl")


class Endpoint(Section):
    """An OpenAI-compatible API, asked in place of an engine of ours: nothing it says is trained.

    Its key is read from the environment, and never written down.
    """

    url: str = Field(pattern=r"^https?://")  # with its version: http://127.0.0.1:8000/v1
    key_env: str | None = None  # the name of the variable that holds the key
    call_s: PositiveFloat = 600  # of one request
    max_in_flight: PositiveInt = 32  # requests at once


class SeatModel(Endpoint):
    """Who speaks for a seat of an environment in place of the policy: a user, a frozen opponent."""

    model: str  # its name at that endpoint
    temperature: float = Field(default=1.0, ge=0)  # it is asked at
    max_tokens: PositiveInt | None = None  # of a reply; default: sampling.max_tokens


class SourceAlgo(Section):
    """What is otherwise for one environment of a mix; None: as in `algo` and `sampling`."""

    baseline: BaselineKind | None = None  # as algo.baseline
    advantage_scale: AdvantageScale | None = None  # as algo.advantage_scale
    length: Length | None = None  # as algo.length
    temperature: PositiveFloat | None = None  # as sampling.temperature
    max_tokens: PositiveInt | None = None  # per reply
    advantage_weight: PositiveFloat = 1.0  # how much its advantages count


class Source(Section):
    """One environment. `id` is an installed environment, `module:Class`, or `path/to/file.py:Class`."""

    id: str  # installed, `module:Class`, or `path/to/file.py:Class`
    name: str | None = None  # default: the id; must differ within a mix
    weight: PositiveFloat = 1.0  # share among the entries
    args: dict[str, Any] = {}  # of the environment
    split: str = "train"  # of its tasks
    python: Path | None = None  # of a virtual environment with palestra and this environment, for clashing dependencies
    seats: dict[str, SeatModel] = {}  # by parameter of the environment's `run`; all others are the policy's

    @property
    def label(self) -> str:
        return self.name or self.id


class Trained(Source):
    """One environment of a mix."""

    algo: SourceAlgo = SourceAlgo()


class PoolWeights(Section):
    """Shares of the draws of a source, by pool; those of an empty pool go to the others."""

    easy: float = Field(default=0.1, ge=0)  # of tasks that are mostly solved
    normal: PositiveFloat = 0.7  # tasks that were never drawn are normal, unless `seed_from` says otherwise
    hard: float = Field(default=0.2, ge=0)  # of tasks that are seldom solved


class Curriculum(Section):
    """Which task comes next: pools by observed solve rate. Off: each task once per epoch."""

    on: bool = False  # whether tasks are drawn by pools
    rate: Literal["solved", "reward"] = "solved"  # share of solved rollouts, or their mean reward
    solved_at: float = 1.0  # a rollout of this reward or more is solved
    easy_above: float = 0.8  # a task of a higher rate is easy
    hard_below: float = 0.2  # a task of a lower rate is hard
    weights: PoolWeights = PoolWeights()
    window_groups: PositiveInt = 2  # a task's rate is that of its last groups
    retire_at: float = 1.0  # a task of this rate or more is not drawn any more; 2 keeps all
    retire_rollouts: PositiveInt | None = None  # if so many rollouts say so; default: algo.group_size
    seed_from: Path | None = None  # rollouts of an evaluation, or {"key", "rewards"}: JSON lines
    remember: PositiveInt = 100_000  # tasks known of a source; those drawn longest ago are forgotten first

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.hard_below <= self.easy_above <= self.retire_at:
            raise ValueError(
                f"env.curriculum.hard_below={self.hard_below}, easy_above={self.easy_above} and retire_at="
                f"{self.retire_at} must ascend"
            )
        return self


class Env(Section):
    """Environments to train on, mixed by weight, and their worker processes."""

    mix: tuple[Trained, ...] = ()
    workers: PositiveInt = 1  # for each Python that entries name, and for all that name none
    retries: int = Field(default=2, ge=0)  # of an invalid rollout, before it is masked
    stall_s: PositiveFloat = 600  # a rollout that makes no progress for this long is invalid
    answer_s: PositiveFloat = 60  # a worker that needs longer to answer, as its event loop is blocked, is started again
    chunk_tasks: PositiveInt = 256  # tasks fetched and shuffled at a time
    sandbox: str | None = None  # where programs run: a backend, or http://... of a service; default: the best here
    max_worker_gib: PositiveFloat | None = (
        None  # a worker that holds more is started again; its rollouts go on elsewhere
    )
    curriculum: Curriculum = Curriculum()

    @property
    def max_worker_bytes(self) -> float:
        return float("inf") if self.max_worker_gib is None else self.max_worker_gib * 2**30

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        labels = [source.label for source in self.mix]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"env.mix has {labels.count(label)} entries called {label!r}; give each a different `name`"
                )
        return self


class SandboxConfig(Section):
    """Sandboxes of environments that run programs: limits of each, and how many. Which they are, says `env.sandbox`."""

    memory_mb: int = Field(default=512, ge=16, le=2**22)  # of one sandbox
    disk_mb: int = Field(default=256, ge=1, le=2**22)  # of one sandbox
    processes: int = Field(default=128, ge=4, le=2**22)  # of one sandbox
    cpus: float | None = Field(default=None, ge=0.01, le=1024)  # of one core; default: as many as there are
    timeout_s: float = Field(default=3600, gt=0, le=86_400)  # a rollout whose sandbox is older is invalid
    # None: namespaces, or what a sandbox has that `env.sandbox` names
    min_isolation: Literal["none", "process", "namespaces", "kernel"] | None = None
    most: int = Field(default=256, ge=1, le=2048)  # at once, of a worker; rollouts wait for their turn
    packages: tuple[str, ...] = ()  # installed here, and shown to programs
    image: str | None = None  # what programs find around them; default: this machine's /usr. A task may have its own


class EvalSet(Source):
    """A measurement: tasks of a held-out split, sampled in one way."""

    split: str = "test"  # of its tasks
    num_tasks: PositiveInt = 100  # how many of them
    rollouts_per_task: PositiveInt = 1  # for pass@k
    temperature: float = Field(default=0.0, ge=0)  # 0: greedy
    top_p: Fraction = Field(default=1.0, gt=0, le=1)  # evaluations may cut the distribution
    max_tokens: PositiveInt | None = None  # default: sampling.max_tokens
    start: bool = True  # before the first step
    end: bool = True  # after the last step


class Eval(Section):
    """Evaluations on the training engines. The first set gives the summary's `reward_before` and `reward_after`."""

    sets: tuple[EvalSet, ...] = ()
    every: int = Field(default=0, ge=0)  # steps; 0: only at start and end
    pinned: bool = False  # withhold publishes during evaluations between start and end too
    endpoint: Endpoint | None = None  # of `palestra eval`: what is measured; `model.path` is its model's name there

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        labels = [entry.label for entry in self.sets]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"eval.sets has {labels.count(label)} entries called {label!r}; give each a different `name`"
                )
        return self


class Launch(Section):
    """How processes are started and how long they may take to end."""

    turns: bool = False  # one GPU: trainer and engine take turns on it, the engine sleeps while the trainer is at work
    host: str = "127.0.0.1"  # where engines listen
    engine_port: int | None = Field(default=None, ge=1, le=65535)  # of the first engine; default: free ports
    stop_s: PositiveFloat = 20  # to end by itself, before a process is killed
    max_restarts: int = Field(default=8, ge=0)  # of one process within restart_window_s; one more ends the run
    restart_window_s: PositiveFloat = 600  # over which restarts count


class RunConfig(Section):
    """Everything about a run."""

    log: Log
    model: Model
    data: Data = Data()
    algo: Algo = Algo()
    sampling: SamplingConfig = SamplingConfig()
    train: Train = Train()
    engine: Engine = Engine()
    sync: Sync = Sync()
    env: Env = Env()
    sandbox: SandboxConfig = SandboxConfig()
    eval: Eval = Eval()
    launch: Launch = Launch()

    @property
    def run_dir(self) -> Path:
        return self.log.outputs / self.log.name

    @property
    def model_dir(self) -> str:
        """What trainer and engines load: the given model, or the one built into the run directory."""
        return self.model.path or str(self.run_dir / "model")

    def engine_model(self, index: int) -> str:
        """What engine `index` loads: behind the policy's replicas come the frozen models, in the order of `frozen`."""
        frozen = self._frozen_at(index)
        return self.model_dir if frozen is None else frozen.path

    def in_flight_of(self, index: int) -> int:
        """What engine `index` is asked at once, at most."""
        frozen = self._frozen_at(index)
        return self.engine.max_in_flight if frozen is None else frozen.max_in_flight

    def _frozen_at(self, index: int) -> Frozen | None:
        """None for the policy's own engines."""
        frozen = [*self.algo.frozen.values()][max(index - self.engine.replicas, 0) :]
        return frozen[0] if frozen and index >= self.engine.replicas else None

    @property
    def pythons(self) -> list[Path | None]:
        """Of the environment workers, `env.workers` of each: None is ours."""
        return list(dict.fromkeys(source.python for source in (*self.env.mix, *self.eval.sets))) or [None]

    @property
    def num_workers(self) -> int:
        return self.env.workers * len(self.pythons)

    def python_of_worker(self, index: int) -> Path | None:
        return self.pythons[index // self.env.workers]

    def settings_of(self, source: str) -> SourceAlgo:
        """What an entry of env.mix says for itself."""
        return next((entry.algo for entry in self.env.mix if entry.label == source), SourceAlgo())

    def algo_of(self, source: str) -> Algo:
        """`algo`, as it is for one entry of env.mix."""
        own = self.settings_of(source)
        said = {name: getattr(own, name) for name in ("baseline", "advantage_scale", "length")}
        return self.algo.model_copy(update={name: value for name, value in said.items() if value is not None})

    def sampling_of(self, source: str) -> SamplingConfig:
        """`sampling`, as it is for one entry of env.mix."""
        own = self.settings_of(source)
        said = {"temperature": own.temperature, "max_tokens": own.max_tokens}
        return self.sampling.model_copy(update={name: value for name, value in said.items() if value is not None})

    @property
    def takes_turns(self) -> bool:
        """Engine and trainer use one device, one after the other."""
        return self.launch.turns and self.is_rl

    @property
    def engine_start_s(self) -> float:
        """From an engine's start to its first answer: where turns are taken, it may begin with waiting for its own."""
        return self.engine.healthy_s + (self.train.batch_deadline_s if self.takes_turns else 0)

    @property
    def engine_dtype(self) -> Dtype:
        return self.engine.dtype or self.model.dtype

    @property
    def probe_tolerance(self) -> float:
        if self.sync.tolerance is not None:
            return self.sync.tolerance
        return 1e-4 if self.engine_dtype == self.model.dtype == "float32" else 0.15  # random tokens in bfloat16

    @property
    def retire_rollouts(self) -> int:
        return self.env.curriculum.retire_rollouts or self.algo.group_size

    @property
    def is_rl(self) -> bool:
        return bool(self.env.mix)

    @property
    def replays_routers(self) -> bool:
        return self.train.router_replay and self.is_rl

    @property
    def num_engines(self) -> int:
        """The policy's replicas, and one for each frozen model."""
        if not (self.is_rl or self.is_eval) or self.eval.endpoint is not None:
            return 0
        return self.engine.replicas + len(self.algo.frozen)

    @property
    def is_eval(self) -> bool:
        """Nothing is trained: `palestra eval`."""
        return bool(self.eval.sets) and not self.is_rl and not self.data.sources

    @model_validator(mode="after")
    def _fits(self) -> Self:
        own = [entry.algo.max_tokens or 0 for entry in self.env.mix] + [
            entry.max_tokens or 0 for entry in self.eval.sets
        ]
        longest = max([self.sampling.max_tokens, *own])
        if longest >= self.engine.max_model_len and self.eval.endpoint is None:
            raise ValueError(
                f"max_tokens={longest} of sampling, env.mix or eval leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}; raise engine.max_model_len or lower max_tokens"
            )
        if self.is_rl and self.engine.max_model_len > self.train.max_pack_tokens:
            raise ValueError(
                f"a rollout of engine.max_model_len={self.engine.max_model_len} tokens does not fit in "
                f"train.max_pack_tokens={self.train.max_pack_tokens}; raise train.max_pack_tokens"
            )
        if self.is_rl and self.sync.every > self.algo.max_age + 1:
            raise ValueError(
                f"with sync.every={self.sync.every} rollouts are up to {self.sync.every - 1} steps old, and "
                f"algo.max_age={self.algo.max_age} trains none of those; raise algo.max_age or lower sync.every"
            )
        in_window = self.env.curriculum.window_groups * self.algo.group_size
        if self.env.curriculum.on and self.retire_rollouts > in_window:
            raise ValueError(
                f"env.curriculum.retire_rollouts={self.retire_rollouts} is more than the {in_window} rollouts of "
                "env.curriculum.window_groups: nothing would ever retire; lower it or raise window_groups"
            )
        shared = {source.label for source in self.env.mix} & {entry.label for entry in self.eval.sets}
        if shared:
            raise ValueError(f"env.mix and eval.sets both have {sorted(shared)}; give the eval set a different `name`")
        if self.eval.endpoint is not None and (self.is_rl or self.data.sources):
            raise ValueError("eval.endpoint is for `palestra eval`, which trains nothing; leave it out of a recipe")
        for label in ([entry.label for entry in self.env.mix] or [""]) if self.algo.frozen else ():
            if (temperature := self.sampling_of(label).temperature) != 1:
                where = f"env.mix[{label}].algo" if self.settings_of(label).temperature else "sampling"
                raise ValueError(
                    f"algo.{next(iter(self.algo.frozen))} says how likely tokens are at temperature 1, but the policy "
                    f"samples and trains at {where}.temperature={temperature}; set it to 1"
                )
        if self.model.lora is not None and (self.sync.kind != "files" or self.sync.difference or self.sync.local):
            raise ValueError(
                "model.lora publishes adapters, which are small, as files that engines read: leave sync.kind, "
                "sync.difference and sync.local out"
            )
        if self.model.lora is not None and self.train.balance.bias_rate:
            raise ValueError(
                f"train.balance.bias_rate={self.train.balance.bias_rate:g} changes what is no part of an adapter "
                "(model.lora), so that engines would not hear of it; set it to 0"
            )
        if self.data.warmup.steps and not self.data.sources:
            raise ValueError(f"data.warmup.steps={self.data.warmup.steps} needs data.sources to train on")
        return self

    @model_validator(mode="after")
    def _has_routes_to_replay(self) -> Self:
        if self.train.router_replay and not self.is_rl and not self.is_eval:
            raise ValueError("train.router_replay=true replays what engines chose; without env.mix there are none")
        if self.replays_routers and self.engine.device == "cpu":
            raise ValueError(
                "train.router_replay=true needs engines on GPUs: vLLM returns routed experts by its second model "
                "runner alone, which is written in Triton; set engine.device=cuda, or train.router_replay=false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        if self.sync.is_sent and self.engine.device == "cpu":
            raise ValueError(f"sync.kind={self.sync.kind} sends between GPUs, not to engine.device=cpu; use files")
        if self.sync.is_sent and self.log.keep_weights:
            raise ValueError(f"log.keep_weights needs staged versions, sync.kind={self.sync.kind} has none; use files")
        if self.sync.kind == "nccl_m2n" and self.engine.replicas > 1:
            raise ValueError(
                f"sync.kind=nccl_m2n sends to the workers of one engine, but engine.replicas={self.engine.replicas}: "
                "vLLM numbers them after the trainer's ranks; use nccl, or one engine with more engine.tensor_parallel"
            )
        if self.sync.kind == "sparse_nccl" and self.engine.is_quantized:
            raise ValueError(
                "sync.kind=sparse_nccl puts what changed into weights that engines hold as they were published, not "
                "into those that engine.args.quantization makes of them; use nccl, or leave the quantization out"
            )
        return self

    @model_validator(mode="after")
    def _shares_a_gpu(self) -> Self:
        counts = {
            "train ranks": self.train.num_ranks,
            "engine.replicas": self.engine.replicas,
            "engine.tensor_parallel": self.engine.tensor_parallel,
        }
        several = [f"{name}={count}" for name, count in counts.items() if count > 1]
        if self.sync.kind == "ipc" and (several or self.engine.device == "cpu"):
            raise ValueError(
                "sync.kind=ipc is for one trainer and one engine on one GPU, not for "
                f"{', '.join(several) or 'engine.device=cpu'}; use sync.kind=files"
            )
        return self

    @model_validator(mode="after")
    def _can_take_turns(self) -> Self:
        wanted = {
            "train.shard x train.replicate x train.context_parallel": self.train.num_ranks == 1,
            "engine.replicas": self.engine.replicas == 1,
            "engine.tensor_parallel": self.engine.tensor_parallel == 1,
            "sync.every": self.sync.every == 1,
        }
        several = [name for name, is_one in wanted.items() if not is_one]
        if self.takes_turns and several:
            raise ValueError(
                f"launch.turns has one engine and one trainer rank take turns on one device, and each turn of the "
                f"trainer ends with a publish: set {', '.join(several)} to 1, or leave launch.turns out"
            )
        if self.takes_turns and self.algo.frozen:
            raise ValueError(
                f"launch.turns has no turn for the engine of algo.{next(iter(self.algo.frozen))}; leave one of them out"
            )
        if self.takes_turns and self.sync.kind not in ("files", "ipc"):
            raise ValueError(
                f"launch.turns: with sync.kind={self.sync.kind} trainer and engine would be at work at once; use ipc, "
                "or files"
            )
        return self

    @model_validator(mode="after")
    def _signal(self) -> Self:
        """Something to compare a rollout with: its group, a teacher, or the past."""
        for label in [entry.label for entry in self.env.mix] or [""]:
            algo = self.algo_of(label)
            if algo.group_size == 1 and algo.teacher is None and algo.baseline != "moving_average":
                raise ValueError(
                    "algo.group_size=1 has no group to compare with: nothing would train; use at least 2, or "
                    'baseline = "moving_average"'
                )
        return self
