"""Model folders that must not be loaded, and the loaded model's numbers against transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.errors import StageError
from stages.context import local_context
from stages.sft import Config
from stages.training.adapters import add_adapters
from stages.training.batch import Branch, Group, layout
from stages.training.classifiers import load_reward_model
from stages.training.model import branch_rewards, load_causal_lm
from stages.training.objective import Readout
from stages.training.out_of_memory import TokenBudget
from stages.training.reward_scoring import score_branches
from tests.training.conftest import packing_scorer, random_groups


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.extra"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, r"1 of 1536 values of model\.layers\.0\.mlp\.up_proj\.weight are not finite"),
        (drop, r"lacks weights for LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"),
        (add, r"has extra weights for LlamaForCausalLM: model\.layers\.7\.extra"),
    ],
)
def test_wrong_weights_are_refused(
    model_folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    change_weights(model_folder, change)
    with pytest.raises(StageError, match=message):
        load_causal_lm(model_folder)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lead_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "no weights .model.safetensors or model.safetensors.index.json.; found: config.json"),
        (cut, "bytes of weights where its header says"),
        (lead_outside, "names '../outside.safetensors', which is no file of the folder"),
        (link, "model.safetensors is a link"),
        (own_code, "asks to run code of its own"),
        (no_config, "no config.json"),
    ],
)
def test_wrong_folders_are_refused_before_a_loader_sees_them(
    model_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_folder)
    with pytest.raises(StageError, match=message):
        load_causal_lm(model_folder)


def test_rewards_equal_transformers_classifier(model_folder: Path) -> None:
    """Our read-out at the last token of shared rows, against the library's pooling of separate rows."""
    model = load_reward_model(model_folder, new_head_seed=1).eval()
    groups = random_groups(4, 2)
    with torch.no_grad():
        batch = layout(groups)
        ours = packing_scorer(model)(batch, branch_rewards(batch))
        theirs = [
            float(model(input_ids=torch.tensor([[*group.prefix_ids, *branch.token_ids]])).logits)
            for group in groups
            for branch in group.branches
        ]
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=1e-5)


def test_rewards_are_read_where_transformers_reads_them_if_the_end_token_is_padding(
    model_folder: Path, tmp_path: Path
) -> None:
    """At the last token before the end ones, also where that is the prompt's, or one within it."""
    model, end = load_reward_model(model_folder, new_head_seed=1).eval(), 2
    model.config.pad_token_id = end
    rows = [([5, 6], [7, 8, end]), ([5, 6], [end]), ([9, 6, end], [end, end]), ([5, end], [end, 7]), ([4], [8, 9])]
    groups = [Group(f"r{number}", prefix, (Branch(ids), Branch([3, 4]))) for number, (prefix, ids) in enumerate(rows)]
    budget = TokenBudget(local_context("sft", {}, folder=tmp_path), 4096)
    found = score_branches(packing_scorer(model), groups, budget)
    with torch.no_grad():
        for (prefix, ids), rewards in zip(rows, found, strict=True):
            theirs = [float(model(input_ids=torch.tensor([[*prefix, *tail]])).logits) for tail in (ids, [3, 4])]
            assert rewards == pytest.approx(theirs, abs=1e-5)


def test_a_new_reward_head_follows_from_the_seed(model_folder: Path) -> None:
    first, again, other = (load_reward_model(model_folder, new_head_seed=seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_reward_model_without_its_head_is_refused(model_folder: Path) -> None:
    with pytest.raises(StageError, match=r"lacks weights .*score\.weight"):
        load_reward_model(model_folder)


def test_adapters_train_alone_and_start_as_the_model(model_folder: Path) -> None:
    """LoRA's second matrix starts at zero, so the adapted model is the model; only adapters get gradients."""
    plain = packing_scorer(load_causal_lm(model_folder))
    adapted = packing_scorer(add_adapters(load_causal_lm(model_folder), Config(lora_r=4, lora_alpha=8)))
    batch = layout([Group("a", (5, 6), (Branch([7, 8]),))])
    with torch.no_grad():
        whole = Readout(torch.arange(batch.num_tokens), lambda hidden, _: hidden)
        hidden = [scorer(batch, whole) for scorer in (plain, adapted)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=0, rtol=0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
