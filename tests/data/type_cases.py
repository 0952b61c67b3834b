"""Rows of every dataset type, what a model sees of them, written by hand, and the stage that trains them.

Text is its characters, a user's message is `<text`, the assistant's `>text$`, a tool's or the system's `=text`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.data.characters import ids
from tests.data.type_losses import (
    BETA,
    Models,
    of_judged,
    of_marked,
    of_pairs,
    of_scores,
    of_steps,
    of_triples,
)
from tests.stages.normalized import assistant, system, user

Row = dict[str, Any]

# schemas as the names of what may be called, calls as name, argument and its value; == is a thought that is left out
NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}=={% endif %}"
TEMPLATE = (
    "{% for tool in tools or [] %}={{ tool.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}>"
    + NO_THOUGHT
    + "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %}{{ name }}{{ value }}{% endfor %}{% endfor %}<eos>"
    "{% elif m.role == 'user' %}<{{ m.content }}{% else %}={{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>" + NO_THOUGHT + "{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """Rows of a file, the type that `normalize` finds them to have, what a model sees of them, and who trains it."""

    rows: list[Row]
    type: str
    seen: list[Any]
    stage: str
    loss: Callable[[Models, Any], float]
    settings: Row = field(default_factory=dict)
    given_type: str = "auto"
    reference: bool = False


def pairs(rows: list[Row], seen: list[Any]) -> dict[str, Case]:
    """By all three stages that take pairs."""
    judged = [
        (prompt, text, kept) for prompt, chosen, rejected in seen for text, kept in ((chosen, True), (rejected, False))
    ]
    return {
        "preference": Case(rows, "preference", seen, "preference", of_pairs, {"beta": BETA}, reference=True),
        "reward": Case(rows, "preference", seen, "reward_model", of_scores),
        "unpaired": Case(rows, "preference", judged, "unpaired_preference", of_judged, UNPAIRED, reference=True),
    }


def call(name: str, argument: str, value: str) -> Row:
    """The assistant calls a tool; arguments are JSON text, as OpenAI has them and as Parquet needs them."""
    made = {"type": "function", "function": {"name": name, "arguments": json.dumps({argument: value})}}
    return {"role": "assistant", "content": "", "tool_calls": [made]}


RESULT = {"role": "tool", "content": "d"}
UNPAIRED = {"loss_type": "apo_zero_unpaired", "beta": BETA}
TALK = [system("h"), user("ab"), assistant("cd"), user("e"), assistant("f")]
PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "e"},
    {"prompt": "f", "chosen": "g", "rejected": "haa"},
]
CHAT_PAIRS = [
    {"prompt": [user("ab")], "chosen": [assistant("cd")], "rejected": [assistant("e")]},
    {"prompt": TALK[:4], "chosen": [assistant("g")], "rejected": [assistant("haa")]},
]
CHAT_PAIRS_SEEN = [("<ab>", "cd$", "e$"), ("=h<ab>cd$<e>", "g$", "haa$")]
SEVERAL = {
    "preference": pairs(PAIRS, [("ab", "cd$", "e$"), ("f", "g$", "haa$")]),
    "preference, conversational": pairs(CHAT_PAIRS, CHAT_PAIRS_SEEN),
    # a space before the place where they part belongs to the completions
    "preference, implicit prompt": pairs(
        [{"chosen": "ab cd", "rejected": "ab e"}, {"chosen": "fg", "rejected": "fhaa"}],
        [("ab", " cd$", " e$"), ("f", "g$", "haa$")],
    ),
    "preference, implicit prompt, conversational": pairs(
        [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHAT_PAIRS], CHAT_PAIRS_SEEN
    ),
}
WITH_TOOLS = [
    {"messages": [user("b"), call("a", "b", "c"), RESULT, assistant("e")], "tools": [{"function": {"name": "a"}}]},
    {"messages": [user("g"), call("h", "f", "a"), RESULT, assistant("d")], "tools": [{"function": {"name": "h"}}]},
]
THOUGHTLESS: Row = {"chat_template_kwargs": {"enable_thinking": False}}
THOUGHTFUL: Row = {"chat_template_kwargs": {"enable_thinking": True}}
CASES = {
    "language modeling": Case(
        [{"text": "abc"}, {"text": "de"}], "language_modeling", ["a«bc$»", "d«e$»"], "sft", of_marked
    ),
    "language modeling, conversational": Case(
        [{"messages": TALK}, {"messages": [user("a"), assistant("b")]}],
        "language_modeling",
        ["=«h<ab>cd$<e>f$»", "<«a>b$»"],
        "sft",
        of_marked,
    ),
    "language modeling, conversational, assistant only": Case(
        [{"messages": TALK}, {"messages": [user("a"), assistant("b")]}],
        "language_modeling",
        ["=h<ab>«cd$»<e>«f$»", "<a>«b$»"],
        "sft",
        of_marked,
        {"assistant_only_loss": True},
    ),
    "language modeling with tools": Case(
        WITH_TOOLS, "language_modeling", ["=«a<b>abc$=d>e$»", "=«h<g>hfa$=d>d$»"], "sft", of_marked
    ),
    "language modeling with tools, assistant only": Case(
        WITH_TOOLS,
        "language_modeling",
        ["=a<b>«abc$»=d>«e$»", "=h<g>«hfa$»=d>«d$»"],
        "sft",
        of_marked,
        {"assistant_only_loss": True},
    ),
    "prompt-completion with tools": Case(
        [
            {"prompt": row["messages"][:end], "completion": row["messages"][end:], "tools": row["tools"]}
            for row, end in zip(WITH_TOOLS, (1, 3), strict=True)
        ],
        "prompt_completion",
        ["=a<b>«abc$=d>e$»", "=h<g>hfa$=d>«d$»"],
        "sft",
        of_marked,
    ),
    "prompt-completion with arguments of the template": Case(
        [
            {"prompt": [user("ab")], "completion": [assistant("cd")], **THOUGHTLESS},
            {"prompt": [user("e")], "completion": [assistant("f")], **THOUGHTFUL},
        ],
        "prompt_completion",
        ["<ab>==«cd$»", "<e>«f$»"],
        "sft",
        of_marked,
    ),
    "language modeling with arguments of the template, assistant only": Case(
        [{"messages": TALK, **THOUGHTLESS}, {"messages": TALK, **THOUGHTFUL}],
        "language_modeling",
        ["=h<ab>==«cd$»<e>==«f$»", "=h<ab>«cd$»<e>«f$»"],
        "sft",
        of_marked,
        {"assistant_only_loss": True},
    ),
    "preference with tools": Case(
        [
            {"prompt": WITH_TOOLS[0]["messages"][:1], "chosen": [call("a", "b", "c")], "rejected": [assistant("e")]}
            | {"tools": WITH_TOOLS[0]["tools"]}
        ],
        "preference",
        [("=a<b>", "abc$", "e$")],
        "preference",
        of_pairs,
        {"beta": BETA},
        reference=True,
    ),
    "prompt-completion": Case(
        [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}],
        "prompt_completion",
        ["ab«cd$»", "e«f$»"],
        "sft",
        of_marked,
    ),
    "prompt-completion, conversational": Case(
        [
            {"prompt": [user("ab")], "completion": [assistant("cd")]},
            {"prompt": TALK[:2], "completion": TALK[2:]},
        ],
        "prompt_completion",
        ["<ab>«cd$»", "=h<ab>«cd$<e>f$»"],
        "sft",
        of_marked,
    ),
    "unpaired preference": Case(
        [
            {"prompt": "ab", "completion": "cd", "label": True},
            {"prompt": "f", "completion": "haa", "label": False},
            {"prompt": "e", "completion": "g", "label": True},
        ],
        "unpaired_preference",
        [("ab", "cd$", True), ("f", "haa$", False), ("e", "g$", True)],
        "unpaired_preference",
        of_judged,
        UNPAIRED,
        reference=True,
    ),
    "unpaired preference, conversational": Case(
        [
            {"prompt": [user("ab")], "completion": [assistant("cd")], "label": False},
            {"prompt": TALK[:4], "completion": [assistant("g")], "label": True},
        ],
        "unpaired_preference",
        [("<ab>", "cd$", False), ("=h<ab>cd$<e>", "g$", True)],
        "unpaired_preference",
        of_judged,
        UNPAIRED,
        reference=True,
    ),
    "triple preference": Case(
        [{**PAIRS[0], "reference": "gg"}, {**PAIRS[1], "reference": "a"}],
        "triple_preference",
        [("ab", "cd$", "e$", "gg$"), ("f", "g$", "haa$", "a$")],
        "preference",
        of_triples,
        {"loss_type": "tpo", "beta": BETA},
        given_type="triple_preference",
    ),
    "triple preference, conversational": Case(
        [
            {**CHAT_PAIRS[0], "reference": [assistant("gg")]},
            {**CHAT_PAIRS[1], "reference": [assistant("a")]},
        ],
        "triple_preference",
        [("<ab>", "cd$", "e$", "gg$"), ("=h<ab>cd$<e>", "g$", "haa$", "a$")],
        "preference",
        of_triples,
        {"loss_type": "tpo", "beta": BETA},
        given_type="triple_preference",
    ),
    "stepwise supervision": Case(
        [
            {"prompt": "ab", "completions": ["cd", "e"], "labels": [True, False]},
            {"prompt": "f", "completions": ["g"], "labels": [False]},
        ],
        "stepwise_supervision",
        [("ab", ["cd", "e"], [True, False]), ("f", ["g"], [False])],
        "process_reward_model",
        of_steps,
        {"step_separator": "h"},
    ),
    "pre-tokenized": Case(
        [{"input_ids": ids("abc$")}, {"input_ids": ids("de")}], "pretokenized", ["a«bc$»", "d«e»"], "sft", of_marked
    ),
    "pre-tokenized with labels": Case(
        [{"input_ids": ids("abc$"), "labels": [-100, -100, *ids("c$")]}, {"input_ids": ids("de"), "labels": ids("de")}],
        "pretokenized",
        ["ab«c$»", "d«e»"],
        "sft",
        of_marked,
    ),
    "pre-tokenized with a mask of the completion": Case(
        [
            {"input_ids": ids("abc$"), "completion_mask": [0, 0, 1, 1]},
            {"input_ids": ids("de"), "completion_mask": [0, 1]},
        ],
        "pretokenized",
        ["ab«c$»", "d«e»"],
        "sft",
        of_marked,
    ),
    "pre-tokenized with a mask of the assistant": Case(
        [
            {"input_ids": ids("<a>b$<c>d$"), "assistant_masks": [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]},
            {"input_ids": ids("de"), "assistant_masks": [0, 1]},
        ],
        "pretokenized",
        ["<a>«b$»<c>«d$»", "d«e»"],
        "sft",
        of_marked,
        {"assistant_only_loss": True},
    ),
    "pre-tokenized preference": Case(
        [
            {"prompt_ids": ids("ab"), "chosen_ids": ids("cd$"), "rejected_ids": ids("e")},
            {"prompt_ids": ids("f"), "chosen_ids": ids("g$"), "rejected_ids": ids("haa$")},
        ],
        "pretokenized_preference",
        [("ab", "cd$", "e"), ("f", "g$", "haa$")],
        "preference",
        of_pairs,
        {"beta": BETA},
        reference=True,
    ),
    "pre-tokenized preference, implicit prompt": Case(
        [
            {"chosen_ids": ids("abcd$"), "rejected_ids": ids("abe$")},
            {"chosen_ids": ids("fg"), "rejected_ids": ids("fhaa")},
        ],
        "pretokenized_preference",
        [("ab", "cd$", "e$"), ("f", "g", "haa")],
        "reward_model",
        of_scores,
    ),
    **{f"{name}: {stage}": case for name, cases in SEVERAL.items() for stage, case in cases.items()},
}

# the prompt, and what the teacher sees of it under CONTEXT_TEMPLATE
CONTEXT_TEMPLATE = "{privileged_context} {prompt}h"
PRIVILEGED = {
    "privileged context": (
        [{"prompt": "ab", "privileged_context": "cde"}, {"prompt": "e", "privileged_context": "f"}],
        [("ab", "cde abh"), ("e", "f eh")],
    ),
    "privileged context, conversational": (
        [
            {"prompt": [user("ab")], "privileged_context": [assistant("cde")]},
            {"prompt": TALK[:4], "privileged_context": [user("f")]},
        ],
        [("<ab>", "<cde abh>"), ("=h<ab>cd$<e>", "=h<ab>cd$<f eh>")],
    ),
}

PROMPTS = {
    "prompt": ([{"prompt": "ab"}, {"prompt": "e"}], ["ab", "e"]),
    "prompt, conversational": ([{"prompt": [user("ab")]}, {"prompt": TALK[:4]}], ["<ab>", "=h<ab>cd$<e>"]),
    "prompt with arguments of the template": (
        [{"prompt": [user("ab")], **THOUGHTLESS}, {"prompt": TALK[:4], **THOUGHTFUL}],
        ["<ab>==", "=h<ab>cd$<e>"],
    ),
}
