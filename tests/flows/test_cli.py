"""The command line: what it prints, where it prints it, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from artifacts import open_store
from flows import cli, commands
from stages.stage import STAGES

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: small
stages:
  data: {uses: prepare, with: {source: {path: rows.jsonl}}}
  dpo:
    uses: train
    inputs: {model: '@base', dataset: data}
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The store that POSTTRAIN_STORE names, with a model `@base`."""
    monkeypatch.setenv("POSTTRAIN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POSTTRAIN_DEBUG", raising=False)
    store = open_store(None)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1500)
    producer = {"stage": "train", "version": 1, "config": {"beta": 0.1}, "inputs": {"model": {"path": "elsewhere"}}}
    model = store.put("model", folder, producer=producer, metrics={"loss": 0.5}, counts={"rows": 7})
    store.set_alias("base", model)
    return store


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--version")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ended.value.code == 0
    assert capsys.readouterr() == (f"posttrain {declared}\n", "")


def test_plan(fake_stages, store, write_recipe, capsys):
    recipe = str(write_recipe(RECIPE))
    assert run("plan", recipe) == 0
    out = capsys.readouterr().out
    assert "first run" in out
    assert run("plan", recipe, "--json", "--until", "data") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"] == "small"
    assert shown["stages"]["data"]["state"] == "run"
    assert shown["stages"]["dpo"]["state"] == "skipped"
    assert store.runs() == []


def test_wrong_requests_have_status_2_and_name_every_mistake(fake_stages, store, write_recipe, capsys):
    recipe = write_recipe(RECIPE.replace("prepare", "perpare"))
    assert run("run", str(recipe), "--set", "dpo.bta=1") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "posttrain: 2 mistakes, nothing was started",
        f"  {recipe}:3: stages.data.uses: unknown stage 'perpare'; did you mean 'prepare'?; "
        "there are: prepare, train, score",
        "  --set dpo.bta=1: stages.dpo.with.bta: unknown key; did you mean 'beta'?",
    ]
    assert run("plan", str(recipe), "--json") == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["state"] == "refused"
    assert shown["problems"][0]["where"] == f"{recipe}:3: stages.data.uses"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "nothing"), "posttrain: no recipe 'nothing'; give a YAML file; shipped recipes are: "),
        (("show", "bsae"), "posttrain: there is no artifact 'bsae'"),
        (("report", "20260101-nothing"), "posttrain: there is no run '20260101-nothing'"),
        (("report", "latest"), "posttrain: there is no run in "),
        (("stages", "sftt"), "posttrain: unknown stage 'sftt'; did you mean 'sft'?"),
        (
            ("ls", "--store", "ftp://host/x"),
            "posttrain: --store ftp://host/x: a store is a local path, file:// or s3://",
        ),
        (("ls", "--store", "memory://x"), "posttrain: --store memory://x: memory://x is in the memory of one"),
        (("run", "quickstart", "--store", "memory://x"), "posttrain: --store memory://x: memory://x is in the"),
    ],
)
def test_unknown_names_have_status_2(store, capsys, arguments, expected):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mine.yml", "mine.yaml"),
        ("mine", "mine.yaml"),
        ("mien.yaml", "mine.yaml"),
        ("folder/../mine.yml", "folder/../mine.yaml"),
    ],
)
def test_the_recipe_that_lies_there_is_meant(store, tmp_path, monkeypatch, capsys, name, meant):
    """`mine` resembles `online`, which is shipped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.yaml").write_text("stages: {}")
    assert run("plan", name) == 2
    assert f"; did you mean '{meant}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("reinforce", "`uses: rl` with `advantage_estimator: rloo`"),
        ("GRPOTrainer", "`uses: rl` with `loss_type: grpo`"),
        ("ppo_trainer", "`uses: ppo`"),
        ("DPO", "`uses: preference` with `loss_type: sigmoid`"),
        ("dr_grpo", "`uses: rl` with `loss_type: dr_grpo`"),
        ("OnlineDPOTrainer", "`uses: online_dpo`"),
        ("GOLDTrainer", "`uses: distill` with `cross_tokenizer: {}`"),
        ("IWOPDTrainer", "`uses: distill` with `loss_type: iw_opd`"),
        ("MiniLLM", "`uses: distill` with `loss_type: minillm`"),
        ("async_grpo", "`uses: rl` with `rollouts: {engine: vllm_server, max_staleness: 4}`"),
        (
            "AsyncDistillationTrainer",
            "`uses: distill` with `rollouts: {engine: vllm_server, max_staleness: 4}`, `teacher_engine: "
            "{engine: vllm_server}` and `loss_top_k`",
        ),
        ("ssd", "`uses: sft` on the completions of a stage `sample` of the same model"),
        (
            "RLOOTrainer",
            "`uses: rl` with `advantage_estimator: rloo`, `loss_type: grpo`, "
            "`importance_sampling_level: sequence_sum`, `kl_placement: reward`, `beta: 0.05` and `num_generations: 2`",
        ),
    ],
)
def test_what_others_call_a_stage(capsys, name, ours):
    assert run("stages", name) == 2
    assert f"unknown stage {name!r}; here it is {ours}; there are: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("quantize", "a stage that trains with `quantization`"),
        ("chat", "`uses: sample`"),
    ],
)
def test_what_no_stage_does(capsys, name, difference):
    assert run("stages", name) == 2
    said = capsys.readouterr().err
    assert f"unknown stage {name!r}; it is not here, and the nearest is {difference}" in said


@pytest.mark.parametrize("arguments", [("rnu",), ("run",), ("run", "x", "--forse", "y"), ()])
def test_wrong_options_have_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_an_unknown_option_leads_to_the_help_of_its_command(capsys):
    for arguments, said in (
        (("plan", "quickstart", "--memry"), "--memry; did you mean '--memory'?"),
        (("gc", "--keep-rnus=3", "extra"), "--keep-rnus=3; did you mean '--keep-runs'? extra"),
    ):
        with pytest.raises(SystemExit) as left:
            run(*arguments)
        command = f"posttrain {arguments[0]}"
        assert left.value.code == 2
        assert capsys.readouterr().err == f"{command}: unrecognized arguments: {said}\nsee {command} --help\n"


def test_a_store_that_cannot_be_used_has_status_2(fake_stages, write_recipe, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert run("plan", str(write_recipe(RECIPE)), "--store", str(blocked / "store")) == 2
    assert f"--store {blocked / 'store'}" in capsys.readouterr().err


def test_run_gives_the_payload_and_the_status(fake_stages, store, write_recipe, capsys, monkeypatch):
    recipe = str(write_recipe(RECIPE))
    seen = []

    def pipeline(plan, listener):
        seen.append({name: decision.state for name, decision in plan.decisions.items()})
        return {"run": "r1", "state": state, "seconds": 1.0, "stages": {}}

    monkeypatch.setattr("flows.pipeline.run_pipeline", pipeline)
    state = "ok"
    assert run("run", recipe, "--json", "--only", "data") == 0
    assert json.loads(capsys.readouterr().out)["run"] == "r1"
    state = "failed"
    assert run("run", recipe, "--json") == 1
    assert seen == [{"data": "run", "dpo": "skipped"}, {"data": "run", "dpo": "run"}]


def test_show_path_and_ls(store, capsys):
    model = store.find("base")
    assert run("show", model.id[7:19], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == model.id
    assert shown["aliases"] == ["base"]
    assert shown["metrics"] == {"loss": 0.5}
    assert [file["size"] for file in shown["files"]] == [2, 1500]
    assert run("show", "@base") == 0
    text = capsys.readouterr().out
    assert all(part in text for part in (model.id, "producer.config", "1.5 kB", "model.safetensors", "lineage"))
    assert run("path", "base") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert run("ls") == 0
    assert model.digest[:12] in capsys.readouterr().out
    known = {"run": "r1", "recipe": "small", "state": "ok", "started_at": "now", "seconds": 2.0}
    resumed = {"uses": "sft", "state": "ran", "outputs": {}, "resumed_from": 1200}
    store.write_run("r1", {**known, "stages": {"sft": resumed, "rest": {**resumed, "resumed_from": None}}})
    assert run("ls") == 0
    assert "ok; sft resumed at step 1,200" in capsys.readouterr().out
    assert run("ls", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["artifacts"][0] == {
        "id": model.id, "kind": "model", "aliases": ["base"], "stage": "train", "files": 2, "bytes": 1502,
    }  # fmt: skip
    assert listed["runs"] == [{**known, "resumed": {"sft": 1200}}]


def test_verify_names_what_is_damaged(store, capsys):
    assert run("verify") == 0
    assert capsys.readouterr().out == "1 artifact, 1 alias checked, 0 damaged\n"
    path = store.materialize(store.find("base")) / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"x" * 1499 + b"y")
    assert run("verify", "--json") == 1
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)["damaged"]) == [store.find("base").id]
    assert "model.safetensors" in shown.err
    assert run("path", "base") == 1


def test_stages(store, capsys):
    assert run("stages") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in STAGES)
    assert run("stages", "sft", "--json") == 0
    (stage,) = json.loads(capsys.readouterr().out).values()
    fields = {field["name"]: field for field in stage["fields"]}
    assert fields["learning_rate"]["accepts"] == "a number above 0"
    assert fields["micro_batch_tokens"]["operational"] is True
    assert run("stages", "sft") == 0
    assert "(operational)" in capsys.readouterr().out


def test_every_field_of_every_stage_has_a_meaning(capsys):
    assert run("stages", "--json") == 0
    for stage in json.loads(capsys.readouterr().out).values():
        assert [field["name"] for field in stage["fields"] if not field["meaning"]] == [], stage["name"]


def test_what_nobody_foresaw_is_one_line_and_a_log(store, capsys, monkeypatch, tmp_path):
    def broken(*arguments):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("artifacts.open_store", broken)
    assert run("ls") == 1
    error = capsys.readouterr().err
    assert error.startswith("posttrain: unexpected ZeroDivisionError: by zero\n")
    assert "Traceback" not in error
    log = tmp_path / "cache" / "last-error.log"
    assert str(log) in error
    assert "in broken" in log.read_text()
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("ls")


def test_output_that_nobody_reads_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        command = [sys.executable, "-m", "flows.cli", "stages", "sft"]
        done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("force", "said"),
    [
        ([], ""),
        (
            ["--force", "rows"],
            ", but begins rows anew: once that has begun, leave `--force` of it out to go on there too (where its "
            "result was in the store before, that is taken instead)",
        ),
    ],
)
def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, force, said):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "run", interrupted)
    assert cli.main(["run", "quickstart", *force]) == 130
    kept = "posttrain: interrupted; what is done is kept, and the same command goes on from there"
    assert capsys.readouterr().err == f"{kept}{said}\n"
