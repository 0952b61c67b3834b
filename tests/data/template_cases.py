"""Conversations as published chat templates render them; « and » stand, by hand, around what is to be trained."""

from __future__ import annotations

from typing import Any

from tests.data.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_3,
    MISTRAL_3,
    MISTRAL_SMALL,
    PHI_3,
    PHI_4,
    QWEN_2_5,
    QWEN_3,
    turns,
)

TALK = turns(("user", "hi"), ("assistant", "hello you"), ("user", "who"), ("assistant", "me"))
LED = [*turns(("system", "be")), *TALK]
SUM: dict[str, Any] = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
SUM_TEXT = '{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}'


def call(content: str, *arguments: dict[str, Any]) -> dict[str, Any]:
    """The assistant calls `sum`, once for each of the arguments."""
    calls = [
        {"id": f"call0000{number}", "type": "function", "function": {"name": "sum", "arguments": given}}
        for number, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "sum"}


ONE_CALL = [
    *turns(("user", "1+2?")),
    call("", {"a": 1, "b": 2}),
    result("3"),
    *turns(("assistant", "It is 3."), ("user", "thanks"), ("assistant", "bye")),
]
TWO_CALLS = [
    *turns(("system", "be"), ("user", "hi"), ("assistant", "hello"), ("user", "1+2, 3+4?")),
    call("Both.", {"a": 1}, {}),
    result("3", 0),
    result("7", 1),
    *turns(("assistant", "3, 7")),
]
CHAIN = [
    *turns(("user", "1+2+3?")),
    call("<think>\none\n</think>\n\n", {"a": 1}),
    result("3"),
    call("<think>\ntwo\n</think>\n\nnow", {"a": 3}),
    result("6"),
    *turns(("assistant", "<think>\nthree\n</think>\n\n6")),
]
THOUGHT = turns(
    ("user", "hi"),
    ("assistant", "<think>\na\n</think>\n\nb"),
    ("user", "c"),
    ("assistant", "<think>\nd\n</think>\n\ne"),
)

CASES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None, str]] = {
    "chatml": (
        CHATML,
        LED,
        None,
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«me<|im_end|>»\n",
    ),
    "qwen 2.5": (
        QWEN_2_5,
        TALK,
        None,
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«me<|im_end|>»\n",
    ),
    # </tool_call> ends no turn, though it is an added token
    "qwen 2.5, a call": (
        QWEN_2_5,
        ONE_CALL,
        [SUM],
        f"<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n{SUM_TEXT}\n</tools><|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«It is 3.<|im_end|>»\n<|im_start|>user\nthanks<|im_end|>\n"
        "<|im_start|>assistant\n«bye<|im_end|>»\n",
    ),
    "qwen 2.5, two calls and words": (
        QWEN_2_5,
        TWO_CALLS,
        [SUM],
        f"<|im_start|>system\nbe\n\n# Tools\n\n<tools>\n{SUM_TEXT}\n</tools><|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«hello<|im_end|>»\n"
        "<|im_start|>user\n1+2, 3+4?<|im_end|>\n<|im_start|>assistant\n"
        '«Both.\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«3, 7<|im_end|>»\n",
    ),
    "qwen 3": (
        QWEN_3,
        LED,
        None,
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n«hello you<|im_end|>»\n"
        "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nme<|im_end|>»\n",
    ),
    "qwen 3, thinking": (
        QWEN_3,
        THOUGHT,
        None,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«<think>\nd\n</think>\n\ne<|im_end|>»\n",
    ),
    # no question comes after the first, so all reasoning stays
    "qwen 3, thinking between calls": (
        QWEN_3,
        CHAIN,
        [SUM],
        f"<|im_start|>system\n# Tools\n\n<tools>\n{SUM_TEXT}\n</tools><|im_end|>\n"
        "<|im_start|>user\n1+2+3?<|im_end|>\n<|im_start|>assistant\n"
        '«<think>\none\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        '«<think>\ntwo\n</think>\n\nnow\n<tool_call>\n{"name": "sum", "arguments": {"a": 3}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nthree\n</think>\n\n6<|im_end|>»\n",
    ),
    # of turns before the last question the reasoning is dropped, of their calls too
    "qwen 3, a question after calls": (
        QWEN_3,
        [*CHAIN[:3], *turns(("assistant", "<think>\ntwo\n</think>\n\n3"), ("user", "ok"), ("assistant", "bye"))],
        None,
        "<|im_start|>user\n1+2+3?<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n"
        "<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nbye<|im_end|>»\n",
    ),
    "llama 3": (
        LLAMA_3,
        LED,
        None,
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\nbe<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«hello you<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwho<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«me<|eot_id|>»",
    ),
    "llama 3, a call": (
        LLAMA_3,
        ONE_CALL,
        [SUM],
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: December 2023"
        f"\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nFunctions:\n\n{SUM_TEXT}\n\n1+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '«{"name": "sum", "parameters": {"a": 1, "b": 2}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It is 3.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nthanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«bye<|eot_id|>»",
    ),
    # the system message moves to the last question: what asks for the first answer is no beginning of the whole
    "mistral": (
        MISTRAL_3,
        LED,
        None,
        "<s>[INST] hi[/INST]« hello you</s>»[INST] be\n\nwho[/INST]« me</s>»",
    ),
    "mistral, a call": (
        MISTRAL_3,
        ONE_CALL,
        [SUM],
        '<s>[INST] 1+2?[/INST]«[TOOL_CALLS] [{"name": "sum", "arguments": {"a": 1, "b": 2}, "id": "call00000"}]</s>»'
        '[TOOL_RESULTS] {"content": 3, "call_id": "call00000"}[/TOOL_RESULTS]« It is 3.</s>»'
        f"[AVAILABLE_TOOLS] [{SUM_TEXT}][/AVAILABLE_TOOLS][INST] thanks[/INST]« bye</s>»",
    ),
    # words beside the calls are not shown
    "mistral, two calls": (
        MISTRAL_3,
        TWO_CALLS,
        [SUM],
        f"<s>[INST] hi[/INST]« hello</s>»[AVAILABLE_TOOLS] [{SUM_TEXT}][/AVAILABLE_TOOLS]"
        '[INST] be\n\n1+2, 3+4?[/INST]«[TOOL_CALLS] [{"name": "sum", "arguments": {"a": 1}, "id": "call00000"}, '
        '{"name": "sum", "arguments": {}, "id": "call00001"}]</s>»'
        '[TOOL_RESULTS] {"content": 3, "call_id": "call00000"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": 7, "call_id": "call00001"}[/TOOL_RESULTS]« 3, 7</s>»',
    ),
    "mistral small": (
        MISTRAL_SMALL,
        TWO_CALLS,
        [SUM],
        f"<s>[SYSTEM_PROMPT]be[/SYSTEM_PROMPT][INST]hi[/INST]«hello</s>»[AVAILABLE_TOOLS][{SUM_TEXT}]"
        '[/AVAILABLE_TOOLS][INST]1+2, 3+4?[/INST]«Both.[TOOL_CALLS]sum[ARGS]{"a": 1}[TOOL_CALLS]sum[ARGS]{}</s>»'
        "[TOOL_RESULTS]call00000[TOOL_CONTENT]3[/TOOL_RESULTS][TOOL_RESULTS]call00001[TOOL_CONTENT]7[/TOOL_RESULTS]"
        "«3, 7</s>»",
    ),
    "gemma": (
        GEMMA,
        [*LED[:4], *turns(("assistant", " me \n"))],
        None,
        "<s><start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\n«hello you<end_of_turn>»\n"
        "<start_of_turn>user\nwho<end_of_turn>\n<start_of_turn>model\n«me<end_of_turn>»\n",
    ),
    "phi 3": (
        PHI_3,
        LED,
        None,
        "<|system|>\nbe<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n«hello you<|end|>»\n"
        "<|user|>\nwho<|end|>\n<|assistant|>\n«me<|end|>»\n</s>",
    ),
    "phi 4": (
        PHI_4,
        LED,
        None,
        "<|im_start|>system<|im_sep|>be<|im_end|><|im_start|>user<|im_sep|>hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«hello you<|im_end|>»<|im_start|>user<|im_sep|>who<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«me<|im_end|>»",
    ),
}
