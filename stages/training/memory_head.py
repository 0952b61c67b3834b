"""What the language-modelling head holds: chunks of logits, the way back to the hidden states, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from stages.training.memory_allocator import Device
from stages.training.memory_shape import ModelShape

_FLOAT = 4
_CHUNK_BYTES = 32 * 2**20
_LEAST_TOKENS = {"cpu": 128, "cuda": 1024}
_KEPT_BYTES = 256 * 2**20
_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""These four as in `stages.losses`, which imports torch and cannot be asked; a test compares them."""
_TENSORS_OF_A_BLOCK = 11
"""That are there at once while the groups of a block are compared, as measured."""


@dataclass(frozen=True)
class HeadUse:
    """How an objective uses the head."""

    together: bool = False
    """No gradient is known before all log-probabilities are (pairs): probabilities are kept, or computed again."""
    teacher: ModelShape | None = None
    """Every chunk of logits has its counterpart of a teacher."""
    groups: bool = False
    """The teacher has a vocabulary of its own, and of the two chunks a block of groups is compared at a time."""
    entropy: bool = False
    """The loss has the entropy in it, or the divergence beside a loss of the token itself: every chunk of logits has
    its exponentials beside it. Where gradients are formed together, the entropy's are formed before them, or the
    divergence's, of the student's chunks and the teacher's."""
    apart: bool = False
    """The comparison with the teacher is a loss beside another of the same pass: its gradients are its own."""


def chunk_bytes(shape: ModelShape, read: int, device: Device) -> int:
    """The logits of one chunk."""
    least = min(_LEAST_TOKENS[device], shape.hidden)
    longest = max(1, least, _CHUNK_BYTES // (_FLOAT * shape.vocabulary))
    parts = -(-read // longest)
    return _FLOAT * shape.vocabulary * -(-read // max(1, parts))


def held_tensors(
    shape: ModelShape,
    use: HeadUse,
    read: int,
    *,
    device: Device,
    compute: int,
    frozen: bool,
    in_place: bool = False,
) -> list[int]:
    """Bytes of every tensor that is held at the end of a forward pass, or when its backward pass begins, whichever is
    more. `in_place`: the weight's gradient is added to that of the passes before."""
    if shape.classifier:
        return []
    weight = _FLOAT * shape.embedding_parameters
    gradients = [] if frozen or in_place else [weight]
    chunk = chunk_bytes(shape, read, device)
    # a CPU would sum products of bfloat16 in bfloat16, so the weight is widened first
    widened = [weight] if device == "cpu" and compute < _FLOAT else []
    teacher = [] if use.teacher is None else [chunk, compute * read * use.teacher.hidden]
    compared = [*gradients, compute * read * shape.hidden] if use.apart else []
    if use.together:
        if use.apart:
            compared += [chunk, *teacher]
        kept = _FLOAT * read * shape.vocabulary
        room = kept if kept <= _KEPT_BYTES and not frozen else chunk
        entropy = [*gradients, chunk, chunk, read * shape.hidden * compute] if use.entropy else []
        states = [] if use.teacher is None or use.apart else [compute * read * use.teacher.hidden]
        held = [room, read * shape.hidden * _FLOAT, read * shape.hidden * compute]
        return [*gradients, *held, *entropy, *states, *widened, *compared]
    if use.groups and use.teacher is not None:
        teacher[0] = chunk_bytes(use.teacher, read, device)
        teacher += [min(_BLOCK_BYTES[device], max(chunk, teacher[0]))] * _TENSORS_OF_A_BLOCK
    beside = [chunk] if use.entropy else []
    return [*gradients, chunk, *beside, *teacher, compute * read * shape.hidden, *widened, *compared]


def scoring_bytes(shape: ModelShape, read: int, *, device: Device) -> int:
    """Without gradients: one chunk, and its hidden states in float32."""
    return 0 if shape.classifier else chunk_bytes(shape, read, device) + _FLOAT * read
