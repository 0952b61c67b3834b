"""What stands between two turns, against texts by hand and against the whole conversation rendered at once."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import DataError
from stages.data.continuation import Continuation
from tests.data.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_3,
    MISTRAL_3,
    MISTRAL_SMALL,
    PHI_4,
    PLAIN,
    QWEN_2_5,
    QWEN_3,
    tokenizer_of,
    unmarked,
)

Messages = list[dict[str, Any]]
HIGHER: Messages = [{"role": "user", "content": "higher"}]
THREE: Messages = [{"role": "tool", "name": "sum", "content": "3", "tool_call_id": "call00000"}]
TWO: Messages = [*THREE, {"role": "tool", "name": "sum", "content": "7", "tool_call_id": "call00001"}]

# after the token that ends the assistant's turn
CASES: dict[str, tuple[str, str | None, Messages, str]] = {
    "chatml": (CHATML, None, HIGHER, "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"),
    "qwen 2.5": (QWEN_2_5, None, HIGHER, "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"),
    "qwen 2.5, a result": (
        QWEN_2_5,
        "sum",
        THREE,
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    # results in a row share a turn
    "qwen 3, two results": (
        QWEN_3,
        "sum",
        TWO,
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama 3, a result": (
        LLAMA_3,
        "sum",
        THREE,
        '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    ),
    "mistral 3, a result": (
        MISTRAL_3,
        "sum",
        THREE,
        '[TOOL_RESULTS] {"content": 3, "call_id": "call00000"}[/TOOL_RESULTS]',
    ),
    "mistral small, a result": (
        MISTRAL_SMALL,
        "sum",
        THREE,
        "[TOOL_RESULTS]call00000[TOOL_CONTENT]3[/TOOL_RESULTS]",
    ),
    "mistral 3": (MISTRAL_3, None, HIGHER, "[INST] higher[/INST]"),
    "gemma": (GEMMA, None, HIGHER, "\n<start_of_turn>user\nhigher<end_of_turn>\n<start_of_turn>model\n"),
    "phi 4": (PHI_4, None, HIGHER, "<|im_start|>user<|im_sep|>higher<|im_end|><|im_start|>assistant<|im_sep|>"),
}


@pytest.mark.parametrize("name", CASES)
def test_text_by_hand(name: str) -> None:
    template, called, answers, expected = CASES[name]
    tokenizer = tokenizer_of(unmarked(template))
    ids = Continuation(tokenizer).after_turn(answers, called)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == expected


@pytest.mark.parametrize("name", CASES)
def test_appended_tokens_are_those_of_the_whole_conversation(name: str) -> None:
    """A turn as the template would write it, with the answers behind it, is the conversation rendered at once."""
    template, called, answers, _ = CASES[name]
    tokenizer = tokenizer_of(unmarked(template))
    turn: dict[str, Any] = {"role": "assistant", "content": "5"}
    if called is not None:
        call = {"id": "call00000", "type": "function", "function": {"name": called, "arguments": {"x": 12}}}
        turn = {**turn, "content": "", "tool_calls": [call]}
    talk = [{"role": "user", "content": "what is it?"}, turn]
    whole = tokenizer.apply_chat_template([*talk, *answers], add_generation_prompt=True, return_dict=False)
    ids = Continuation(tokenizer).after_turn(answers, called)
    ended = Continuation(tokenizer).after_turn(answers, called, ended=False)
    assert whole[-len(ids) :] == ids
    # a turn that a stop string ended gets the template's end first
    assert whole[-len(ended) :] == ended and len(ended) == len(ids) + 1


def test_without_a_template_there_are_no_turns() -> None:
    with pytest.raises(DataError, match="need a chat template"):
        Continuation(tokenizer_of(""))


def test_a_template_that_refuses_answers_says_so() -> None:
    refuse = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    template = f"{{% for m in messages %}}{refuse}{{% endfor %}}"
    with pytest.raises(DataError, match=r"refuses the answers .*no tools here"):
        Continuation(tokenizer_of(template + unmarked(CHATML))).after_turn(THREE, None)


def test_plain_text_between_turns() -> None:
    tokenizer = tokenizer_of(PLAIN)
    ids = Continuation(tokenizer).after_turn(HIGHER, None)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "user: higher\n\n"
