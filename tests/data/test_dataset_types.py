"""Every dataset type from a file to the loss of its first step, which plain transformers must give as well.

The rows go through `normalize` and then train in the stage that takes their type. What the model should see of them is
written by hand: text is its characters, a user's message is `<text`, the assistant's `>text$`, a tool's or the system's
`=text`; $ is the end token, which is the pad token too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState

from stages.data.dataset import read_dataset
from stages.training.classifiers import load_reward_model, load_step_judge
from tests.data.characters import build_tokenizer, ids
from tests.stages.normalized import Normalized, assistant, system, user
from tests.stages.small_models import output, read_lines, run_stage, save_model

BETA, SEED = 0.4, 3
# schemas as the names of what may be called, calls as name, argument and its value
TEMPLATE = (
    "{% for tool in tools or [] %}={{ tool.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}>{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %}{{ name }}{{ value }}{% endfor %}{% endfor %}<eos>"
    "{% elif m.role == 'user' %}<{{ m.content }}{% else %}={{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Models:
    """Folders, and the same two models as transformers loads them."""

    model: Path
    reference: Path
    policy: Any
    fixed: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    policy, fixed = save_model(folder / "model", seed=1), save_model(folder / "reference", seed=2)
    for name in ("model", "reference"):
        build_tokenizer(template=TEMPLATE).save_pretrained(folder / name)
    return Models(folder / "model", folder / "reference", policy, fixed)


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def logprob(model: Any, prompt: str, completion: str) -> float:
    """Of the completion's tokens after the prompt's, from full logits."""
    tokens = ids(prompt + completion)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(len(prompt), len(tokens)))


def log_sigmoid(value: float) -> float:
    return float(torch.nn.functional.logsigmoid(torch.tensor(value, dtype=torch.float64)))


# what is seen of a row -> the loss of a step over all rows


def of_marked(models: Models, seen: list[str]) -> float:
    """Cross-entropy of what stands between « and »."""
    total, count = 0.0, 0
    for text in seen:
        before = ""
        for piece in text.split("»"):
            given, _, trained = piece.partition("«")
            before += given
            total -= logprob(models.policy, before, trained) if trained else 0.0
            before, count = before + trained, count + len(trained)
    return total / count


def of_pairs(models: Models, seen: list[tuple[str, str, str]]) -> float:
    """DPO against the other model."""
    losses = []
    for prompt, *completions in seen:
        chosen, rejected = (
            logprob(models.policy, prompt, text) - logprob(models.fixed, prompt, text) for text in completions
        )
        losses.append(-log_sigmoid(BETA * (chosen - rejected)))
    return sum(losses) / len(losses)


def of_scores(models: Models, seen: list[tuple[str, str, str]]) -> float:
    """Bradley-Terry on the last token's score under a fresh head."""
    judge = load_reward_model(models.model, new_head_seed=SEED).eval()
    losses = []
    for prompt, *completions in seen:
        with torch.no_grad():
            chosen, rejected = (
                float(judge(input_ids=torch.tensor([ids(prompt + text)])).logits[0, 0]) for text in completions
            )
        losses.append(-log_sigmoid(chosen - rejected))
    return sum(losses) / len(losses)


def of_triples(models: Models, seen: list[tuple[str, str, str, str]]) -> float:
    """TPO: without a reference, and the mean log-probability of the gold completion's tokens."""
    losses = []
    for prompt, chosen, rejected, gold in seen:
        ratio = logprob(models.policy, prompt, chosen) - logprob(models.policy, prompt, rejected)
        losses.append(-log_sigmoid(BETA * ratio) - logprob(models.policy, prompt, gold) / len(gold))
    return sum(losses) / len(losses)


def of_judged(models: Models, seen: list[tuple[str, str, bool]]) -> float:
    """APO-zero: 1 - sigmoid of the reward of desirable completions, the sigmoid itself of the others."""
    losses = []
    for prompt, text, desirable in seen:
        reward = BETA * (logprob(models.policy, prompt, text) - logprob(models.fixed, prompt, text))
        losses.append(1 / (1 + torch.tensor(reward if desirable else -reward).exp().item()))
    return sum(losses) / len(losses)


def of_steps(models: Models, seen: list[tuple[str, list[str], list[bool]]]) -> float:
    """Cross-entropy of the labels at every separator, h."""
    judge = load_step_judge(models.model, new_head_seed=SEED).eval()
    losses: list[float] = []
    for prompt, steps, labels in seen:
        with torch.no_grad():
            logits = judge(input_ids=torch.tensor([ids(prompt + "".join(step + "h" for step in steps))])).logits[0]
        end = len(prompt) - 1
        for step, label in zip(steps, labels, strict=True):
            end += len(step) + 1
            losses.append(-float(logits[end].log_softmax(-1)[int(label)]))
    return sum(losses) / len(losses)


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


def pairs(rows: list[Row], seen: list[Any], kind: str = "preference") -> dict[str, Case]:
    """By all three stages that take pairs."""
    judged = [
        (prompt, text, kept) for prompt, chosen, rejected in seen for text, kept in ((chosen, True), (rejected, False))
    ]
    return {
        "preference": Case(rows, kind, seen, "preference", of_pairs, {"beta": BETA}, reference=True),
        "reward": Case(rows, kind, seen, "reward_model", of_scores),
        "unpaired": Case(rows, kind, judged, "unpaired_preference", of_judged, UNPAIRED, reference=True),
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


def normalized(folder: Path, rows: list[Row], kind: str, file_type: str) -> Path:
    folder.mkdir()
    path = folder / f"rows.{file_type}"
    if file_type == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Normalized(folder, path, type=kind)
    return folder / "job" / "out" / "train"


@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_that_of_transformers(tmp_path: Path, models: Models, name: str) -> None:
    case = CASES[name]
    dataset = normalized(tmp_path / "rows", case.rows, case.given_type, "jsonl")
    assert read_dataset(dataset).type == case.type
    # the same shape in Parquet gives the same typed rows
    columnar = normalized(tmp_path / "columns", case.rows, case.given_type, "parquet")
    without_ids = [[{**row, "row_id": ""} for row in read_dataset(folder)] for folder in (dataset, columnar)]
    assert without_ids[0] == without_ids[1]
    inputs = {"model": models.model, "dataset": dataset} | ({"reference": models.reference} if case.reference else {})
    batch = {"train_batch_size": len(case.seen), "num_train_epochs": 2}
    settings = {"learning_rate": 1e-3, "seed": SEED, **batch, **case.settings}
    context = run_stage(case.stage, tmp_path / "run", inputs, **settings)
    first, second = read_lines(output(context, "model") / "metrics.jsonl")
    assert first["loss"] == pytest.approx(case.loss(models, case.seen), rel=1e-5)
    assert second["loss"] < first["loss"]


PROMPTS = {
    "prompt": ([{"prompt": "ab"}, {"prompt": "e"}], ["ab", "e"]),
    "prompt, conversational": ([{"prompt": [user("ab")]}, {"prompt": TALK[:4]}], ["<ab>", "=h<ab>cd$<e>"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_answered_from_where_the_model_goes_on(tmp_path: Path, models: Models, name: str) -> None:
    """What was sampled has the probability that transformers gives it behind the prompt; the loss is its advantage."""
    rows, seen = PROMPTS[name]
    (tmp_path / "reward.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(str(one))) for one in completions]\n"
    )
    dataset = normalized(tmp_path / "rows", rows, "auto", "jsonl")
    assert read_dataset(dataset).type == "prompt"
    settings = {"train_batch_size": 8, "num_generations": 4, "max_completion_length": 3, "max_steps": 2}
    rewards = {"rewards": [f"{tmp_path / 'reward.py'}:length"], "learning_rate": 1e-3}
    context = run_stage("rl", tmp_path / "run", {"model": models.model, "dataset": dataset}, **settings, **rewards)
    first = [row for row in read_dataset(output(context, "rollouts")) if row["step"] == 1]
    prompts = dict(zip((json.dumps(row["prompt"]) for row in rows), map(ids, seen), strict=True))
    for row in first:
        prompt = prompts[json.dumps(row["prompt"])]
        with torch.no_grad():
            logits = models.policy(input_ids=torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(-1)
        forced = [float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(row["token_ids"])]
        assert row["logprobs"] == pytest.approx(forced, abs=1e-4)
    lengths = [len(row["token_ids"]) for row in first]
    weighed = sum(row["advantage"] * length for row, length in zip(first, lengths, strict=True))
    loss = read_lines(output(context, "model") / "metrics.jsonl")[0]["loss"]
    assert loss == pytest.approx(-weighed / sum(lengths), rel=1e-4, abs=1e-6)
