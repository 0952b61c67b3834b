"""What a forward pass keeps for its backward pass, in bytes a token: counted tensor by tensor.

The counts follow what torch's autograd saves of the layers of transformers under our packed attention. `compute`:
bytes of a number in the layers, 4 in float32, 2 in bfloat16. Norms compute in float32 whatever comes in.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.training.memory_shape import ModelShape

_FLOAT = 4
_INDEX = 8
READS_FEW_BELOW = 0.8
"""Share of positions read below which the last layer's second half runs on them alone (`Scorer.forward`)."""


@dataclass(frozen=True)
class Layers:
    """How a model's layers are computed and trained."""

    shape: ModelShape
    compute: int = 4
    device: str = "cpu"
    lora_rank: int | None = None
    """None: all weights are trained."""
    checkpointing: bool = False
    balanced: bool = False
    """With the loss of the routers, which sees all tokens of all layers."""

    @property
    def all_trained(self) -> bool:
        """Whether weights have gradients, and not only adapters."""
        return self.lora_rank is None

    @property
    def fused_norms(self) -> bool:
        """Norms that keep their input and one number a token (`rms_norm`)."""
        return (self.device == "cuda" or self.compute == _FLOAT) and not self.shape.family.wide_norms

    @property
    def fused_gate(self) -> bool:
        """Feed-forward parts that keep their gate and up projections, and compute what follows again (`gated`)."""
        return (self.device == "cuda" or self.compute == _FLOAT) and self.shape.silu and not self.shape.experts

    @property
    def scores_kept(self) -> bool:
        """Attention without a fused kernel: it keeps its scores and probabilities."""
        return self.shape.softcapped_attention


def norm_bytes(layers: Layers, width: int) -> int:
    """An RMSNorm of `width` numbers: its input in float32, that over its root mean square where the weight is
    trained, and the root."""
    normed = _FLOAT if layers.shape.family.wide_norms else layers.compute
    keeps_normed = layers.all_trained and not layers.fused_norms
    given = layers.compute if layers.fused_norms else _FLOAT
    return given * width + (normed * width if keeps_normed else 0) + _FLOAT


def attention_bytes(layers: Layers, longest: int) -> int:
    """Of one layer up to the attention's output: of every token, because every one is a key. `longest`: tokens of the
    longest row, which all keys of a token lie in."""
    shape, compute = layers.shape, layers.compute
    inputs = norm_bytes(layers, shape.hidden) + compute * shape.hidden
    if layers.scores_kept:  # keys and values of every head; scores, probabilities, and who is hidden
        states = compute * 4 * shape.queries + longest * (2 * _FLOAT * shape.heads + 1)
    else:
        states = compute * (2 * shape.queries + 2 * shape.keys) + _FLOAT * shape.heads  # q, out, k, v, logsumexp
    if shape.family.normed_heads:
        states += (shape.heads + shape.kv_heads) * norm_bytes(layers, shape.head_dim)
    return inputs + states + compute * 3 * (layers.lora_rank or 0)


def feed_forward_bytes(layers: Layers) -> int:
    """Of one layer after its attention: the feed-forward part with its norm, and norms behind either part."""
    shape, compute = layers.shape, layers.compute
    chosen = max(1, shape.experts_per_token)
    kept = 2 if layers.fused_gate else 4  # gate and up; the gate's activation, and their product
    gated = kept * compute * shape.intermediate * chosen
    if shape.experts:  # every expert's input and output, the router's probabilities, and what is chosen by them
        gated += 2 * compute * shape.hidden * chosen + _FLOAT * (shape.experts + 10 * chosen)
    behind = (shape.family.norms - 2) * norm_bytes(layers, shape.hidden)
    inputs = norm_bytes(layers, shape.hidden) + compute * shape.hidden
    return inputs + gated + behind + compute * 4 * (layers.lora_rank or 0)


def saved_bytes(layers: Layers, tokens: int, read: int, longest: int) -> int:
    """Of a forward pass over so many tokens, of which so many positions are read.

    With gradient checkpointing every layer keeps its input, and one at a time all of it while it is computed again.
    """
    shape, compute = layers.shape, layers.compute
    few = few_read(layers, tokens, read)
    attention, feed_forward = attention_bytes(layers, longest), feed_forward_bytes(layers)
    whole = tokens * (attention + feed_forward)
    selected = compute * shape.queries if few < tokens else 0
    last = tokens * attention + few * (feed_forward + selected)
    if layers.checkpointing:
        inside = (shape.layers - 1) * tokens * compute * shape.hidden + (whole if shape.layers > 1 else last)
    else:
        inside = (shape.layers - 1) * whole + last
        if not layers.all_trained:  # nothing before the first adapter has a gradient
            inside -= tokens * norm_bytes(layers, shape.hidden)
            # peft adds the adapters of experts to their weights, and keeps the sum
            inside += shape.layers * shape.expert_parameters * compute
    if layers.balanced:  # the probabilities of all experts, and which sequence a token is part of
        inside += tokens * (shape.layers * _FLOAT * shape.experts + _INDEX)
    ends = few * norm_bytes(layers, shape.hidden) + read * compute * shape.hidden
    rotations = tokens * 2 * shape.head_dim * compute
    return inside + ends + rotations + tokens * 2 * _INDEX + read * 3 * _INDEX


def few_read(layers: Layers, tokens: int, read: int) -> int:
    """The tokens of the last layer's second half: those that are read, where they are few."""
    able = layers.shape.family.norms == 2 and not layers.balanced
    return read if read < READS_FEW_BELOW * tokens and able else tokens


def stream_bytes(layers: Layers, tokens: int) -> int:
    """What comes and goes beside what is saved: the residual stream twice, as states or gradients; with
    checkpointing, also the streams inside the layer that is computed again."""
    streams = 5 if layers.checkpointing else 2
    return tokens * streams * layers.compute * layers.shape.hidden


def attention_gradient_bytes(layers: Layers, tokens: int, read: int) -> int:
    """What the backward pass of the last layer's attention has added to what was saved, less what its feed-forward
    part has let go: gradients of states and output, before and after norms and rotations."""
    shape = layers.shape
    gradients = layers.compute * tokens * (3 * shape.queries + 6 * shape.keys)
    return gradients - few_read(layers, tokens, read) * feed_forward_bytes(layers)


def passing_bytes(layers: Layers, tokens: int) -> int:
    """Most that a pass without gradients holds at once: inside a layer's feed-forward part, or its attention."""
    shape = layers.shape
    streams = 4 * shape.hidden + 2 * shape.head_dim
    feed_forward = 3 * shape.intermediate * max(1, shape.experts_per_token)
    attention = 3 * shape.queries + 4 * shape.keys
    return layers.compute * tokens * (streams + max(feed_forward, attention))
