"""Which answers to a prompt become SFT rows or preference pairs. Pure functions of rewards and texts."""

from __future__ import annotations

from collections.abc import Sequence

from stages.evaluation.answers import Answer
from stages.seeds import generator


def reward(answer: Answer) -> float | None:
    """The weighted reward; None where no function scored the answer."""
    return answer.totals.get("reward")


def is_right(answer: Answer, threshold: float | None) -> bool:
    """Scored, and at least `threshold` (None: any score will do)."""
    value = reward(answer)
    return value is not None and (threshold is None or value >= threshold)


def best_answers(answers: Sequence[Answer], threshold: float | None, *, keep_all: bool) -> list[Answer]:
    """The right answer with the highest reward, the earliest of equals; or every right one, each text once."""
    right = [answer for answer in answers if is_right(answer, threshold)]
    if keep_all:
        first: dict[str, Answer] = {}
        for answer in right:
            first.setdefault(answer.text, answer)
        return list(first.values())
    return [max(right, key=lambda answer: (reward(answer), -answer.sample))] if right else []


def choose_pairs(
    answers: Sequence[Answer], threshold: float | None, *, min_gap: float, count: int, seed: int
) -> list[tuple[Answer, Answer]]:
    """At most `count` (chosen, rejected) in an order drawn by the seed and the prompt's row id; no text twice.

    Chosen is right and rejected is wrong by `threshold` (None: chosen has the higher reward), by at least `min_gap`.
    """
    scored = [(answer, value) for answer in answers if (value := reward(answer)) is not None]
    candidates = [
        (one, other)
        for one, high in scored
        for other, low in scored
        if high > low and high - low >= min_gap and (threshold is None or high >= threshold > low)
    ]
    if not candidates:
        return []
    pairs: list[tuple[Answer, Answer]] = []
    used: set[str] = set()
    for index in generator(seed, "pairs", answers[0].row_id).permutation(len(candidates)):
        chosen, rejected = candidates[index]
        if chosen.text != rejected.text and not {chosen.text, rejected.text} & used:
            pairs.append((chosen, rejected))
            used |= {chosen.text, rejected.text}
            if len(pairs) == count:
                break
    return pairs


def why_no_pair(answers: Sequence[Answer], threshold: float | None) -> str:
    """The ledger's state of a prompt without a pair."""
    scored = [answer for answer in answers if reward(answer) is not None]
    if not scored:
        return "filtered: not scored"
    right = sum(is_right(answer, threshold) for answer in scored)
    if threshold is None and len({reward(answer) for answer in scored}) == 1:
        return "filtered: all rewards equal"
    if threshold is not None and right in (0, len(scored)):
        return "filtered: all right" if right else "filtered: all wrong"
    return "filtered: gap below min_gap, or equal texts"


def why_no_best(answers: Sequence[Answer]) -> str:
    """The ledger's state of a prompt without a right answer."""
    return "filtered: all wrong" if any(reward(answer) is not None for answer in answers) else "filtered: not scored"
