"""Adapters as artifacts: the base that they name, what is refused, and what plans and reports make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from artifacts import Artifact, open_store, transfer
from artifacts.errors import StageError
from artifacts.retention import Policy
from artifacts.survey import survey
from stages.__main__ import publish
from stages.context import local_context
from tests.stages.adapter_chain import APART, CHAIN, LORA, TRAINING, Chain, on
from tests.tiny_recipe import BASE, write_recipe


def test_a_folder_as_base_is_kept_in_the_store(chain: Chain, run_on_chain: Callable[..., Path], tmp_path: Path) -> None:
    """Once, under the digest that the adapter then names; the merged model needs the folder no more."""
    base = tmp_path / "mine"
    shutil.copytree(chain.folder("base"), base)
    (base / "note.txt").write_text("another model than any in the store")
    rows = chain.folder("rows")
    adapter = run_on_chain("sft", {"model": base, "dataset": rows}, **TRAINING, **LORA, **APART) / "adapter"
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    stored = open_store(str(chain.store)).materialize(Artifact("model", name.removeprefix("sha256:")))
    assert (stored / "note.txt").is_file()
    shutil.rmtree(base)
    merged = run_on_chain("merge_adapter", {"adapter": adapter}, "merge") / "model"
    assert (merged / "note.txt").is_file()
    # another base is not taken for it, and where none is named the one given is
    with pytest.raises(StageError, match=r"is an adapter of the model sha256:.*, but input base is sha256:"):
        run_on_chain("merge_adapter", {"adapter": adapter, "base": chain.folder("base")}, "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/somewhere"}))
    with pytest.raises(StageError, match=r"does not say what model it is of .*'/somewhere'.*as its input base"):
        run_on_chain("merge_adapter", {"adapter": adapter}, "unnamed")
    again = run_on_chain("merge_adapter", {"adapter": adapter, "base": stored}, "given") / "model"
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_the_base_of_an_adapter_is_kept_as_long_as_the_adapter(chain: Chain, tmp_path: Path) -> None:
    """Its input was a folder, which is not the store's: garbage collection and export know of the base anyway."""
    base, url = tmp_path / "mine", str(tmp_path / "store")
    shutil.copytree(chain.folder("base"), base)
    inputs: dict[str, Path | list[Path]] = {"model": base, "dataset": chain.folder("rows")}
    config = {**TRAINING, **LORA, **APART}
    context = local_context("sft", config, folder=tmp_path / "run", inputs=inputs, store=url)
    context.stage.run(context)
    publish(context)
    store = open_store(url)
    (adapter,) = (one for one in store.artifacts() if one.kind == "adapter")
    (kept,) = (one for one in store.artifacts() if one.kind == "model")
    store.set_alias("mine/sft", adapter)
    found = survey(store, Policy(grace_hours=0, keep_runs=0, keep_days=0))
    assert {item.artifact: item.reason for item in found.stays if item.artifact} == {
        adapter: "named @mine/sft",
        kept: f"needed to make adapter {adapter.digest[:12]}",
    }
    moved = transfer.export(store, [adapter], tmp_path / "exported", lineage=True)
    assert set(moved.copied) == {adapter, kept}


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
    ("preference", "sft", {"sync_ref_model": True}, "sync_ref_model needs the whole model trained"),
]


@pytest.mark.parametrize(("uses", "model", "config", "message"), REFUSED)
def test_what_does_not_go_together(
    chain: Chain, run_on_chain: Callable[..., Path], uses: str, model: str, config: dict[str, Any], message: str
) -> None:
    dataset = chain.folder("pairs" if uses == "preference" else "rows")
    with pytest.raises(StageError, match=message):
        run_on_chain(uses, {"model": chain.folder(model), "dataset": dataset}, **TRAINING, **config)


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
    chain: Chain, run_on_chain: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(chain.folder("sft"), copy, copy_function=shutil.copyfile)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(StageError, match=message):
        run_on_chain("merge_adapter", {"adapter": copy})


def test_only_safetensors_of_numbers_are_read(chain: Chain, run_on_chain: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = tmp_path / "adapter"
    shutil.copytree(chain.folder("sft"), copy, copy_function=shutil.copyfile)
    weights = copy / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(StageError, match=r"1 values of .* are not finite"):
        run_on_chain("merge_adapter", {"adapter": copy}, "nan")
    weights.rename(copy / "adapter_model.bin")
    with pytest.raises(StageError, match=r"has no adapter_model\.safetensors; only safetensors are read"):
        run_on_chain("merge_adapter", {"adapter": copy}, "pickled")


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
    by_name = {"uses": "merge_adapter", "inputs": {"adapter": "owner/lora"}}
    with pytest.raises(RequestError, match=r"for an adapter of the Hub, `hf download owner/lora --local-dir FOLDER`"):
        Recipe.load(str(write_recipe(tmp_path / "hub", {"merge": by_name})))
    found = predict(plan(Recipe.load(str(chain.recipe)), open_store(str(chain.store))), Machine(10**10, None))
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # q, o; k, v; gate, up and down, of rank 4
    phases = {name: {phase.name: phase.parts for phase in one.phases} for name, one in found.items()}
    steps = {name: parts["training step"] for name, parts in phases.items() if "training step" in parts}
    assert {name: parts["optimizer"] for name, parts in steps.items()} == dict.fromkeys(steps, 8.0 * trained)
    # a copy of the input adapter to go back to; of a fresh one, nothing: it is switched off
    assert steps["grpo"]["reference"] == 4.0 * trained and "reference" not in steps["grpo_fresh"]
    assert steps["grpo_wired"]["reference"] > 4.0 * trained
    assert set(BASE) < set(chain.payload["stages"])


def test_the_report_draws_how_an_adapter_was_trained(chain: Chain) -> None:
    from flows.reporting.curves import read_curves
    from flows.reporting.reading import Reader

    panels = [
        panel
        for kind in read_curves(chain.payload, Reader(open_store(str(chain.store)))).kinds
        for panel in kind.leading
    ]
    drawn = {series.name: series.count for panel in panels if panel.metric == "loss" for series in panel.chart.series}
    assert {name: drawn.get(name) for name in ("sft", "dpo", "kto", "grpo")} == {
        "sft": 3,
        "dpo": 3,
        "kto": 3,
        "grpo": 3,
    }
