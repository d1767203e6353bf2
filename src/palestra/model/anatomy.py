"""What a model is made of, in numbers: parameters, what a token meets of them, what a forward pass leaves behind.

Counted by `dissect` on the meta device; this module alone imports no torch. FLOPs are those of the definition: a
product of [m, k] and [k, n] is 2 m k n, a backward pass twice its forward; nothing that is computed again counts, and
padding is not there. With adapters weights are frozen: the backward pass of their products is one forward long.
"""

from collections.abc import Sequence

from msgspec import Struct

TRAINING = 3
"""Forward and backward, in forwards."""
FROZEN = 2
"""Of products with frozen weights, which have no gradient."""


class Attention(Struct, frozen=True, kw_only=True):
    """Widths are those of one head. `window` in tokens, itself included; None: every token before."""

    heads: int
    qk_width: int
    v_width: int
    window: int | None = None

    def flops(self, length: int) -> int:
        """Of one document, forward: scores and weighted values, of the pairs that a causal mask lets through."""
        return 2 * self.heads * (self.qk_width + self.v_width) * pairs(length, self.window)


class Layer(Struct, frozen=True, kw_only=True):
    """One decoder layer. `met` are the parameters that one token is computed with; `products` those of them that it is
    multiplied by; `experts` all of the routed experts; `matrices` those of two or more dimensions, and
    `orthogonal_flops` what one Newton-Schulz step of all of them takes.

    Bytes are for one token, in the precision that was asked for: `input_bytes` of the hidden state, `saved_bytes` of
    what autograd keeps, `product_bytes` of the outputs of attention and of matrix products, and
    `routed_bytes` of the hidden states that travel to experts.

    Of all that a tensor axis divides `split` parameters, beside experts, `split_saved_bytes` and `split_product_bytes`;
    `sums` are the sums over its ranks that a forward needs. `adapters` are parameters beside all these, each token is
    multiplied by all of them; `split_adapters` those of them that a tensor axis divides. `expert_adapters` are those of
    all routed experts, of which `twice_published` are shared by two matrices of an engine.
    """

    parameters: int
    experts: int
    matrices: int
    met: int
    products: int
    attention: Attention
    input_bytes: float
    saved_bytes: float
    product_bytes: float
    routed_bytes: float
    split: int = 0
    split_saved_bytes: float = 0.0
    split_product_bytes: float = 0.0
    sums: int = 0
    adapters: int = 0
    split_adapters: int = 0
    expert_adapters: int = 0
    twice_published: int = 0
    orthogonal_flops: int = 0

    @property
    def whole(self) -> int:
        """Parameters that each rank of a tensor axis has, without adapters."""
        return self.parameters - self.experts - self.split

    @property
    def whole_adapters(self) -> int:
        return self.adapters - self.split_adapters


class Anatomy(Struct, frozen=True, kw_only=True):
    """A decoder and its head. `root` are the parameters outside of layers: embeddings, head, last norm; `head` the
    head's, [vocabulary, width], which are the embeddings' own if `is_tied`. A tensor axis must divide
    `tensor_divisor`, 1 where transformers has no plan for the family; `are_heads_split`: whether attention's are.
    """

    architecture: str
    layers: tuple[Layer, ...]
    root: int
    head: int
    vocab_size: int
    width: int
    num_experts: int
    num_experts_per_token: int
    is_tied: bool
    itemsize: int  # bytes of one value in computing
    tensor_divisor: int = 1
    are_heads_split: bool = False

    @property
    def parameters(self) -> int:
        return self.root + sum(layer.parameters for layer in self.layers)

    @property
    def adapters(self) -> int:
        """What is trained, if there is any: all else is frozen then."""
        return sum(layer.adapters + layer.expert_adapters for layer in self.layers)

    @property
    def published_adapters(self) -> int:
        return self.adapters + sum(layer.twice_published for layer in self.layers)

    @property
    def met_adapters(self) -> int:
        """What one token is multiplied by."""
        share = self.num_experts_per_token / max(self.num_experts, 1)
        return sum(layer.adapters + round(layer.expert_adapters * share) for layer in self.layers)

    @property
    def active(self) -> int:
        """What one token meets: its layers, the head, one row of the embeddings."""
        return sum(layer.met for layer in self.layers) + self.head + self.width

    @property
    def matrices(self) -> int:
        return sum(layer.matrices for layer in self.layers)

    @property
    def products(self) -> int:
        return sum(layer.products for layer in self.layers)

    def forward_flops(self, lengths: Sequence[int], *, num_scored: int | None = None) -> int:
        """Of documents of these lengths, of which `num_scored` tokens go through the head (default: all)."""
        num_tokens = sum(lengths)
        scored = num_tokens if num_scored is None else num_scored
        seen = sum(layer.attention.flops(length) for layer in self.layers for length in lengths)
        return 2 * ((self.products + self.met_adapters) * num_tokens + self.head * scored) + seen

    def train_flops(self, lengths: Sequence[int], *, num_scored: int | None = None) -> int:
        """Gradients of hidden states are counted in every layer: in the first, below which nothing is trained, there
        are a little fewer with adapters."""
        flops = TRAINING * self.forward_flops(lengths, num_scored=num_scored)
        if not self.adapters:
            return flops
        num_tokens = sum(lengths)
        scored = num_tokens if num_scored is None else num_scored
        return flops - (TRAINING - FROZEN) * 2 * (self.products * num_tokens + self.head * scored)


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Of one step of one matrix: two products along its longer side, and one of the square between them."""
    short, long = sorted((rows, columns))
    return 2 * short**2 * (2 * long + short)


def pairs(length: int, window: int | None = None) -> int:
    """Query and key pairs of a causal document: a token sees itself and at most `window - 1` before."""
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near
