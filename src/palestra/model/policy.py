"""The policy: a decoder of transformers and its head under one root, scoring tokens of a pack.

Legend: T tokens of a pack, t those of them on this rank, K tokens to score, k those of them whose hidden state is here,
D model. Of routes: L layers of the decoder, C experts of a token in a layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from palestra.core.errors import UserError
from palestra.model.attention import NAME
from palestra.model.context import WHOLE, Context
from palestra.model.documents import Documents, documents_of
from palestra.model.head import logit_map_of, token_logprobs
from palestra.model.lora import Adapter
from palestra.model.replay import NOT_KNOWN
from palestra.model.routers import Routers
from palestra.model.tensor import ALONE, Axis


class Policy(nn.Module):
    """Base and head in one module, so that sharding gathers the head's weights for the head that is called here.

    It stays in evaluation mode while it trains: dropout would make trainer and engine two different policies.
    """

    def __init__(self, model: PreTrainedModel, *, head_chunk_tokens: int):
        super().__init__()
        self.model = model
        self.decoder_layers = _layers_of(model)
        self.routers = Routers(model)
        self.context: Context = WHOLE
        self.fallbacks: tuple[str, ...] = ()  # what was asked for and does not hold for this family, in words
        self.attention_kernels: frozenset[str] = frozenset()  # those that attended over packs when it was checked
        self.tensor: Axis = ALONE
        self.adapter: Adapter | None = None  # None: all weights are trained
        self._logit_map = logit_map_of(model.config)
        self._head_chunk_tokens = head_chunk_tokens
        self.eval()

    def forward(
        self,
        token_ids_T: Tensor,
        documents: Documents,
        scored_K: Tensor,
        temperature_K: Tensor,
        routes_TLC: Tensor = NOT_KNOWN,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each scored token given its document so far, and the entropy it was drawn with.

        `scored_K` are positions in the pack; none is the first of its document. Float32 or wider, [K] each, on
        every rank of the context. `routes_TLC` are the experts to use, see `replay`; -1 is for the routers to choose.
        """
        routes_tLC = documents.take(routes_TLC, padding=-1) if routes_TLC.numel() else NOT_KNOWN
        with self.routers.listening(documents.is_real, routes_tLC):
            hidden_1tD = self.model.get_decoder()(
                input_ids=documents.take(token_ids_T).unsqueeze(0),
                position_ids=documents.positions,
                use_cache=False,
                documents=documents,
            ).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None
        owner_K = documents.owner[scored_K - 1]
        mine = self.context.mine(owner_K)
        hidden_kD = hidden_1tD[0, documents.place[scored_K - 1][mine]]
        logp, entropy = token_logprobs(
            self.tensor.part(hidden_kD),
            self.tensor.counted(head.weight),
            self.tensor.part(token_ids_T[scored_K][mine]),
            self.tensor.part(temperature_K[mine]),
            self._logit_map,
            self._head_chunk_tokens,
        )
        logp_k, entropy_k = (self.tensor.gather(x, len(hidden_kD)) for x in (logp, entropy.detach()))
        return self.context.collect(logp_k, owner_K), self.context.collect(entropy_k, owner_K)

    @torch.no_grad()
    def score(self, token_ids_T: Tensor) -> Tensor:
        """Log-probability of each next token of one document at temperature 1, [T - 1]. A collective."""
        num, device = len(token_ids_T), token_ids_T.device
        ones = torch.ones(num - 1, device=device)
        logp, _ = self(
            token_ids_T, documents_of([num], device, self.context), torch.arange(1, num, device=device), ones
        )
        if isinstance(self, FSDPModule):
            self.reshard()  # what a backward pass would have done: no gathered copy outlives the call
        return logp

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size


def _layers_of(model: PreTrainedModel) -> list[nn.Module]:
    layers = getattr(model.get_decoder(), "layers", None)
    head = model.get_output_embeddings()
    if not isinstance(layers, nn.ModuleList) or head is None:
        raise UserError(
            f"{type(model).__name__} has no decoder with `layers` and an output head; use a causal language model"
        )
    if getattr(head, "bias", None) is not None:
        raise UserError(f"the output head of {type(model).__name__} has a bias, which is not supported")
    return list(layers)


def require_softmax_attention(model: PreTrainedModel) -> None:
    """Errors: UserError for layers through which documents of a pack would see each other, or attend otherwise."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown or not model._supports_attention_backend:
        what = f"layers of kind {', '.join(sorted(unknown))}" if unknown else "its own attention code"
        raise UserError(
            f"{type(model).__name__} has {what}; packed training supports full and sliding-window attention that goes "
            "through transformers' attention registry"
        )


@torch.no_grad()
def check_against_own_forward(policy: Policy, *, tolerance: float = 1e-3) -> None:
    """Score two packed documents, and each alone with the family's own eager forward: they must agree.

    Proves the packed attention, the chunked head and the logits' scaling for this family, as it will be used: in the
    policy's precision, and sharded as it is. A collective. Errors: UserError with the difference.
    """
    model, device = policy.model, next(policy.parameters()).device
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 5]
    token_ids_T = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator).to(device)
    scored_K = torch.tensor([*range(1, 9), *range(10, 14)], device=device)
    documents = documents_of(lengths, device, policy.context)
    packed_K, _ = policy(token_ids_T, documents, scored_K, torch.ones(len(scored_K), device=device))
    policy.attention_kernels = frozenset(documents.taken)
    is_sharded = isinstance(policy, FSDPModule)
    if is_sharded:
        policy.unshard()  # base and head: the layers do it themselves
    model.set_attn_implementation("eager")
    own_K = torch.cat([_own_logprobs(model, document) for document in token_ids_T.split(lengths)])
    model.set_attn_implementation(NAME)
    if is_sharded:
        policy.reshard()
    difference = float((packed_K - own_K).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{type(model).__name__}: packed log-probabilities differ from the model's own by {difference:.3g}; "
            "the trainer does not support this model's attention or head"
        )


@torch.no_grad()
def check_replay(policy: Policy) -> None:
    """Give every router experts drawn at random: it must use them, each with a weight of its own.

    A collective. Errors: UserError naming the router.
    """
    for why in policy.routers.not_heard:
        raise UserError(f"train.router_replay: {why}; set it to false")
    replay, device = policy.routers.replay, next(policy.parameters()).device
    heard: list[tuple[str, Tensor, Tensor]] = []

    def hear(router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        heard.append((type(router).__name__, *policy.routers.in_order(outputs)[1:]))

    num = 4 * policy.context.pieces
    documents, routes_TLC = documents_of([num], device, policy.context), replay.drawn(num).to(device)
    hooks = [router.register_forward_hook(hear) for _, router in replay.routers]
    tokens_T, ones_K = torch.arange(num, device=device), torch.ones(num - 1, device=device)
    policy(tokens_T % policy.vocab_size, documents, tokens_T[1:], ones_K, routes_TLC)
    for hook in hooks:
        hook.remove()
    if isinstance(policy, FSDPModule):
        policy.reshard()
    given_tLC = documents.take(routes_TLC).long()
    for (layer, _), (name, weight_tC, index_tC) in zip(replay.routers, heard, strict=True):
        is_used = torch.equal(index_tC.sort(-1).values, given_tLC[:, layer].sort(-1).values)
        if not (is_used and (weight_tC.isfinite() & (weight_tC != 0)).all()):
            raise UserError(f"train.router_replay: {name} does not weigh experts that are given to it; set it to false")


def _own_logprobs(model: PreTrainedModel, token_ids_T: Tensor) -> Tensor:
    logits = model(input_ids=token_ids_T.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, token_ids_T[1:, None])[:, 0]
