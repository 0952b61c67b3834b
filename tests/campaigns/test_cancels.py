"""A few cancels of processes that resist, side by side; in full: `python -m tests.campaigns cancels`."""

from tests.campaigns.cancels import campaign


def test_nothing_is_left_of_what_resists() -> None:
    outcome = campaign(6, seed=1, at_once=6)
    assert outcome.anomalies == [] and outcome.counts["cancels"] == 6
