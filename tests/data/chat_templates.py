"""Chat templates, written here from the formats that the models' cards and documentation describe (prose shortened).

`{% generation %}` stands around what the model writes. `unmarked` gives the same template without the markers, as
nearly all published ones come; `ends_unmarked` one whose markers leave the end-of-turn token out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.data.chat import Encoder
from stages.data.chat_template import Tools

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_QWEN_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else default_system %}"
    "{% if tools %}<|im_start|>system\n{{ system }}{{ '\n\n' if system }}# Tools\n\n<tools>"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>{{ '\n' }}"
    "{% elif system %}<|im_start|>system\n{{ system }}<|im_end|>{{ '\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "{% for call in m.tool_calls %}{{ '\n' if said or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ '\n' }}</tool_call>{% endfor %}"
)
# results in a row share one turn of the user's
_QWEN_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}{{ '\n' }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
)
_QWEN_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_2_5 = (
    "{% set default_system = 'You are Qwen.' %}" + _QWEN_SYSTEM + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% set said = m.content %}"
    "{% generation %}{{ said }}" + _QWEN_CALLS + "<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}" + _QWEN_RESULT + "{% elif m.role == 'user' or not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}" + _QWEN_PROMPT
)
# turns before the last question lose their reasoning; of those after it, the last one shows even an empty one
QWEN_3 = (
    "{% set default_system = '' %}" + _QWEN_SYSTEM + "{% set ns = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{% set parts = (m.content or '').split('</think>') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "<think>\n{{ thought }}{{ '\n' }}</think>\n\n{% endif %}{{ said }}"
    + _QWEN_CALLS
    + "<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}" + _QWEN_RESULT + "{% elif m.role == 'user' or not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}" + _QWEN_PROMPT
)

# tools stand in the first message of the user's; one call a turn, whose content is not shown
LLAMA_3 = (
    "{{ bos_token }}{% set system = '' %}{% set talk = messages %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set talk = messages[1:] %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython{{ '\n' }}{% endif %}"
    "Cutting Knowledge Date: December 2023\n\n{{ system }}<|eot_id|>"
    "{% for m in talk %}{% if m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% generation %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool calls') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endgeneration %}"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if loop.first and tools %}Functions:\n\n"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n\n' }}{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_MISTRAL_ORDER = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set talk = messages[1:] if system else messages %}{% set ns = namespace(turn=0, asked=0) %}"
    "{% for m in talk %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (ns.turn % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% set ns.turn = ns.turn + 1 %}{% endif %}"
    "{% endfor %}"
)
# system message and tools stand before the last question, wherever that is; no generation prompt
MISTRAL_3 = (
    "{{ bos_token }}" + _MISTRAL_ORDER + "{% for m in talk %}"
    "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.asked %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ system if loop.index0 == ns.asked }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}{% generation %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('tool call ids have 9 characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}{% endgeneration %}"
    "{% elif m.role == 'assistant' %}{% generation %} {{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    '{% else %}[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% endif %}'
    "{% endfor %}"
)
# Mistral Small 3.2: no spaces, a place for the system message, arguments after a token of their own
MISTRAL_SMALL = (
    "{{ bos_token }}" + _MISTRAL_ORDER + "{% if system %}[SYSTEM_PROMPT]{{ system | trim }}[/SYSTEM_PROMPT]{% endif %}"
    "{% for m in talk %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.asked %}[AVAILABLE_TOOLS]"
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}{% for call in m.tool_calls %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)

# the system message begins the first turn of the user's; no tools
GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'assistant' %}<start_of_turn>model\n"
    "{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}{{ '\n' }}"
    "{% else %}<start_of_turn>{{ m.role }}\n{{ system if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# a conversation that waits for no answer ends with the end of the text
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"

# of every family at once; marks of tool calls and reasoning are added tokens too, which end no turn
ADDED = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<tool_call>", "</tool_call>", "<think>",
    "</think>", "<tool_response>", "</tool_response>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|eom_id|>", "<|python_tag|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip


def unmarked(template: str) -> str:
    """As published: without generation markers."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def ends_unmarked(template: str) -> str:
    """With the end-of-turn token behind the markers."""
    for end in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "{{ eos_token }}"):
        template = template.replace(f"{end}{{% endgeneration %}}", f"{{% endgeneration %}}{end}")
    return template


def tokenizer_of(template: str, **tokens: str) -> Any:
    """One token a character, and one for each of the models' special tokens."""
    characters = {chr(code): place for place, code in enumerate([10, *range(32, 127)])}
    backend = Tokenizer(models.WordLevel({**characters, "<unk>": len(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=ADDED, **names)
    tokenizer.chat_template = template
    return tokenizer


def trained(template: str, messages: Sequence[Mapping[str, Any]], tools: Tools = None) -> str:
    """The rendered conversation with « and » around runs of trained tokens."""
    tokenizer = tokenizer_of(template)
    ((ids, mask),) = Encoder(tokenizer).assistant_masks([[dict(message) for message in messages]], ["r0"], [tools])
    return marked_text(tokenizer.convert_ids_to_tokens(ids), mask)


def marked_text(tokens: Sequence[str], mask: Sequence[bool]) -> str:
    text, before = "", False
    for token, now in zip(tokens, mask, strict=True):
        text += ("«" if now and not before else "»" if before and not now else "") + token
        before = now
    return text + ("»" if before else "")


def turns(*talk: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]
