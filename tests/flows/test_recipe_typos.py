"""Every field of every stage with one letter wrong: refused, and the right name suggested."""

from __future__ import annotations

import random
import re
import string

import pytest
from pydantic import BaseModel

from flows.document import Document, Place
from flows.fields import field_slots, is_model
from flows.validate import validate
from stages.foreign import FOREIGN
from stages.stage import STAGES, load_stage

TYPOS_OF_A_KIND = 2


def models(model: type[BaseModel], place: Place = ()) -> list[tuple[Place, type[BaseModel]]]:
    """The model and those nested in it, each with the place where it is written."""
    found: list[tuple[Place, type[BaseModel]]] = [(place, model)]
    for name, info in model.model_fields.items():
        for slot in field_slots(info):
            if is_model(slot.annotation):
                found += models(slot.annotation, (*place, name))
    return found


def models_by_name(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Those that are nested, by the last part of their place."""
    return [(str(place[-1]), nested) for place, nested in models(model) if place]


def typos(name: str, generator: random.Random) -> set[str]:
    """One letter left out, put in, exchanged with its neighbour, or replaced."""
    letters = string.ascii_lowercase
    found = set()
    for _ in range(TYPOS_OF_A_KIND):
        at = generator.randrange(len(name))
        found.add(name[:at] + name[at + 1 :])
        found.add(name[:at] + generator.choice(letters) + name[at:])
        found.add(name[:at] + generator.choice(letters) + name[at + 1 :])
        if at:
            found.add(name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :])
    return found - {name, ""}


def distance(one: str, other: str) -> int:
    """Letters left out, put in, replaced or exchanged with their neighbour, by the textbook table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (one[i - 1] != other[j - 1]),
            )
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


@pytest.mark.parametrize("name", STAGES)
def test_one_letter_wrong(name):
    config = load_stage(name).config
    generator = random.Random(name)
    tried = 0
    for place, model in models(config):
        for field in (name for name in model.model_fields if len(name) > 1):  # of a letter nothing is left
            for typo in sorted(typos(field, generator) - set(model.model_fields)):
                values = {typo: 1}
                for part in reversed(place):
                    values = {part: values}
                _, problems = validate(config, values, Document(values, "recipe"), (), {})
                dotted = ".".join(map(str, (*place, typo)))
                (problem,) = [found for found in problems if found.where == f"recipe: {dotted}"]
                assert "unknown key" in problem.what
                if typo in FOREIGN and FOREIGN[typo].called[typo] in problem.what:
                    continue
                elsewhere = re.search(r"belongs under `(\w+):`", problem.what)  # `lag`, meant as `lam`, is a name there
                if elsewhere and typo in dict(models_by_name(config))[elsewhere[1]].model_fields:
                    continue
                suggested = re.search(r"did you mean '(\w+)'\?", problem.what)
                assert suggested, f"{name}: {dotted}: {problem.what}"
                # another field may be as near as the one that was meant
                assert distance(typo, suggested[1]) == 1, f"{name}: {dotted}: {problem.what}"
                tried += 1
    assert tried >= 4 * len(config.model_fields)


def test_the_distance_is_right():
    assert [distance("beta", other) for other in ("beta", "bta", "betta", "bata", "ebta", "betas", "seed")] == [
        0, 1, 1, 1, 1, 1, 3,
    ]  # fmt: skip
