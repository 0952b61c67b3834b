"""What happens in the process of one program, after it has been confined: run it, and send values back as data.

The program shares this process and can send what it likes. It gains nothing by that: it knows what was asked, never
what is expected, and nothing it sends is more than a value.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from stages.rollouts.sandbox.values import encode

NAME = "solution"
"""The module that a program is, where its functions are called."""
MESSAGE = 300
"""Characters of an error's text."""


def call(source: str, expressions: list[str], channel: int) -> None:
    """Run the source as a module; write the value of each expression, one JSON line each, in order."""
    module = _module(NAME)
    try:
        exec(compile(source, f"<{NAME}>", "exec"), module.__dict__)
    except BaseException as error:
        for _ in expressions:
            _send(channel, {"error": _described(error)})
        return
    for expression in expressions:
        _send(channel, _outcome(lambda code: eval(code, module.__dict__), expression))


def main(source: str) -> int:
    """Run the source as a main program on this process's standard streams; its exit code."""
    try:
        exec(compile(source, "<program>", "exec"), _module("__main__").__dict__)
        _join_threads()
    except SystemExit as exit:
        return 0 if exit.code is None else exit.code if isinstance(exit.code, int) else 1
    except BaseException as error:
        print(_described(error), file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _outcome(evaluate: Callable[[Any], Any], expression: str) -> dict[str, Any]:
    try:
        return {"value": encode(evaluate(compile(expression, "<test>", "eval")))}
    except BaseException as error:
        return {"error": _described(error)}


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MESSAGE]
    except BaseException:
        return "an error that cannot be described"


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _join_threads() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _send(channel: int, line: dict[str, Any]) -> None:
    rest = memoryview(json.dumps(line).encode() + b"\n")
    while rest:
        rest = rest[os.write(channel, rest) :]
