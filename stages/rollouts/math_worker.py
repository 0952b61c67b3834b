"""Compares mathematical answers for `math_answers.py`: a JSON line in, two lines out. Runs by itself, imports nothing
of ours."""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO

_MOST_MEMORY_BYTES = 4 << 30


def serve(requests: TextIO, answers: TextIO) -> None:
    """[reference, text, extraction, seconds] -> a line when the reference was read, then the verdict."""
    _verdict(_gold("$1$"), "$1$", "any")  # loads libraries and tables before a clock runs
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is computing
    for line in requests:
        reference, text, extraction, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        gold = _gold(reference)
        print("read", file=answers, flush=True)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = _verdict(gold, text, extraction)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=answers, flush=True)


@functools.lru_cache(maxsize=1024)
def _gold(reference: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(reference, parsing_timeout=None))


def _verdict(gold: tuple[Any, ...], text: str, extraction: str) -> float | None:
    from math_verify import parse, verify

    if not gold:
        return None
    try:
        found = parse(text, extraction_mode="first_match", parsing_timeout=None, **_settings(extraction))
        return float(verify(list(gold), found, timeout_seconds=None))
    except Exception:  # whatever a formula does to sympy, it is no right answer
        return 0.0


@functools.cache
def _settings(extraction: str) -> dict[str, Any]:
    """As TRL reads completions: well-formed LaTeX, a box first."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    return {"extraction_config": [latex, *([ExprExtractionConfig()] if extraction == "any" else [])]}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY_BYTES, _MOST_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    serve(sys.stdin, _answers)
