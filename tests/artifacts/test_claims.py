"""Claims that cannot be read keep everybody from deleting: none is left, and one that is damaged says what to do."""

import pytest

from artifacts import Store, StoreError, claims, open_store
from artifacts.remote import RemoteFiles
from tests.campaigns.interposed import SHORT, Interposed, at
from tests.campaigns.objects import Objects
from tests.campaigns.places import Clock


def test_a_put_that_gives_up_leaves_no_half_of_a_claim(fill, tmp_path):
    objects, gave_up = Objects(), 0
    store = Store(RemoteFiles("memory://x", "/x", lambda: objects), tmp_path)
    artifact = store.put("model", fill({"a": b"a" * 100}), producer={})
    for number in range(1, 30):
        # files that a put which was killed left: the next one claims them
        store.files.delete(f"{artifact.key}/manifest.json")
        fs = Interposed(objects, at(number, SHORT, for_ever=True))
        half = Store(RemoteFiles("memory://x", "/x", lambda fs=fs: fs, Clock().patience()), tmp_path)
        try:
            half.put("model", fill({"a": b"a" * 100}), producer={})
        except StoreError:
            gave_up += 1
        assert claims.read_all(store.files) == []
    assert gave_up > 3


def test_a_damaged_claim_says_what_to_do(tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.claim("run-1", [])
    store.files.write("claims/run-1.json", store.files.read("claims/run-1.json")[:50])
    with pytest.raises(StoreError, match=r"claims/run-1\.json is not a claim, or damaged; delete it when no run is"):
        claims.read_all(store.files)
