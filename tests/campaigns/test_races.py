"""Short races, of eight writers with a collector beside, and of eight flows on S3; in full: `python -m tests.campaigns
races`, `flow_races`."""

from tests.campaigns.flow_races import on_s3
from tests.campaigns.outcome import Outcome
from tests.campaigns.races import race


def test_nothing_is_lost_and_nothing_wrong_is_seen(tmp_path) -> None:
    assert race(str(tmp_path / "store"), tmp_path / "store/scratch", count=4, seed=1, collecting=True) == []


def test_each_fingerprint_is_worked_on_once_on_s3() -> None:
    outcome = Outcome(seed=5)
    on_s3(1, outcome)
    # three stages are the same for all; of the one beside there are four, each for two flows
    assert outcome.anomalies == [] and outcome.counts["stages worked on"] == 3 + 4
