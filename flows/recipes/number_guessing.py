"""Number guessing as an environment: a number from 1 to 7, three guesses, and a hint after each.

The demonstrations follow the hints every other time and find the number in half of the games. Halving what is left
always finds it.
"""

import random
from collections.abc import Iterator
from typing import Any

NUMBERS = range(1, 8)
GUESSES = 3


class NumberGuessing:
    """An episode: the row has the number, a turn is a guess. Rewarded with 1 when it is found."""

    def reset(self, row: dict[str, Any]) -> None:
        """The prompt says it all."""
        self.number = row["number"]
        self.left = GUESSES

    def step(self, action: str) -> tuple[str, float, bool]:
        """`higher` or `lower`: where the number is; what is no number gets a question mark."""
        self.left -= 1
        guess = int(action) if action.isdecimal() else None
        if guess == self.number:
            return "found", 1.0, True
        return hint(guess, self.number), 0.0, self.left == 0


def hint(guess: int | None, number: int) -> str:
    """What a guess is told."""
    if guess is None:
        return "?"
    return "higher" if guess < number else "lower"


def games() -> Iterator[dict[str, Any]]:
    """Each number four hundred times, played by somebody who does not think much."""
    for game in range(400):
        for number in NUMBERS:
            yield {
                "prompt": [{"role": "user", "content": "guess"}],
                "completion": play(number, random.Random(f"{game} {number}")),
                "number": number,
                "game": game,
            }


def play(number: int, chance: random.Random) -> list[dict[str, str]]:
    """The turns of a game up to the last guess."""
    turns: list[dict[str, str]] = []
    low, high = NUMBERS[0], NUMBERS[-1]
    for _ in range(GUESSES):
        thoughtless = chance.random() < 0.5
        guess = chance.choice(NUMBERS) if thoughtless else chance.randint(low, high)
        turns.append({"role": "assistant", "content": str(guess)})
        if guess == number:
            break
        turns.append({"role": "user", "content": hint(guess, number)})
        low, high = (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))
    return turns if turns[-1]["role"] == "assistant" else turns[:-1]
