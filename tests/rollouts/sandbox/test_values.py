"""Values as data: what is equal, what is not, and what is no data."""

import json
import math
from collections import Counter, OrderedDict, deque, namedtuple
from enum import IntEnum
from fractions import Fraction

import pytest

from stages.rollouts.sandbox.answers import Answer, answers
from stages.rollouts.sandbox.values import NotData, _key, encode, same, truth

Point = namedtuple("Point", "x y")
Level = IntEnum("Level", {"LOW": 1})
VALUES = [
    *(None, True, False, 0, 1, -1, 2**62, 2**64, -(2**70), 10**5000, 0.5, 1e300, math.inf, -math.inf, math.nan),
    *("", "1", "añ😀", "\ud800", b"", b"1", 1j, complex(math.inf, 2)),
    *([], (), set(), {}, [1], (1,), {1}, {1: 1}, [[1]], [(1,)], {(1, 2): {3}}, {frozenset({1}): 2}, [None, [True]]),
    *({"tuple": [1]}, {"a": 1, "b": [2]}, [1, 2], [2, 1], {1, 2, 3}, {True}, {"1"}),
]
EQUAL = [
    *[(1, 1.0), (2**64, 2.0**64), (0.0, -0.0), ({1, 2}, frozenset({2, 1})), ({1: 2.0, "a": 3}, {"a": 3, 1.0: 2})],
    *[([1, 2], type("L", (list,), {})([1, 2])), (Counter("aab"), {"a": 2, "b": 1}), (OrderedDict(a=1), {"a": 1})],
    *[(Point(1, 2), (1, 2)), (Level.LOW, 1), (bytearray(b"x"), b"x"), ([math.nan], [math.nan]), ({10, 9.0}, {10.0, 9})],
]


def sent(value):
    """As it arrives."""
    return json.loads(json.dumps(encode(value)))


def test_values_are_equal_to_themselves_and_to_nothing_else():
    """For these, Python's own `==` within one type is the judge; nothing of two types is equal."""
    for i, one in enumerate(VALUES):
        for j, other in enumerate(VALUES):
            assert same(encode(one), sent(other)) is (i == j), (one, other)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_values_of_two_types_that_are_equal(one, other):
    assert same(encode(one), sent(other)) and same(encode(other), sent(one))


def test_numbers_may_differ_by_the_tolerance():
    assert same(encode([1.0, {"a": 2}]), sent([1.09, {"a": 1.91}]), 0.1)
    assert not same(encode([1.0, {"a": 2}]), sent([1.11, {"a": 2}]), 0.1)
    assert not same(encode(1.0), sent("1.0"), 10.0) and not same(encode(1), sent(True), 10.0)
    assert not same(encode(1.0), sent(10**400), 0.1) and not same(encode(0.0), sent(math.nan), 0.1)


@pytest.mark.parametrize(
    "value", [object(), range(3), deque([1]), Fraction(1, 2), len, int, iter([1]), ValueError("x")]
)
def test_what_is_no_data(value):
    with pytest.raises(NotData, match="no plain data"):
        encode([value])


def test_containers_are_not_followed_for_ever():
    mine = []
    mine.append(mine)
    with pytest.raises(NotData, match="deep"):
        encode(mine)


def test_what_a_subclass_says_of_itself_does_not_count():
    class Liar(int):
        __eq__ = __bool__ = __index__ = __int__ = lambda *_: 9
        __hash__ = int.__hash__

    class Pairs(dict):
        items = keys = __iter__ = lambda *_: iter([(9, 9)])

    assert encode(Liar(1)) == 1 and encode(Pairs({1: 2})) == {"dict": [[1, 2]]}


def test_truth_is_pythons():
    assert [truth(sent(value)) for value in VALUES] == [bool(value) for value in VALUES]


@pytest.mark.parametrize(
    "found",
    [
        {"tuple": 1},
        {"set": {}},
        {"dict": [1]},
        {"dict": [[1, 2, 3]]},
        {"dict": [[1, 2], [1, 2]]},
        {"set": [1, 1]},
        {"set": [1, 2], "tuple": []},
        {"int": "zz"},
        {"float": "1"},
        {},
        {"any": True},
    ],
)
def test_forms_that_no_value_has(found):
    for expected in ((1,), {1}, {1, 2}, {1: 2}, {1: 2, 3: 4}, 1, 1.0):
        assert not same(encode(expected), found)


def test_a_tower_of_lists_is_not_equal():
    tower = found = []
    for _ in range(10**5):
        found.append([])
        found = found[0]
    assert not same(encode({(1,)}), {"set": [tower]})


def test_a_key_is_hardly_longer_than_what_it_stands_for():
    """Quoting what is quoted already would double it with every level."""
    tower = 1
    for _ in range(60):
        tower = {"tuple": [tower, "'\"\\"]}
    assert len(_key(tower)) <= len(json.dumps(tower))


def test_numbers_with_equal_hashes_have_keys_with_others():
    """In a set or dict of the numbers themselves, 10,000 of them would take 50 million comparisons."""
    alike = [n * (2**61 - 1) for n in range(1, 10**4)]
    assert len({hash(number) for number in alike}) == 1
    assert len({hash(_key(encode(number))) for number in alike}) > 9990
    assert same(encode(set(alike)), sent(set(alike)))


def test_answers_are_read_strictly():
    assert answers(b'{"value": 1}\n{"error": "x"}\n{"va', 3, None) == [
        Answer(1),
        Answer(error="x"),
        Answer(error="ended before it answered"),
    ]
    assert answers(b"", 1, "ran too long") == [Answer(error="ran too long")]
    assert {answer.error for answer in answers(b'{"value": 1}\n' * 3, 2, None)} == {
        "sent more answers than there were questions"
    }
    for line in (b"[]", b"x", b'{"value": NaN}', b'{"value": 1, "passed": true}', b"[" * 10**5, b"\xff", b"1" * 10**4):
        assert answers(line + b"\n", 1, None)[0].error is not None
