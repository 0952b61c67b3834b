"""Assistant turns in conversations as published chat templates render them, against turns marked by hand.

The templates are written here from the formats that the models' cards describe; « and » mark what is trained.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from artifacts.errors import DataError
from stages.data.assistant import common_length
from stages.data.chat import Encoder
from tests.data.characters import TEMPLATE, build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_2_5 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
# earlier turns lose their reasoning; the last one shows it, or an empty one
QWEN_3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}{% set parts = m.content.split('</think>') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}<|im_start|>assistant\n<think>\n{{ thought }}\n</think>\n\n{{ said }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{{ said }}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# no generation prompt of its own: the model answers after [/INST]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# a conversation that waits for no answer ends with the end of the text
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"

TALK = [("user", "hi"), ("assistant", "hello you"), ("user", "who"), ("assistant", "me")]
THOUGHT = [
    ("user", "hi"),
    ("assistant", "<think>\na\n</think>\n\nb"),
    ("user", "c"),
    ("assistant", "<think>\nd\n</think>\n\ne"),
]
MARKED = {
    "chatml": (
        CHATML,
        TALK,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«me<|im_end|>»\n",
    ),
    "qwen 2.5": (
        QWEN_2_5,
        TALK[:2],
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«hello you<|im_end|>»\n",
    ),
    "qwen 3": (
        QWEN_3,
        TALK,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nme<|im_end|>»\n",
    ),
    "qwen 3, thinking": (
        QWEN_3,
        THOUGHT,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«<think>\nd\n</think>\n\ne<|im_end|>»\n",
    ),
    "llama 3": (
        LLAMA_3,
        [("system", "be"), *TALK],
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«hello you<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwho<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«me<|eot_id|>»",
    ),
    "mistral": (MISTRAL, TALK, "<s>[INST] hi[/INST]« hello you</s>»[INST] who[/INST]« me</s>»"),
    "gemma": (
        GEMMA,
        [*TALK[:3], ("assistant", " me \n")],
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«hello you<end_of_turn>»\n"
        "<start_of_turn>user\nwho<end_of_turn>\n<start_of_turn>model\n«me<end_of_turn>»\n",
    ),
    "phi 3": (
        PHI_3,
        TALK,
        "<|user|>\nhi<|end|>\n<|assistant|>\n«hello you<|end|>»\n"
        "<|user|>\nwho<|end|>\n<|assistant|>\n«me<|end|>»\n</s>",
    ),
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
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwho<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«me<|eot_id|>»",
    ),
    # no token ends a turn: what every turn ends with does
    "plain text": (PLAIN, TALK, "user: hi\n\n«assistant: hello you\n\n»user: who\n\n«assistant: me\n\n»"),
}
ADDED = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip


def tokenizer_of(template: str) -> Any:
    """One token a character, and one for each of the models' special tokens."""
    characters = {chr(code): place for place, code in enumerate([10, *range(32, 127)])}
    backend = Tokenizer(models.WordLevel({**characters, "<unk>": len(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=ADDED
    )
    tokenizer.chat_template = template
    return tokenizer


def trained(template: str, turns: list[tuple[str, str]]) -> str:
    """The rendered conversation with « and » around runs of trained tokens."""
    tokenizer = tokenizer_of(template)
    messages = [{"role": role, "content": content} for role, content in turns]
    ((ids, mask),) = Encoder(tokenizer).assistant_masks([messages], ["r0"])
    text, before = "", False
    for token, now in zip(ids, mask, strict=True):
        text += ("«" if now and not before else "»" if before and not now else "") + tokenizer.convert_ids_to_tokens(
            token
        )
        before = now
    return text + ("»" if before else "")


@pytest.mark.parametrize("name", MARKED)
def test_what_is_trained(name: str) -> None:
    template, turns, expected = MARKED[name]
    assert trained(template, turns) == expected


WORDS = st.text("abxy<|", min_size=1, max_size=5)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_derived_turns_are_the_marked_ones(exchanges: list[tuple[str, str]]) -> None:
    """Of a template with generation markers, and of the same template without them."""
    unmarked = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    messages = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    (marked,) = Encoder(build_tokenizer()).assistant_masks([messages], ["r0"])
    (derived,) = Encoder(build_tokenizer(template=unmarked)).assistant_masks([messages], ["r0"])
    assert marked == derived


@pytest.mark.parametrize("shown", ["m.role", "m.content | length"])
def test_a_turn_that_cannot_be_followed(shown: str) -> None:
    template = f"{{% for m in messages %}}{{{{ {shown} }}}}{{% endfor %}}"
    reason = "message 1: the template does not show its content"
    with pytest.raises(DataError, match=rf"row r0: assistant_only_loss: .* cannot be told \({reason}"):
        trained(template, TALK[:2])


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
@settings(deadline=None)
def test_common_length(one: str, other: str) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_length(one, other) == expected
