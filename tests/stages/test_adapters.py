"""Adapters from stage to stage: SFT, DPO and GRPO on one, its base by name, its reference at every hand-over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts import Artifact, open_store
from artifacts.errors import StageError
from stages.context import local_context
from stages.data.dataset import read_dataset
from stages.training import quantization
from stages.training.loop import Trainer
from tests.in_process import Payload, failures, run_here
from tests.tiny_recipe import BASE, artifact_folder, write_recipe

LORA = {"lora_r": 4, "lora_alpha": 8}
TRAINING: dict[str, Any] = {"learning_rate": 5e-3, "train_batch_size": 8, "max_length": 48, "max_steps": 3}
ROLLOUTS = {"num_generations": 4, "max_completion_length": 5, "rewards": ["task.py:length"], "beta": 0.3}
APART = {"merge_adapters": False}


def on(uses: str, model: str, dataset: str, inputs: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    wired = {"model": model, "dataset": dataset, **(inputs or {})}
    return {"uses": uses, "inputs": wired, "with": {**TRAINING, **config}}


def merge(adapter: str) -> dict[str, Any]:
    return {"uses": "merge_adapter", "inputs": {"adapter": adapter}}


def scores(model: str) -> dict[str, Any]:
    inputs = {"model": model, "dataset": "pairs"}
    return {"uses": "reference_logprobs", "inputs": inputs, "with": {"max_length": 48, "per_token": True}}


CHAIN: dict[str, Any] = {
    "sft": on("sft", "base", "rows", **LORA, **APART, lora_dropout=0.1),
    "sft_merged": merge("sft"),
    "sft_scores": scores("sft"),
    "merged_scores": scores("sft_merged"),
    "dpo": on("preference", "sft", "pairs", **APART, lora_dropout=0.1),
    "dpo_merged": merge("dpo"),
    "dpo_wired": on("preference", "sft", "pairs", {"reference": "sft_merged"}, **APART, lora_dropout=0.1),
    "dpo_fresh": on("preference", "sft_merged", "pairs", **LORA),
    "dpo_fresh_wired": on("preference", "sft_merged", "pairs", {"reference": "sft_merged"}, **LORA),
    "kto": on("unpaired_preference", "sft", "pairs", **APART),
    "kto_wired": on("unpaired_preference", "sft", "pairs", {"reference": "sft_merged"}, **APART),
    "grpo": on("rl", "dpo", "rows", **ROLLOUTS),
    "grpo_wired": on("rl", "dpo", "rows", {"reference": "dpo_merged"}, **ROLLOUTS),
    "grpo_fresh": on("rl", "dpo_merged", "rows", **ROLLOUTS, **LORA),
    "grpo_fresh_wired": on("rl", "dpo_merged", "rows", {"reference": "dpo_merged"}, **ROLLOUTS, **LORA),
}


class Chain:
    """A finished run of all of it."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.recipe = write_recipe(folder / "recipe", CHAIN)
        self.payload: Payload = run_here(self.recipe, self.store)
        assert self.payload["state"] == "ok", failures(self.payload)

    def id(self, stage: str, output: str | None = None) -> str:
        outputs = self.payload["stages"][stage]["outputs"]
        return str(outputs[output or next(iter(outputs))]["id"])

    def folder(self, stage: str, output: str | None = None) -> Path:
        return artifact_folder(self.store, self.id(stage, output))

    def metrics(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder(stage) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(6, 14)[None]).logits
    return found


def logprob(model: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    """Of every token after the prompt, by transformers alone."""
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([[*prompt_ids, *token_ids]])).logits[0].log_softmax(-1)
    return [float(logprobs_TV[len(prompt_ids) + t - 1, token]) for t, token in enumerate(token_ids)]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_adapter_names_its_base_and_needs_nothing_of_ours(chain: Chain, stage: str) -> None:
    """The chain's base stays the base; peft loads the folder on it, and gives what the merged model gives."""
    from peft import PeftModel

    folder = chain.folder(stage)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (chain.id("base"), None)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not (folder / "config.json").exists() and not list(folder.glob("model*"))
    base = AutoModelForCausalLM.from_pretrained(chain.folder("base"))
    merged = AutoModelForCausalLM.from_pretrained(chain.folder(f"{stage}_merged"))
    change = (logits(merged) - logits(base)).abs().max()
    alone = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(alone), logits(merged), atol=1e-5, rtol=1e-5)
    assert change > 1e-3
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_merging_is_pefts_own_merge(chain: Chain) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(chain.folder("base"))
    expected = PeftModel.from_pretrained(base, chain.folder("dpo")).merge_and_unload().state_dict()
    found = load_file(chain.folder("dpo_merged") / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    assert {path.name for path in chain.folder("base").iterdir()} - {"metrics.jsonl", "ledger.json", "steps.jsonl"} == {
        path.name for path in chain.folder("dpo_merged").iterdir()
    }


def test_an_adapter_is_scored_as_its_merged_model(chain: Chain) -> None:
    import pyarrow.parquet as parquet

    ours, merged = (
        parquet.read_table(chain.folder(name) / "logprobs.parquet").to_pylist()
        for name in ("sft_scores", "merged_scores")
    )
    for one, other in zip(ours, merged, strict=True):
        for name in ("chosen_token_logps", "rejected_token_logps"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_dpo_goes_on_from_the_sft_policy_and_is_held_to_it(chain: Chain) -> None:
    """At every step, logps - rewards / beta is the mean log-probability under the merged SFT model, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(chain.folder("sft_merged"))
    tokenizer = AutoTokenizer.from_pretrained(chain.folder("sft_merged"))
    by_id = {row["row_id"]: row for row in read_dataset(chain.folder("pairs"))}
    steps = [json.loads(line) for line in (chain.folder("dpo") / "steps.jsonl").read_text().splitlines()]
    for step, row in zip(steps, chain.metrics("dpo"), strict=True):
        for kind in ("chosen", "rejected"):
            sums = []
            for pair in (by_id[row_id] for row_id in step["rows"]):
                prompt, answer = (
                    tokenizer(pair[name], add_special_tokens=False)["input_ids"] for name in ("prompt", kind)
                )
                sums.append(sum(logprob(model, prompt, [*answer, tokenizer.eos_token_id])))
            reference = row[f"logps/{kind}"] - row[f"rewards/{kind}"] / 0.1
            assert reference == pytest.approx(sum(sums) / len(sums), abs=2e-4)
    assert any(abs(row["rewards/margins"]) > 1e-4 for row in chain.metrics("dpo")[1:])


HELD = [("dpo", "dpo_wired"), ("dpo_fresh", "dpo_fresh_wired"), ("kto", "kto_wired"), ("grpo", "grpo_wired")]


@pytest.mark.parametrize(("implicit", "wired"), [*HELD, ("grpo_fresh", "grpo_fresh_wired")])
def test_the_reference_without_a_second_model_is_the_input_policy(chain: Chain, implicit: str, wired: str) -> None:
    """All metrics of all steps as with the merged input model wired in as reference."""
    rows = chain.metrics(implicit)
    assert len(rows) == 3
    for one, other in zip(rows, chain.metrics(wired), strict=True):
        assert one == pytest.approx(other, abs=2e-5, rel=2e-4)


@pytest.mark.parametrize("stage", ["grpo", "grpo_fresh"])
def test_grpo_starts_at_the_dpo_policy(chain: Chain, stage: str) -> None:
    """Its first completions have the merged DPO model's log-probabilities, and their KL to the reference is zero."""
    model = AutoModelForCausalLM.from_pretrained(chain.folder("dpo_merged"))
    tokenizer = AutoTokenizer.from_pretrained(chain.folder("dpo_merged"))
    rows = [row for row in read_dataset(chain.folder(stage, "rollouts")) if row["step"] == 1]
    assert len(rows) == 8
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert row["logprobs"] == pytest.approx(logprob(model, prompt, row["token_ids"]), abs=2e-5)
    first, *later = chain.metrics(stage)
    assert first["kl"] == pytest.approx(0, abs=1e-7)
    assert max(row["kl"] for row in later) > 1e-6


def test_the_chain_ends_in_a_plain_model(chain: Chain) -> None:
    folder = chain.folder("grpo")
    merged, dpo = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, chain.folder("dpo_merged")))
    assert (logits(merged) - logits(dpo)).abs().max() > 1e-4
    base = load_file(chain.folder("base") / "model.safetensors")
    changed = {name for name, tensor in load_file(folder / "model.safetensors").items() if not tensor.equal(base[name])}
    assert changed and all("_proj" in name for name in changed)


@pytest.fixture
def run_stage(tmp_path: Path, chain: Chain) -> Callable[..., Path]:
    """A stage in this process, on the store of the chain; gives the folder of its outputs. Leaves nothing to take up
    unless it is interrupted."""

    def run(stage: str, inputs: dict[str, Path], name: str = "run", **config: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        context = local_context(stage, config, folder=tmp_path / name, inputs=dict(inputs), store=str(chain.store))
        context.stage.run(context)
        context.checkpoints.clear()
        context.shards.clear()
        return tmp_path / name / "job" / "out"

    return run


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the stage sees it."""


@pytest.mark.parametrize(("uses", "model", "dataset"), [("preference", "sft", "pairs"), ("rl", "dpo", "rows")])
def test_interrupted_training_of_an_input_adapter(
    chain: Chain, run_stage: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, uses: str, model: str, dataset: str
) -> None:
    """The bits of a run without interruption: dropout, and a reference that is the input and not what was saved."""
    rollouts = {**ROLLOUTS, "rewards": [f"{chain.recipe.parent / 'task.py'}:length"]}
    more: dict[str, Any] = {"lora_dropout": 0.3} if uses == "preference" else rollouts
    settings = {**TRAINING, **APART, **more, "checkpoint_steps": 1, "learning_rate": 4.9e-3}
    inputs = {"model": chain.folder(model), "dataset": chain.folder(dataset)}
    whole = run_stage(uses, inputs, "whole", **settings)
    step = Trainer.step

    def killed(self: Trainer, number: int, *arguments: Any) -> Any:
        if number == 2:
            self.saver.background.wait()
            raise Killed
        return step(self, number, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", killed)
        run_stage(uses, inputs, "resumed", **settings)
    resumed = run_stage(uses, inputs, "resumed", **settings)
    events = (resumed.parent / "events.jsonl").read_text().splitlines()
    # of preference, the pass of the reference was taken up before
    assert [event["step"] for event in map(json.loads, events) if event["kind"] == "resumed"][-1] == 2
    for path in sorted((whole / "adapter").iterdir()):
        assert path.read_bytes() == (resumed / "adapter" / path.name).read_bytes(), path.name


def test_a_folder_as_base_is_kept_in_the_store(chain: Chain, run_stage: Callable[..., Path], tmp_path: Path) -> None:
    """Once, under the digest that the adapter then names; the merged model needs the folder no more."""
    base = tmp_path / "mine"
    shutil.copytree(chain.folder("base"), base)
    (base / "note.txt").write_text("another model than any in the store")
    rows = chain.folder("rows")
    adapter = run_stage("sft", {"model": base, "dataset": rows}, **TRAINING, **LORA, **APART) / "adapter"
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    stored = open_store(str(chain.store)).materialize(Artifact("model", name.removeprefix("sha256:")))
    assert (stored / "note.txt").is_file()
    shutil.rmtree(base)
    merged = run_stage("merge_adapter", {"adapter": adapter}, "merge") / "model"
    assert (merged / "note.txt").is_file()
    # another base is not taken for it, and where none is named the one given is
    with pytest.raises(StageError, match=r"is an adapter of the model sha256:.*, but input base is sha256:"):
        run_stage("merge_adapter", {"adapter": adapter, "base": chain.folder("base")}, "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/somewhere"}))
    with pytest.raises(StageError, match=r"does not say what model it is of .*'/somewhere'.*as its input base"):
        run_stage("merge_adapter", {"adapter": adapter}, "unnamed")
    again = run_stage("merge_adapter", {"adapter": adapter, "base": stored}, "given") / "model"
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_a_missing_base_is_said(chain: Chain, tmp_path: Path) -> None:
    store, empty = open_store(str(chain.store)), open_store(str(tmp_path / "empty"))
    copy = tmp_path / "adapter"
    shutil.copytree(chain.folder("sft"), copy, copy_function=shutil.copyfile)
    inputs: dict[str, Path | list[Path]] = {"adapter": copy}
    context = local_context("merge_adapter", {}, folder=tmp_path / "run", inputs=inputs, store=str(tmp_path / "empty"))
    with pytest.raises(StageError, match=f"input adapter is an adapter of the model {chain.id('base')}, which cannot"):
        context.stage.run(context)
    assert list(empty.artifacts()) == [] and store.is_intact(store.find(chain.id("base")))


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sft", "sft", LORA, "input model is an adapter, which is trained on as it is: leave lora_r out, or merge it"),
    ("sft", "base", APART, "merge_adapters is false, but there are no adapters"),
    ("sft", "base", {"quantization": "nf4", **LORA}, "quantization nf4 needs the package bitsandbytes"),
    ("preference", "sft", {"sync_ref_model": True}, "sync_ref_model needs the whole model trained"),
]


@pytest.mark.parametrize(("uses", "model", "config", "message"), REFUSED)
def test_what_does_not_go_together(
    chain: Chain, run_stage: Callable[..., Path], uses: str, model: str, config: dict[str, Any], message: str
) -> None:
    dataset = chain.folder("pairs" if uses == "preference" else "rows")
    with pytest.raises(StageError, match=message):
        run_stage(uses, {"model": chain.folder(model), "dataset": dataset}, **TRAINING, **config)


def test_quantization_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is there, the GPU is missed next."""
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(quantization.torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match="quantization nf4 needs a CUDA GPU, and this process sees none"):
        quantization.require_quantization("nf4")
    quantization.require_quantization(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "adapter_config.json sets bias to 'all', which is not supported"),
        ({"init_lora_weights": "pissa"}, "adapter_config.json sets init_lora_weights to 'pissa'"),
        ({"peft_type": "IA3"}, "of an adapter of type 'IA3'"),
        ({"r": 5}, r"lora_[AB]\.weight has shape .*, this model takes .*: it is of another model"),
        ({"target_modules": ["q_proj"]}, "has extra weights for this model: "),
    ],
)
def test_adapters_that_are_not_taken(
    chain: Chain, run_stage: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(chain.folder("sft"), copy, copy_function=shutil.copyfile)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(StageError, match=message):
        run_stage("merge_adapter", {"adapter": copy})


def test_only_safetensors_of_numbers_are_read(chain: Chain, run_stage: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = tmp_path / "adapter"
    shutil.copytree(chain.folder("sft"), copy, copy_function=shutil.copyfile)
    weights = copy / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(StageError, match=r"1 values of .* are not finite"):
        run_stage("merge_adapter", {"adapter": copy}, "nan")
    weights.rename(copy / "adapter_model.bin")
    with pytest.raises(StageError, match=r"has no adapter_model\.safetensors; only safetensors are read"):
        run_stage("merge_adapter", {"adapter": copy}, "pickled")


def test_recipes_know_adapters(chain: Chain, tmp_path: Path) -> None:
    """A stage that takes none says what to do, and sizes follow from base and adapter."""
    from artifacts.errors import RequestError
    from flows.machine import Machine
    from flows.memory import predict
    from flows.plan import plan
    from flows.recipe import Recipe

    judge = {"judge": on("reward_model", "sft", "pairs")}
    with pytest.raises(
        RequestError, match=r"takes a model, but sft\.adapter is an adapter; make it a model with a stage"
    ):
        Recipe.load(str(write_recipe(tmp_path / "judge", {"sft": CHAIN["sft"], **judge})))
    found = predict(plan(Recipe.load(str(chain.recipe)), open_store(str(chain.store))), Machine(10**10, None))
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # q, o; k, v; gate, up and down, of rank 4
    phases = {name: {phase.name: phase.parts for phase in one.phases} for name, one in found.items()}
    steps = {name: parts["training step"] for name, parts in phases.items() if "training step" in parts}
    assert {name: parts["optimizer"] for name, parts in steps.items()} == dict.fromkeys(steps, 8.0 * trained)
    assert "reference" not in steps["grpo"] and steps["grpo_wired"]["reference"] > 0
    assert set(BASE) < set(chain.payload["stages"])


def test_the_report_draws_how_an_adapter_was_trained(chain: Chain) -> None:
    from flows.reporting.curves import read_curves
    from flows.reporting.reading import Reader

    panels = [
        panel
        for block in read_curves(chain.payload, Reader(open_store(str(chain.store)))).leading
        for panel in block.panels
    ]
    drawn = {series.name: series.count for panel in panels if panel.metric == "loss" for series in panel.chart.series}
    assert {name: drawn.get(name) for name in ("sft", "dpo", "kto", "grpo")} == {
        "sft": 3,
        "dpo": 3,
        "kto": 3,
        "grpo": 3,
    }
