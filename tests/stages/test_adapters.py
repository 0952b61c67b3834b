"""Adapters from stage to stage: SFT, DPO and GRPO on one, its base by name, its reference at every hand-over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.data.dataset import read_dataset
from stages.training.loop import Trainer
from tests.stages.adapter_chain import APART, ROLLOUTS, TRAINING, Chain
from tests.stages.interruptions import Killed


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


@pytest.mark.parametrize(("uses", "model", "dataset"), [("preference", "sft", "pairs"), ("rl", "dpo", "rows")])
def test_interrupted_training_of_an_input_adapter(
    chain: Chain,
    run_on_chain: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    uses: str,
    model: str,
    dataset: str,
) -> None:
    """The bits of a run without interruption: dropout, and a reference that is the input and not what was saved."""
    rollouts = {**ROLLOUTS, "rewards": [f"{chain.recipe.parent / 'task.py'}:length"]}
    more: dict[str, Any] = {"lora_dropout": 0.3} if uses == "preference" else rollouts
    settings = {**TRAINING, **APART, **more, "checkpoint_steps": 1, "learning_rate": 4.9e-3}
    inputs = {"model": chain.folder(model), "dataset": chain.folder(dataset)}
    whole = run_on_chain(uses, inputs, "whole", **settings)
    step = Trainer.step

    def killed(self: Trainer, number: int, *arguments: Any) -> Any:
        if number == 2:
            self.saver.background.wait()
            raise Killed
        return step(self, number, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", killed)
        run_on_chain(uses, inputs, "resumed", **settings)
    resumed = run_on_chain(uses, inputs, "resumed", **settings)
    events = (resumed.parent / "events.jsonl").read_text().splitlines()
    # of preference, the pass of the reference was taken up before
    assert [event["step"] for event in map(json.loads, events) if event["kind"] == "resumed"][-1] == 2
    for path in sorted((whole / "adapter").iterdir()):
        assert path.read_bytes() == (resumed / "adapter" / path.name).read_bytes(), path.name
