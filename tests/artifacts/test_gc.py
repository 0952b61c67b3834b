"""Garbage collection: what is kept and why, and that nothing which somebody uses is ever deleted."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from artifacts import Artifact, Record, Store, StoreError, claims, collected, open_store, s3
from artifacts.disk import UNSYNCED
from artifacts.local import LocalFiles
from artifacts.manifest import library_versions
from artifacts.retention import DAY, Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from artifacts.usage import usage
from tests.artifacts.test_kills import DIED, DyingDisk, in_child

REAL_FILE_SYSTEM = s3._file_system
FINGERPRINT, OTHER, THIRD = "ab" * 32, "cd" * 32, "ef" * 32


def later(store: Store, days: float) -> Store:
    """The same store with a clock that is so many days ahead: all that was written is that old."""
    there = open_store(store.url)
    real = there.files.now
    there.files.now = lambda: real() + days * DAY  # type: ignore[method-assign]
    return there


def put(store: Store, fill, content: str, kind: str = "model", *inputs: Artifact) -> Artifact:
    named = {f"input{position}": artifact.digest for position, artifact in enumerate(inputs)}
    return store.put(kind, fill({"a": content.encode()}), producer={"stage": "make", "inputs": named})


def outcome(store: Store, policy: Policy | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(what goes, what stays), name -> reason."""
    found = survey(store, policy or Policy())
    return ({item.name: item.reason for item in found.goes}, {item.name: item.reason for item in found.stays})


def run_of(store: Store, run_id: str, *artifacts: Artifact) -> None:
    stages = {str(index): {"outputs": {"out": found.to_json()}} for index, found in enumerate(artifacts)}
    store.write_run(run_id, {"stages": stages})


def test_names_runs_claims_and_what_they_were_made_from_stay(store, fill):
    data = put(store, fill, "data", "dataset")
    model = put(store, fill, "model", "model", data)
    tuned = put(store, fill, "tuned", "model", model, data)
    ran = put(store, fill, "ran", "dataset")
    used = put(store, fill, "used", "dataset")
    lost = [put(store, fill, text, "model", data) for text in ("x", "y")]
    store.set_alias("team/best", tuned)
    run_of(store, "run-1", ran)
    store.claim("run-2", [used])
    before = store.files.tree("artifacts")
    goes, stays = outcome(later(store, 100))
    assert goes == {artifact.key: "nothing that is kept needs it" for artifact in lost}
    assert stays == {
        tuned.key: "named @team/best",
        model.key: f"needed to make model {tuned.digest[:12]}",
        data.key: f"needed to make model {tuned.digest[:12]}",
        ran.key: "made or used by run run-1",
        used.key: "in use by run-2",
    }
    assert store.files.tree("artifacts") == before, "a survey changes nothing"
    there = later(store, 100)
    swept = sweep(there, survey(there, Policy()), "me")
    assert {item.name for item in swept.deleted} == set(goes) and swept.spared == []
    assert set(store.artifacts()) == {data, model, tuned, ran, used}
    noted = collected.read(store.files)
    assert set(noted) == set(lost)
    assert all(abs(when - store.files.now()) < 60 for when in noted.values()), "as the store's clock has it"
    assert all(store.verify(artifact) == [] for artifact in store.artifacts())
    assert set(store.files.tree("artifacts")) == {
        path for path in before if not path.startswith(tuple(f"{lost.kind}/{lost.digest}" for lost in lost))
    }
    assert outcome(later(store, 100))[0] == {}


def test_what_is_young_stays_with_what_it_was_made_from(store, fill):
    data = put(store, fill, "data", "dataset")
    model = put(store, fill, "model", "model", data)
    assert outcome(later(store, 0.9))[0] == {}
    assert set(outcome(later(store, 1.1))[0]) == {data.key, model.key}
    assert outcome(later(store, 1.1), Policy(grace_hours=48))[0] == {}
    # used again: young again, and the dataset is needed for it
    there = later(store, 1.1)
    real = there.files.tree
    there.files.tree = lambda key: {  # the touch of today, as a store whose clock is ahead would show it
        path: type(stored)(stored.size, stored.modified + (1.1 * DAY if model.digest in path else 0))
        for path, stored in real(key).items()
    }
    goes, stays = outcome(there)
    assert goes == {} and stays[data.key].startswith("needed to make model")


def test_runs_are_kept_by_number_and_by_age(tmp_path, fill):
    store = open_store(str(tmp_path / "store"))
    made = [put(store, fill, f"run {day}") for day in range(6)]
    for day, artifact in enumerate(made):
        run_of(store, f"run-{day}", artifact)
        moment = store.files.now() - day * 10 * DAY
        os.utime(store.files.path(f"runs/run-{day}.json"), (moment, moment))

    def kept(**policy) -> list[int]:
        stays = outcome(later(store, 0.5), Policy(grace_hours=1, **policy))[1]
        return [day for day, artifact in enumerate(made) if artifact.key in stays]

    assert kept(keep_runs=2, keep_days=0) == [0, 1]
    assert kept(keep_runs=0, keep_days=25) == [0, 1, 2]
    assert kept(keep_runs=5, keep_days=15) == [0, 1, 2, 3, 4]
    assert kept(keep_runs=0, keep_days=0) == []


def test_unfinished_work_has_the_name_of_its_stage_where_the_store_knows_it(store, fill):
    """From the record of a finished stage, or from a run that failed; a damaged run tells nothing."""
    for fingerprint in (FINGERPRINT, OTHER, THIRD):
        store.checkpoints(fingerprint).save(3, fill({"state": b"3"}))
    store.append_record(Record("sft", FINGERPRINT, provenance={"recipe": "mine", "stage_name": "chat"}))
    store.write_run("run-1", {"recipe": "mine", "stages": {"grpo": {"fingerprint": OTHER, "state": "failed"}}})
    store.files.write("runs/run-2.json", b"{}")
    found = survey(store, Policy(keep_runs=0, keep_days=0))
    names = {item.name: item.of for item in (*found.goes, *found.stays) if item.what == "checkpoints"}
    assert names == {f"work/{FINGERPRINT}": "mine/chat", f"work/{OTHER}": "mine/grpo", f"work/{THIRD}": ""}


def test_work_goes_on_where_a_record_has_lost_its_outputs(store, fill):
    """They were collected since, or damaged: the stage runs once more, and its checkpoint is all that there is."""
    made = put(store, fill, "weights")
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": made}))
    store.checkpoints(FINGERPRINT).save(3, fill({"state": b"3"}))
    assert outcome(later(store, 2))[0][f"work/{FINGERPRINT}"] == "the stage is finished"
    store.files.delete(f"{made.key}/manifest.json")
    assert outcome(later(store, 2))[1][f"work/{FINGERPRINT}"] == "can be taken up"


def test_what_it_cannot_be_used_without_stays(store, fill):
    base, other = put(store, fill, "base"), put(store, fill, "other")
    adapter = store.put("adapter", fill({"a": b"adapter"}), producer={"stage": "sft", "inputs": {}}, needs=[base])
    store.set_alias("mine", adapter)
    goes, stays = outcome(later(store, 100))
    assert goes == {other.key: "nothing that is kept needs it"}
    assert stays == {adapter.key: "named @mine", base.key: f"needed to make adapter {adapter.digest[:12]}"}
    assert open_store(store.url).manifest(adapter).needs == (base.digest,)


def test_work_that_is_finished_or_given_up_goes_and_other_work_stays(store, fill):
    for fingerprint in (FINGERPRINT, OTHER):
        store.checkpoints(fingerprint).save(3, fill({"state": b"3"}))
    store.append_record(Record("sft", FINGERPRINT))
    store.shards(THIRD).save("ab" * 32, b"{}")
    held = store.lease("12" * 32, "run-9")
    given_back = store.lease("34" * 32, "run-8")
    assert held.acquire() and given_back.acquire()
    given_back.release()
    store.checkpoints("12" * 32).save(1, fill({"state": b"1"}))

    work = {name: f"work/{name}" for name in (FINGERPRINT, OTHER, THIRD, "12" * 32, "34" * 32)}
    goes, stays = outcome(later(store, 0.1), Policy(grace_hours=1))
    assert goes == {work[FINGERPRINT]: "the stage is finished", work["34" * 32]: "nobody holds the lease"}
    assert stays[work[OTHER]] == "can be taken up" and stays[work["12" * 32]] == "run run-9 works on it"
    assert stays[work[THIRD]].startswith("rewards, paid in the last 180")
    there = later(store, 0.1)
    sweep(there, survey(there, Policy(grace_hours=1)), "me")
    assert store.checkpoints(FINGERPRINT).latest() is None and store.checkpoints(OTHER).latest()[0] == 3
    assert store.shards(THIRD).load("ab" * 32) == b"{}" and held.renew() and given_back.holder() is None
    assert set(store.files.children("work")) >= {OTHER, THIRD, "12" * 32}
    assert not set(store.files.children("work")) & {FINGERPRINT, "34" * 32}
    assert outcome(later(store, 31))[0][work[OTHER]] == "nobody took it up for 30 days"
    assert outcome(later(store, 181))[0][work[THIRD]].startswith("rewards, none paid")


def test_what_was_never_finished_goes_when_it_is_old(store, fill):
    files = store.files
    artifact = Artifact("model", FINGERPRINT)
    files.write(f"{artifact.key}/files/a", b"half an upload")
    expected = {artifact.key}
    if store.url.startswith("s3://"):
        bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
        answer = files.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/artifacts/big")
        expected.add(f"artifacts/big?{answer['UploadId']}")
    elif store.is_local:
        (files.path("tmp") / "elsewhere-1-1-abc").mkdir()
        (files.path("tmp") / "elsewhere-1-1-abc/part").write_bytes(b"half")
        (store.scratch / "run-1/sft/out").mkdir(parents=True)
        (store.scratch / "run-1/sft/out/weights").write_bytes(b"half")
        expected |= {"tmp/elsewhere-1-1-abc"}
    # moto says of every upload in parts that it began in 2010
    assert [name for name in outcome(store)[0] if "?" not in name] == []
    there = later(store, 2)
    assert set(outcome(there)[0]) == expected
    found = survey(there, Policy())
    assert [item.name for item in sweep(there, found, "me").deleted] == [item.name for item in found.goes]
    assert outcome(there)[0] == {} and files.tree(artifact.key) == {} and files.unfinished() == {}


def test_job_folders_of_runs_that_are_not_kept_go(tmp_path, fill):
    store = open_store(str(tmp_path / "store"))
    run_of(store, "kept")
    for name in ("kept", "gone", "new", "claimed"):
        (store.scratch / name / "sft").mkdir(parents=True)
        (store.scratch / name / "sft/log.txt").write_text(name)
    for name in ("kept", "gone", "claimed"):
        os.utime(store.scratch / name / "sft/log.txt", (1, 1))
    store.claim("claimed", [])
    goes, stays = outcome(store)
    assert goes == {"gone": "of a run that is not kept"}
    assert stays["kept"] == stays["claimed"] == "of a run that is kept" and "new" in stays
    sweep(store, survey(store, Policy()), "me")
    assert {path.name for path in store.scratch.iterdir()} == {"kept", "new", "claimed"}


def test_job_folders_in_which_a_run_is_at_work_are_counted(tmp_path, monkeypatch):
    """Between the list of a folder and the look at what is in it, the run takes some of that away."""
    store = open_store(str(tmp_path / "store"))
    job = store.scratch / "run" / "sft"
    for place in ("log.txt", "checkpoint-1/state", "checkpoint-2/state"):
        (job / place).parent.mkdir(parents=True, exist_ok=True)
        (job / place).write_text(place)
    (store.scratch / "another").mkdir()
    scandir = os.scandir
    goes_after = {"run": "another", "sft": "run/sft/checkpoint-1", "checkpoint-2": "run/sft/checkpoint-2/state"}

    @contextlib.contextmanager
    def late(path):
        with scandir(path) as found:
            listed = list(found)
        if (gone := goes_after.pop(Path(path).name, None)) is not None:
            subprocess.run(["rm", "-r", store.scratch / gone], check=True)
        yield listed

    monkeypatch.setattr("artifacts.job_folders.sorted", lambda paths: sorted(paths, reverse=True), raising=False)
    monkeypatch.setattr(os, "scandir", late)
    assert usage(store).others == {"job folders": len("log.txt")}
    assert goes_after == {}


def test_job_folders_of_another_store_stay(bucket, tmp_path):
    """Of two stores on one server, of which each knows nothing of the other's runs."""
    stores = [open_store(f"{bucket}/{tmp_path.name}/{team}") for team in ("ours", "theirs")]
    logs = [store.scratch / name / "sft/log.txt" for store, name in zip(stores, ("our-run", "their-run"), strict=True)]
    for log in logs:
        log.parent.mkdir(parents=True)
        log.write_text("step 1")
        os.utime(log, (1, 1))
    ours = stores[0]
    found = survey(ours, Policy())
    assert [(item.what, item.name) for item in found.goes] == [("job folder", "our-run")]
    sweep(ours, found, "me")
    assert [log.is_file() for log in logs] == [False, True]
    assert usage(stores[1]).others == {"job folders": len("step 1")} and usage(ours).others == {}


def test_one_url_on_two_servers_is_two_stores(bucket, monkeypatch):
    from moto.server import ThreadedMotoServer  # here: vLLM looks into all imported modules, and fails at flask's

    monkeypatch.setattr(s3, "_file_system", REAL_FILE_SYSTEM)
    there = open_store(f"{bucket}/team").scratch
    assert open_store(f"{bucket}/team").scratch == there
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        other = open_store(f"{bucket}/team").scratch  # both servers of one process share their buckets
        assert other.parent == there.parent and other != there
    finally:
        server.stop()


def test_a_claim_ends_with_its_process(tmp_path, fill):
    store = open_store(str(tmp_path / "store"))
    artifact = put(store, fill, "a")
    assert in_child(lambda: open_store(store.url).claim("dead-run", [artifact])) == 0
    goes, _ = outcome(later(store, 2))
    assert goes == {artifact.key: "nothing that is kept needs it", "claims/dead-run.json": "its process is gone"}
    # of a machine that nobody can look at: for a week
    body = b"".join(store.files.read("claims/dead-run.json").split(b"\n"))
    assert b"process" in body
    store.unclaim("dead-run")
    claims.write(store.files, "far", [artifact])
    real, claims.owner_tag = claims.owner_tag, lambda: "elsewhere-1-1"
    try:
        claims.write(store.files, "far", [artifact])
    finally:
        claims.owner_tag = real
    assert outcome(later(store, 6))[0] == {}
    assert artifact.key in outcome(later(store, 8))[0]


@pytest.mark.parametrize("what", ["aliases/best.json", "runs/run-1.json", "claims/run-2.json"])
def test_nothing_is_deleted_while_it_is_not_known_what_must_stay(store, fill, what):
    artifact = put(store, fill, "a")
    store.set_alias("best", artifact)
    run_of(store, "run-1", artifact)
    store.claim("run-2", [artifact])
    store.files.write(what, store.files.read(what).replace(b'"', b"'", 1))
    with pytest.raises(StoreError, match=what):
        survey(later(store, 100), Policy())


def test_an_artifact_whose_manifest_is_damaged_is_named(store, fill):
    data = put(store, fill, "data", "dataset")
    model = put(store, fill, "model", "model", data)
    store.set_alias("best", model)
    store.files.write(f"{model.key}/manifest.json", b"{}")
    found = survey(later(store, 100), Policy())
    assert [item.artifact for item in found.goes] == [data]
    assert len(found.problems) == 1 and model.digest in found.problems[0]


def test_two_sweepers_do_not_meet(store, fill):
    put(store, fill, "a")
    there = later(store, 100)
    first = store.lease(claims.SWEEPER, "first")
    assert first.acquire()
    with pytest.raises(StoreError, match="first is at it already"):
        sweep(there, survey(there, Policy()), "second")
    first.release()
    assert len(sweep(there, survey(there, Policy()), "second").deleted) == 1


def test_a_sweeper_that_stood_still_deletes_nothing_more(store, fill, monkeypatch):
    put(store, fill, "a")
    there = later(store, 100)
    found = survey(there, Policy())
    monkeypatch.setattr("artifacts.leases.Lease.held", property(lambda self: False))
    with pytest.raises(StoreError, match="stood still"):
        sweep(there, found, "me")
    assert len(list(store.artifacts())) == 1


def test_what_a_dead_sweeper_condemned_is_acquitted_by_the_next_one(store, fill):
    named = put(store, fill, "a")
    store.set_alias("best", named)
    claims.condemn(store.files, [named])
    there = later(store, 100)
    assert sweep(there, survey(there, Policy()), "me").deleted == []
    assert store.files.tree("gc") == {} and named in store.artifacts()


def test_a_sweeper_that_stood_still_leaves_what_another_one_condemned(store, fill, monkeypatch):
    put(store, fill, "a")
    there = later(store, 100)
    found, theirs = survey(there, Policy()), put(store, fill, "b")

    def taken_over(*_) -> None:
        claims.condemn(store.files, [theirs])
        monkeypatch.setattr("artifacts.leases.Lease.held", property(lambda self: False))

    monkeypatch.setattr("artifacts.sweep._needed_now", taken_over)
    with pytest.raises(StoreError, match="stood still"):
        sweep(there, found, "me")
    assert claims._condemned(store.files, [theirs])
    assert len(list(store.artifacts())) == 2


def test_killed_at_any_step_it_leaves_a_right_store(tmp_path, monkeypatch):
    monkeypatch.setenv(UNSYNCED, "1")
    library_versions()
    count = last = 0
    status = DIED
    while status == DIED:
        last += 1
        for after in (False, True):
            root = tmp_path / f"{last}{after}"
            store = open_store(str(root))
            made = {}
            for name, inputs in (("kept data", ()), ("kept", ("kept data",)), ("lost", ("kept data",)), ("lost 2", ())):
                folder = root / "scratch" / "run" / name
                folder.mkdir(parents=True)
                (folder / "a").write_text(name)
                (folder / "b").write_text(name * 2)
                named = {key: made[key].digest for key in inputs}
                made[name] = store.put("model", folder, producer={"inputs": named})
            store.set_alias("kept", made["kept"])
            (root / "scratch/run/state").mkdir()
            (root / "scratch/run/state/s").write_text("s")
            store.checkpoints(FINGERPRINT).save(1, root / "scratch/run/state")
            store.append_record(Record("sft", FINGERPRINT))

            def collect(root=root, k=last, after=after):
                dying = later(Store(LocalFiles(root), root / "cache"), 100)
                dying.files._disk = DyingDisk(k, after)
                sweep(dying, survey(dying, Policy()), "gc")

            status = in_child(collect)
            assert status in (DIED, 0)
            count += status == DIED
            again = later(open_store(str(root)), 100)
            kept = {made["kept data"], made["kept"]}
            assert kept <= set(again.artifacts()) <= set(made.values())
            for artifact in again.artifacts():
                assert again.is_intact(artifact) and again.verify(artifact) == []
            sweep(again, survey(again, Policy()), "next")
            assert set(again.artifacts()) == kept and again.files.children("work") == [claims.SWEEPER]
            assert set(again.files.tree("artifacts")) == {
                f"model/{artifact.digest}/{path}"
                for artifact in kept
                for path in ("manifest.json", "files/a", "files/b")
            }
            if status == 0:
                break
    assert count > 40
