"""What is trained of conversations as published chat templates render them, against turns marked by hand.

Every case holds for the template with generation markers, for the same template without them, and for markers that
leave the end-of-turn token out.
"""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import DataError
from stages.data import RowLedger, tokenize_sequences
from tests.data.characters import dataset
from tests.data.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_3,
    MISTRAL_3,
    PHI_3,
    PHI_4,
    ends_unmarked,
    marked_text,
    tokenizer_of,
    trained,
    unmarked,
)
from tests.data.template_cases import CASES, ONE_CALL, TALK, TWO_CALLS


@pytest.mark.parametrize("variant", [str, unmarked, ends_unmarked], ids=["marked", "unmarked", "ends_unmarked"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_trained(name: str, variant: Any) -> None:
    template, messages, tools, expected = CASES[name]
    assert trained(variant(template), messages, tools) == expected


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        # formats without tools
        (CHATML, ONE_CALL, "the chat template does not show tool calls"),
        (PHI_3, ONE_CALL, "the chat template does not show tool calls"),
        (PHI_4, TWO_CALLS, "the chat template does not show tool calls"),
        (GEMMA, ONE_CALL, "the chat template refuses this conversation: Conversation roles must alternate"),
        (LLAMA_3, TWO_CALLS, "the chat template refuses this conversation: only single tool calls"),
        (MISTRAL_3, TALK[1:], "the chat template refuses this conversation: roles must alternate"),
    ],
)
def test_conversations_that_a_template_cannot_show(template: str, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"row r0: .*{message}"):
        trained(unmarked(template), messages)


ARGUMENTS = "{{ m.tool_calls[0].function.arguments | tojson }}"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            TALK,
            "message 1: the template does not show its content",
        ),
        # what was said is repeated where the user speaks
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %} said: {{ messages[1].content }}",
            TALK,
            "message 1: the template shows its content more than once",
        ),
        # a count at the top changes with the answer
        (
            "{{ messages[1:2] | tojson | length }}{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
            TALK,
            "message 1: its text and that of the message before overlap",
        ),
        # calls look different once the conversation goes on
        (
            f"{{% for m in messages %}}{{% if m.tool_calls %}}{ARGUMENTS}{{{{ ')' if loop.last else ']' }}}}"
            "{% else %}{{ m.role }}{{ m.content }};{% endif %}{% endfor %}",
            ONE_CALL,
            "message 1: the template writes what follows its text in another way once the conversation goes on",
        ),
        (
            f"{{{{ messages | length }}}}{{% for m in messages %}}{{% if m.tool_calls %}}"
            f"{{{{ '(' if loop.last else '[' }}}}{ARGUMENTS};"
            "{% elif m.role == 'assistant' %}{{ m.content }};{% endif %}{% endfor %}",
            ONE_CALL,
            "message 1: the template writes what precedes its text in another way once the conversation goes on",
        ),
        # of several calls, one is shown
        (
            f"{{% for m in messages %}}{{{{ m.role }}}}{{% if m.tool_calls %}}{ARGUMENTS}{{% endif %}}"
            "{{ m.content }};{% endfor %}",
            TWO_CALLS,
            "message 4: the template does not show its tool calls",
        ),
        # the template has only one way to begin an answer
        (
            "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
            "{{ raise_exception('no call') }}{% endif %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
            "{% if messages[0].content != '1+2?' %}{{ raise_exception('no such question') }}{% endif %}{% endfor %}"
            "{{ messages | length }}",
            ONE_CALL,
            "the template refuses the conversation with another turn: row r0: .*no such question",
        ),
    ],
)
def test_templates_that_cannot_be_followed(template: str, messages: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"row r0: assistant_only_loss: .* cannot be told \({reason}\); put"):
        trained(template, messages)


@pytest.mark.parametrize("variant", [str, unmarked, ends_unmarked], ids=["marked", "unmarked", "ends_unmarked"])
def test_the_end_of_turn_is_trained_where_it_is_the_pad_token_too(variant: Any) -> None:
    tokenizer = tokenizer_of(variant(CHATML), eos_token="<|im_end|>", pad_token="<|im_end|>")
    data = dataset("language_modeling", [{"messages": TALK}], True)
    (one,) = tokenize_sequences(data, tokenizer, max_length=None, ledger=RowLedger(), assistant_only_loss=True)
    assert marked_text(tokenizer.convert_ids_to_tokens(one.token_ids), one.loss_mask) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«me<|im_end|>»\n"
    )
