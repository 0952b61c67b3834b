"""Stages that must fail, and what their messages must say; with them sound stages that drop rows."""

from __future__ import annotations

from typing import Any

TRAINING = {"learning_rate": 1e-3, "train_batch_size": 8, "max_length": 48, "max_steps": 3}
DIVERGING = {**TRAINING, "learning_rate": 1e30}
ROLLOUT = {"num_generations": 4, "max_completion_length": 6}

CODE = """
def chats():
    yield {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}

def unanswered():
    yield from chats()
    yield {"messages": [{"role": "user", "content": "1+1="}]}

def unrejected():
    yield {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    yield {"prompt": "1+1=", "chosen": "2"}

def none():
    yield from ()

def long():
    yield {"prompt": "1+1=", "completion": "2", "answer": "2"}
    yield {"prompt": "1" * 30 + "=", "completion": "2", "answer": "2"}

def equal():
    yield {"prompt": "1+1=", "chosen": "2", "rejected": "2"}
    yield {"prompt": "1+1=", "chosen": "x", "rejected": "y"}  # characters that the tokenizer does not know
    yield {"prompt": "1+1=", "chosen": "2", "rejected": "3"}

def all_equal():
    yield {"prompt": "1+1=", "chosen": "x", "rejected": "y"}

def slow(completions, **_):
    import time
    time.sleep(600)

def infinite(completions, **_):
    return [float("inf")] * len(completions)

def misshapen(completions, **_):
    return [[1.0]] * len(completions)

def raises(completions, **_):
    return [1 / (len(completion) - len(completion)) for completion in completions]

def short(completions, **_):
    return [1.0]

def nothing(completions, **_):
    return [None] * len(completions)
"""


def rows_of(function: str, kind: str) -> dict[str, Any]:
    return {"uses": "normalize", "with": {"source": {"function": f"bad.py:{function}"}, "type": kind}}


def stage(uses: str, dataset: str, settings: dict[str, Any], model: str = "base", **inputs: str) -> dict[str, Any]:
    return {"uses": uses, "inputs": {"model": model, "dataset": dataset, **inputs}, "with": settings}


def rewarded(uses: str, function: str, **more: Any) -> dict[str, Any]:
    settings = {**TRAINING, **ROLLOUT} if uses == "rl" else {"limit": 8, "max_completion_length": 6}
    if uses == "sample":
        settings |= {"outputs": ["completions"]}
    reward = f"bad.py:{function}"
    return stage(uses, "rows", {**settings, "rewards": [{"name": reward, **more} if more else reward]})


SOUND = {
    "chats": rows_of("chats", "language_modeling"),
    "long": rows_of("long", "prompt_completion"),
    "equal": rows_of("equal", "preference"),
    "all_equal": rows_of("all_equal", "preference"),
    "some_long": stage("rl", "long", {**TRAINING, **ROLLOUT, "max_length": 8, "rewards": ["task.py:length"]}),
    "some_equal": stage("preference", "equal", TRAINING),
}

NO_TEMPLATE = (
    r"conversational and the tokenizer has no chat template; give the model one with a stage set_chat_template"
)
NAN_WEIGHTS = r"model folder nan: 1 of 32 values of model\.layers\.0\.input_layernorm\.weight are not finite"
TOO_LONG = r"none of the \d+ rows is left after tokenization \(\d+ filtered: prompt too long\); raise max_length"
ALL_EQUAL = r"none of the 1 rows is left .*\(1 filtered: chosen equals rejected\)"
DIVERGED = (
    r"step 2: loss \S+, gradient norm nan; rows [0-9a-f]{24}.* no checkpoint was saved before; lower learning_rate"
)
RAISED = r"'raises' raised ZeroDivisionError: division by zero \(bad\.py:\d+\), for row [0-9a-f]{24}, completion 0: '"

# what is bad: a stage, and what its message must say
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no column": (
        {"uses": "normalize", "with": {"source": {"function": "task.py:rows"}, "type": "preference"}},
        r"row 1: .*'chosen'.*found columns prompt, completion, answer; map it",
    ),
    "empty": (rows_of("none", "prompt_completion"), r"bad\.py:none.*no row"),
    "no rejected": (
        rows_of("unrejected", "preference"),
        r"row 2: field 'rejected': a preference row has no 'rejected'",
    ),
    "no answer": (rows_of("unanswered", "language_modeling"), r"row 2: .*does not end with the assistant; found user"),
    "all too long for rl": (
        stage("rl", "long", {**TRAINING, **ROLLOUT, "max_length": 3, "rewards": ["task.py:length"]}),
        TOO_LONG,
    ),
    "all too long for sample": (
        stage("sample", "long", {"max_length": 3, "max_completion_length": 6, "outputs": ["completions"]}),
        TOO_LONG,
    ),
    "all too long for distill": (
        stage("distill", "long", {**TRAINING, "max_length": 3, "max_completion_length": 6}, teacher="base"),
        TOO_LONG,
    ),
    "all too long for reference_logprobs": (stage("reference_logprobs", "pairs", {"max_length": 3}), TOO_LONG),
    "all equal for preference": (stage("preference", "all_equal", TRAINING), ALL_EQUAL),
    "all equal for reward_model": (stage("reward_model", "all_equal", TRAINING), ALL_EQUAL),
    "no template for sft": (stage("sft", "chats", TRAINING, "./plain"), NO_TEMPLATE),
    "no template for evaluate": (stage("evaluate", "chats", {"tasks": ["loss"]}, "./plain"), NO_TEMPLATE),
    "no weights": (stage("sft", "rows", TRAINING, "./empty"), r"empty: no weights \(model\.safetensors or .*found: "),
    "NaN weights for sft": (stage("sft", "rows", TRAINING, "./nan"), NAN_WEIGHTS),
    "NaN weights for reward_model": (stage("reward_model", "pairs", TRAINING, "./nan"), NAN_WEIGHTS),
    "NaN weights for evaluate": (stage("evaluate", "rows", {"tasks": ["loss"]}, "./nan"), NAN_WEIGHTS),
    "NaN weights for distill": (stage("distill", "rows", {**TRAINING, "lmbda": 0.0}, teacher="./nan"), NAN_WEIGHTS),
    "diverges in sft": (stage("sft", "rows", DIVERGING), DIVERGED),
    "diverges in preference": (stage("preference", "pairs", DIVERGING), DIVERGED),
    "diverges in reward_model": (stage("reward_model", "pairs", DIVERGING), DIVERGED),
    "diverges in distill": (stage("distill", "rows", {**DIVERGING, "lmbda": 0.0}, teacher="some_equal"), DIVERGED),
    "diverges in rl": (stage("rl", "rows", {**DIVERGING, **ROLLOUT, "rewards": ["task.py:length"]}), DIVERGED),
    "reward raises in rl": (rewarded("rl", "raises"), RAISED),
    "reward raises in sample": (rewarded("sample", "raises"), RAISED),
    "reward raises in evaluate": (rewarded("evaluate", "raises"), RAISED),
    "reward of another length": (rewarded("rl", "short"), r"'short' returned 1 values for 8 completions \(rows .*list"),
    "reward infinite": (
        rewarded("rl", "infinite"),
        r"'infinite' returned inf for row [0-9a-f]{24}, completion 0; give",
    ),
    "reward misshapen": (
        rewarded("rl", "misshapen"),
        r"'misshapen' returned \[1\.0\] for row [0-9a-f]{24}, completion 0",
    ),
    "reward slow": (
        rewarded("rl", "slow", timeout_seconds=0.1),
        r"'slow' took longer than its limit, timeout_seconds: 0\.1 for row [0-9a-f]{24}, completion 0: '",
    ),
    "reward None in rl": (rewarded("rl", "nothing"), r"no reward function scored any of 8 completions \(all gave None"),
    "reward None in evaluate": (rewarded("evaluate", "nothing"), r"returned None for all of them; check .*columns"),
}
