"""What stages meet when they begin, met before: `python -m stages.beginnings ASKED ANSWER`, two JSON files.

Loads the user's code, asks built-in rewards and servers for their keys, and converts the first rows of local sources,
with the interpreter, environment and user that the stages will have. Trains nothing and writes nothing but the answer.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.errors import PosttrainError
from stages.external import HUB, load_named
from stages.identity import named_outside, semantic_config
from stages.normalize import NormalizeConfig
from stages.push_to_hub import Config as PushConfig
from stages.rollouts.reward_spec import RewardSpec, spec_of
from stages.stage import Config, load_stage

FIRST_ROWS = 100
_VARIABLE = "_variable"
"""The end of the names of fields that name an environment variable."""


def met(config: Config) -> Iterator[tuple[str, str]]:
    """The field and what is wrong, for everything that a stage with this configuration would end at."""
    places = semantic_config(config, lambda kind, where: where)
    for named in named_outside(config, places):
        if named.kind == "code" and ":" in named.where:
            yield from _asked(named.field, partial(load_named, "function", named.where))
    yield from _of_environment(config, "with")
    if isinstance(config, NormalizeConfig):
        yield from _asked("with.source", lambda: _first_rows(config))
    if isinstance(config, PushConfig):
        from huggingface_hub import get_token

        if get_token() is None:
            yield "with", "there is no token to write to the Hub: set HF_TOKEN to one that may, or `hf auth login`"


def _of_environment(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Keys and addresses that fields name, and what built-in rewards need."""
    if isinstance(value, RewardSpec):
        if (built_in := value.built_in()) is not None:
            yield from _asked(where, built_in.prepare)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            inner = getattr(value, name)
            if name.endswith(_VARIABLE) and inner is not None and not os.environ.get(inner, "").strip():
                yield f"{where}.{name}", f"names the environment variable {inner}, which is not set there"
            yield from _of_environment(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            named = spec_of(entry) if where == "with.rewards" else entry
            yield from _of_environment(named, f"{where}.{index}")


def _asked(where: str, ask: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    try:
        ask()
    except PosttrainError as error:
        yield where, str(error)


def _first_rows(config: NormalizeConfig) -> None:
    """Of a URL and of the Hub nothing is fetched."""
    from stages.data.first_pass import FirstPass, KeptRows
    from stages.data.normalizing import source_of

    path = config.source.path or ""
    if path.startswith(HUB) or "://" in path:
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as kept:
        source = source_of(config.source, None, Path(folder))
        first = FirstPass(config, KeptRows(kept))
        for row in itertools.islice(source, FIRST_ROWS):
            first.take(row, source)


def main(asked: str, answer: str) -> None:
    """`asked`: of each stage its `uses`, `name` and `config`; `answer`: of each problem stage, field and what."""
    found = []
    for entry in json.loads(Path(asked).read_text(encoding="utf-8")):
        config = load_stage(entry["uses"]).config.model_validate(entry["config"])
        found += [[entry["name"], where, what] for where, what in met(config)]
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
