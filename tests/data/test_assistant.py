"""How assistant turns are found from rendered texts: the odd cases. Published formats: `test_templates.py`.

« and » mark what is trained.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.assistant import common_length
from stages.data.chat import Encoder
from tests.data.characters import TEMPLATE, build_tokenizer
from tests.data.chat_templates import CHATML, LLAMA_3, PLAIN, QWEN_3, trained, turns, unmarked

TALK = [("user", "hi"), ("assistant", "hello you"), ("user", "who"), ("assistant", "me")]
MARKED = {
    "equal turns": (
        CHATML,
        [("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a")],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»\n",
    ),
    # the reasoning that is dropped ends as the answer does
    "qwen 3, shared ends": (
        QWEN_3,
        [("user", "hi"), ("assistant", "<think>\nx\n</think>\n\nx = 5x"), ("user", "c"), ("assistant", "xx")],
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«x = 5x<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nxx<|im_end|>»\n",
    ),
    # a turn without text still ends
    "an empty turn": (
        LLAMA_3,
        [("user", "hi"), ("assistant", " "), ("user", "who"), ("assistant", "me")],
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwho<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«me<|eot_id|>»",
    ),
    # no token ends a turn: what every turn ends with does
    "plain text": (PLAIN, TALK, "user: hi\n\n«assistant: hello you\n\n»user: who\n\n«assistant: me\n\n»"),
}


@pytest.mark.parametrize("name", MARKED)
def test_what_is_trained(name: str) -> None:
    template, talk, expected = MARKED[name]
    assert trained(unmarked(template), turns(*talk)) == expected


WORDS = st.text("abxy<|", min_size=1, max_size=5)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@settings(max_examples=60)
def test_derived_turns_are_the_marked_ones(exchanges: list[tuple[str, str]]) -> None:
    """Of a template with generation markers, and of the same template without them."""
    messages = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    (marked,) = Encoder(build_tokenizer()).assistant_masks([messages], ["r0"])
    (derived,) = Encoder(build_tokenizer(template=unmarked(TEMPLATE))).assistant_masks([messages], ["r0"])
    assert marked == derived


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_common_length(one: str, other: str) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_length(one, other) == expected
