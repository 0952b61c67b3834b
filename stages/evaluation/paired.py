"""Two evaluations of the same rows compared: the difference of a metric, its interval, and how likely chance alone
makes one as large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from stages.evaluation.intervals import Estimate, paired_difference
from stages.evaluation.scores import Part
from stages.seeds import generator

if TYPE_CHECKING:
    import numpy

_BITS_AT_ONCE = 4_000_000
"""Choices that are held at a time."""
_TIE = 1e-12
"""Statistics nearer than this share of their terms are the same number, added up in another order."""


@dataclass(frozen=True)
class Pairs:
    """A metric's part of every row under candidate and baseline: sums and counts, each [R] in float64."""

    candidate_sums_R: numpy.ndarray
    candidate_counts_R: numpy.ndarray
    baseline_sums_R: numpy.ndarray
    baseline_counts_R: numpy.ndarray
    alone: tuple[str, ...] = ()
    """Rows that only one of the two has."""

    @classmethod
    def of(cls, candidate: Mapping[str, Part], baseline: Mapping[str, Part]) -> Pairs:
        """By the rows that both have."""
        import numpy

        both = [row for row in candidate if row in baseline]
        candidate_R2 = numpy.array([candidate[row] for row in both], dtype=numpy.float64).reshape(-1, 2)
        baseline_R2 = numpy.array([baseline[row] for row in both], dtype=numpy.float64).reshape(-1, 2)
        alone = tuple(sorted(candidate.keys() ^ baseline.keys()))
        return cls(candidate_R2[:, 0], candidate_R2[:, 1], baseline_R2[:, 0], baseline_R2[:, 1], alone)

    def __len__(self) -> int:
        return len(self.candidate_sums_R)

    def difference(self, seed: int) -> Estimate:
        """Candidate less baseline, with the 95 % interval of the paired bootstrap."""
        return paired_difference(
            (self.candidate_sums_R, self.candidate_counts_R), (self.baseline_sums_R, self.baseline_counts_R), seed
        )

    def chance_of_more(self, least: float, draws: int, seed: int, *, spread: float | None = None) -> float:
        """How likely a difference as large as the one seen, or larger, is where the true one is `least`: p of the
        one-sided randomization test (Fisher 1935, section 21; Edgington and Onghena 2007) where that is 0.

        Of another one the values of a row cannot be exchanged: most rows are alike, and few differ by much. Then p is
        of the score that counts two rows more, which differ by `spread` either way (Agresti and Min 2005 for shares,
        whose spread is 1): where no row differs, it says how much so few rows can show. None: what is between all
        values.
        """
        if least == 0:
            return self._chance(least, draws, seed, lambda drawn_D, seen, tie: drawn_D >= seen - tie)
        mean, error = self._with_two_more(self._values_apart() if spread is None else spread)
        return NormalDist().cdf((least - mean) / error) if error else float(mean <= least)

    def chance_of_less(self, most: float, draws: int, seed: int) -> float:
        """The same of a difference as small as the one seen, or smaller, where the true one is `most`."""
        return self._chance(most, draws, seed, lambda drawn_D, seen, tie: drawn_D <= seen + tie)

    def _with_two_more(self, spread: float) -> tuple[float, float]:
        """(mean difference, its standard error), of ratios by their first-order terms."""
        rows = len(self)
        totals = self.candidate_counts_R.sum(), self.baseline_counts_R.sum()
        ours, theirs = self.candidate_sums_R.sum() / totals[0], self.baseline_sums_R.sum() / totals[1]
        terms_R = rows * (self.candidate_sums_R - ours * self.candidate_counts_R) / totals[0]
        terms_R = terms_R - rows * (self.baseline_sums_R - theirs * self.baseline_counts_R) / totals[1]
        difference = float(ours - theirs)
        squares = float((terms_R**2).sum()) + rows * difference**2 + 2 * spread**2
        mean = difference * rows / (rows + 2)
        variance = max(0.0, squares / (rows + 2) - mean**2) * (rows + 2) / (rows + 1)
        return mean, (variance / (rows + 2)) ** 0.5

    def _values_apart(self) -> float:
        import numpy

        sums_R = numpy.concatenate([self.candidate_sums_R, self.baseline_sums_R])
        values_R = sums_R / numpy.concatenate([self.candidate_counts_R, self.baseline_counts_R])
        return float(values_R.max() - values_R.min())

    def _chance(
        self, true: float, draws: int, seed: int, as_far: Callable[[numpy.ndarray, float, float], numpy.ndarray]
    ) -> float:
        """Were the candidate better by `true` in every row, the two values of a row could be exchanged, once that is
        taken away from one of them. Of `draws` random exchanges it counts those that come as far, and the one seen
        among them (Phipson and Smyth 2010), so that the test errs at most as often as it says."""
        import numpy

        ours_R = self.candidate_sums_R - true * self.candidate_counts_R
        theirs_R, our_counts_R, their_counts_R = self.baseline_sums_R, self.candidate_counts_R, self.baseline_counts_R
        moved_R, moved_counts_R = ours_R - theirs_R, our_counts_R - their_counts_R
        totals = ours_R.sum(), theirs_R.sum(), our_counts_R.sum(), their_counts_R.sum()
        seen = float(totals[0] / totals[2] - totals[1] / totals[3])
        tie = _TIE * float((numpy.abs(ours_R).sum() / totals[2]) + (numpy.abs(theirs_R).sum() / totals[3]))
        random = generator(seed, "exchange", len(self), draws)
        at_once, far = max(1, _BITS_AT_ONCE // len(self)), 0
        for start in range(0, draws, at_once):
            swap_DR = random.integers(0, 2, (min(at_once, draws - start), len(self)), dtype=numpy.int8).astype(float)
            moved_D, counts_D = swap_DR @ moved_R, swap_DR @ moved_counts_R
            drawn_D = (totals[0] - moved_D) / (totals[2] - counts_D) - (totals[1] + moved_D) / (totals[3] + counts_D)
            far += int(as_far(drawn_D, seen, tie).sum())
        return (1 + far) / (1 + draws)
