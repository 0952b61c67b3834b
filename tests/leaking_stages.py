"""Stages that fail in ways in which secrets come out: messages, tracebacks, output, answers of servers, dead processes.

`CODE` is the module `leaking.py` beside the recipe; what it quotes are the canaries of the environment.
"""

from __future__ import annotations

from typing import Any

from tests.bad_stages import ROLLOUT, TRAINING, stage

CODE = '''
import os
import signal
import sys
import warnings

SECRETS = [value for name, value in os.environ.items() if value.startswith("cAnArY")]


def all_of_them():
    """Every secret in one message."""
    yield {"prompt": "a", "completion": "b"}
    raise RuntimeError("cannot go on with " + " and ".join(SECRETS))


def chained():
    """Errors that follow from one another, each with a secret."""
    try:
        raise KeyError(SECRETS[0])
    except KeyError as error:
        raise ValueError(f"https://me:{SECRETS[1]}@host/x?X-Amz-Signature={SECRETS[2]}") from error
    yield {}


def printed():
    """The whole environment on every way out."""
    print(os.environ)
    print(*SECRETS, sep="\\n", file=sys.stderr)
    warnings.warn(SECRETS[3])
    sys.stdout.write("".join(SECRETS))  # without the end of a line
    yield {"prompt": 5}


def killed():
    """By SIGKILL, after it has said too much."""
    print(*SECRETS, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    yield {}


def aborted():
    """By SIGABRT: where core files are on, memory would be written down."""
    print(*SECRETS, flush=True)
    os.abort()
    yield {}


def too_large():
    """As if the memory were full."""
    raise MemoryError("can't allocate memory for " + SECRETS[0])
    yield {}


def quits():
    """An exit whose message is a secret."""
    sys.exit(SECRETS[4])
    yield {}


def told_row():
    """A row that is wrong, and holds a secret as some dumps of databases do."""
    yield {"prompt": ["x", SECRETS[5]], "completion": {SECRETS[6]: SECRETS[7]}}


def waits():
    """Until it is stopped."""
    import time

    print(*SECRETS, flush=True)
    open(os.environ["WAITS"], "w").close()
    time.sleep(600)
    yield {}


def slow(completions, **_):
    """A reward that takes too long, and names a secret meanwhile."""
    import time

    print(*SECRETS, flush=True)
    time.sleep(600)
'''


def from_function(name: str) -> dict[str, Any]:
    return {
        "uses": "normalize",
        "with": {"source": {"function": f"leaking.py:{name}"}, "type": "prompt_completion"},
        "launch": {"retries": 0},
    }


def from_path(**source: str) -> dict[str, Any]:
    return {"uses": "normalize", "with": {"source": source, "type": "prompt_completion"}}


FUNCTIONS = ("all_of_them", "chained", "printed", "killed", "aborted", "too_large", "quits", "told_row")

PRINTS_ALL = """#!/bin/sh
env
env >&2
exit 3
"""
"""Stands for an interpreter that cannot start, and says more than it should."""


def failing_stages(interpreter: str) -> dict[str, dict[str, Any]]:
    """Stages in processes of their own that all fail; `engine` needs `rows` and `base`, and they go well."""
    launcher = {**from_function("all_of_them"), "launch": {"retries": 0, "python": interpreter}}
    learning = {**TRAINING, **ROLLOUT, "rollouts": {"engine": "vllm_server"}, "rewards": ["task.py:length"]}
    engine = {**stage("rl", "rows", learning), "launch": {"retries": 0, "vllm_python": interpreter}}
    return {**{name: from_function(name) for name in FUNCTIONS}, "launcher": launcher, "engine": engine}


def refused_recipes(secret: str, other: str, server: str) -> dict[str, dict[str, Any]]:
    """Recipes of which nothing is started, each with a secret where none belongs, or a server that says it."""
    rows = {"function": "leaking.py:all_of_them"}
    return {
        "a secret for a number": {"uses": "normalize", "with": {"source": rows, "limit": secret}},
        "a secret for a choice": {"uses": "normalize", "with": {"source": rows, "type": secret}},
        "a secret for a field": {"uses": "normalize", "with": {"source": rows, secret: 1}},
        "a secret for a stage": {"uses": secret},
        "a secret in launch": {**from_function("all_of_them"), "launch": {"env": {"HF_TOKEN": secret}}},
        "a file that is a folder": from_path(path="folder.jsonl"),
        "a file named by a secret": from_path(path=f"{secret.replace('/', '_')}/{secret}"),
        "a password in a URL": from_path(path=f"http://me:{other}@{server}/rows.jsonl"),
        "a bucket that refuses": from_path(path="s3://bucket/rows.jsonl"),
        "a Hub that refuses": from_path(path="hub:owner/name", split="train"),
    }
