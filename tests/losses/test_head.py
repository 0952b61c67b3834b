"""How the head is cut into chunks, and that its plain expression is the definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stages.losses.head import ChunkedHead, Head, chunk_length, parts_of
from tests.losses.heads import inputs, kinds, log_softmax, make_head


@pytest.mark.parametrize("kind", kinds())
def test_logits_of_chunks_are_those_of_the_plain_expression(kind: dict[str, object]) -> None:
    hidden, weight, bias, _ = inputs()
    head = make_head(weight, bias, kind)
    room = ChunkedHead(head, 7, 3)
    chunks = torch.cat([room.logits(hidden.detach()[part]).clone() for part in room.parts])
    assert_close(chunks, head.logits(hidden).detach(), atol=1e-12, rtol=0)
    assert_close(chunks.log_softmax(-1), log_softmax(hidden, head).detach(), atol=1e-12, rtol=0)


def test_parts_are_even_and_cover_everything() -> None:
    # 10 in parts of at most 4: three, of 3 or 4, not 4 + 4 + 2
    assert parts_of(10, 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert parts_of(3, 4) == [slice(0, 3)]
    assert parts_of(0, 4) == []


def test_a_chunk_is_no_larger_than_32_mib_or_the_weight() -> None:
    def length(vocabulary: int, hidden: int, device: str = "cpu") -> int:
        return chunk_length(Head(torch.empty(1, 1, device="meta").expand(vocabulary, hidden))) if device else 0

    # on devices other than a CPU 1024 positions; the meta device stands for one
    assert length(32_000, 64) == 32 * 2**20 // (4 * 32_000)
    assert length(10**9, 64) == 64
    assert length(10**9, 4096) == 1024
    cpu = Head(torch.empty(1, 1).expand(10**9, 4096))
    assert chunk_length(cpu) == 128
