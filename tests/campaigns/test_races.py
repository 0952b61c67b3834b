"""A short race of eight writers with a collector beside; in full: `python -m tests.campaigns races`."""

from tests.campaigns.races import race


def test_nothing_is_lost_and_nothing_wrong_is_seen(tmp_path) -> None:
    assert race(str(tmp_path / "store"), tmp_path / "store/scratch", count=4, seed=1, collecting=True) == []
