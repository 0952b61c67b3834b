"""Unit tests of generated code, split into what the program is asked and what is expected of its answer.

Only the question enters the sandbox. A test is one of
- an assertion, `assert f(2) == 4`: the other side of == (or `is`) must be a literal; also `assert f(2)`,
  `assert not f(2)` and `assert abs(f(2) - 0.5) < 1e-6`;
- `{"call": "f(2)", "expected": 4}`, with `tolerance` for numbers, if need be;
- `{"input": "2\\n", "output": "4\\n"}`: a whole program with its standard input and output; white space at the ends of
  lines and of the output does not count.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from artifacts.errors import DataError
from stages.rollouts.sandbox.values import NotData, encode, same, truth

FORMS = 'an assertion, {"call": ..., "expected": ...} or {"input": ..., "output": ...}'
ASKS_THE_PROGRAM = frozenset({"isinstance", "issubclass", "callable", "hasattr", "type"})
"""What such a call says of an object is what the program makes it say."""


@dataclass(frozen=True)
class Question:
    """An expression to be evaluated in the program's module."""

    expression: str
    accepts: Callable[[Any], bool]
    """Of the value as data."""


@dataclass(frozen=True)
class Dialogue:
    """Standard input, and the standard output that belongs to it."""

    input: str
    output: str

    def accepts(self, printed: str) -> bool:
        """Whether it is the same text, but for white space at ends."""
        return _trimmed(printed) == _trimmed(self.output)


Test = Question | Dialogue


def tests_of(value: Any) -> list[Test]:
    """The tests of a row: a list of them, or JSON of such a list. Raises DataError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"column tests must hold a list of tests; found {value!r:.100}")
    tests = [test for entry in value for test in _tests(entry)]
    if not tests:
        raise DataError(f"column tests holds no test; give at least one: {FORMS}")
    return tests


def _tests(entry: Any) -> list[Test]:
    if isinstance(entry, str):
        if not entry.lstrip().startswith("{"):
            return [_asserted(statement) for statement in _statements(entry)]
        entry = _json(entry)
    fields = {name: value for name, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
    if fields.keys() == {"input", "output"} and all(isinstance(value, str) for value in fields.values()):
        return [Dialogue(**fields)]
    if isinstance(entry, Mapping) and {"call"} <= fields.keys() <= {"call", "expected", "tolerance"}:
        call, tolerance = fields["call"], fields.get("tolerance", 0.0)
        if isinstance(call, str) and _is_number(tolerance) and "expected" in entry:
            return [_equal(_expression(call), entry["expected"], float(tolerance))]
    raise DataError(f"a test in column tests is none of {FORMS}: {entry!r:.200}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"column tests holds no JSON ({error}): {text!r:.100}") from error


def _statements(text: str) -> list[ast.expr]:
    """What is asserted, by each statement."""
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"a test in column tests is no Python ({error}): {text!r:.200}") from error
    if not all(isinstance(statement, ast.Assert) for statement in body):
        raise DataError(f"a test in column tests must be {FORMS}, and nothing else: {text!r:.200}")
    return [statement.test for statement in body if isinstance(statement, ast.Assert)]


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"call of a test in column tests is no Python ({error}): {text!r:.200}") from error


def _asserted(condition: ast.expr) -> Question:
    match condition:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            for question, literal in ((left, right), (right, left)):
                expected = _literal(literal)
                # a question that can only be answered by true or false may hold what is expected itself
                if expected is not None and not (isinstance(expected[0], bool) and _judges(question)):
                    return _equal(question, expected[0], 0.0)
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)], keywords=[]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            tolerance = _literal(bound)
            for question, literal in ((left, right), (right, left)):
                if tolerance is not None and _is_number(tolerance[0]) and (expected := _literal(literal)) is not None:
                    return _equal(question, expected[0], float(tolerance[0]))
        case ast.UnaryOp(op=ast.Not(), operand=operand) if not _judges(operand):
            return Question(ast.unparse(operand), lambda found: not truth(found))
        case _ if not _judges(condition):
            return Question(ast.unparse(condition), truth)
    raise DataError(
        f"a test would have to be judged by the program that it tests: assert {ast.unparse(condition)}; write "
        "`assert call == literal` (or with `is`, or abs(call - literal) < literal), `assert call` or `assert not call`"
    )


def _equal(question: ast.expr, expected: Any, tolerance: float) -> Question:
    try:
        data = encode(expected)
    except NotData as error:
        raise DataError(f"a test in column tests expects {error}: {ast.unparse(question)}") from error
    return Question(ast.unparse(question), partial(same, data, tolerance=tolerance))


def _literal(node: ast.expr) -> tuple[Any] | None:
    """The value of a literal, in a tuple."""
    try:
        return (ast.literal_eval(node),)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _judges(node: ast.expr) -> bool:
    """Whether the expression compares, so that it holds what is expected, or asks what an object says of itself."""
    return any(
        isinstance(part, ast.Compare | ast.BoolOp)
        or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in ASKS_THE_PROGRAM)
        for part in ast.walk(node)
    )


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
