"""Which failures of a stage are of what it was given, by what they were raised from."""

from __future__ import annotations

import pytest

from artifacts.errors import DataError, OutOfMemory, RequestError, StageError, UnreachableError
from stages.fails_again import fails_again
from stages.rollouts.judge_server import JudgeError
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.vllm_connection import ServerRefusal, ServerSilence


def raised_from(error: Exception, cause: BaseException | None) -> Exception:
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StageError("wrong"), True),
        (DataError("row 3"), True),
        (raised_from(StageError("reward raised"), KeyError("answer")), True),
        (raised_from(StageError("reward raised"), raised_from(ValueError("x"), TypeError("y"))), True),
        (raised_from(StageError("reward raised"), OvertimeError("slow")), False),
        (raised_from(StageError("judge"), JudgeError("got no answer")), False),
        (raised_from(StageError("reward raised"), raised_from(ValueError("x"), ConnectionResetError())), False),
        (raised_from(StageError("vllm"), ServerRefusal("503")), False),
        (ServerSilence("no answer"), False),
        (OutOfMemory("too little", 512), False),
        (UnreachableError("store"), False),
        (RequestError("no such package on this machine"), False),
        (RuntimeError("unforeseen"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_what_wrong_rows_settings_and_functions_raise(error: BaseException, again: bool) -> None:
    assert fails_again(error) is again
