"""Adapters on chosen modules against peft's own full-logits forward, and the references that need no second model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.sft import Config
from stages.sharding import Sharding, Whole
from stages.training.adapters import add_adapters, load_adapter, write_adapter
from stages.training.batch import Group, layout
from stages.training.initial import Reference, put_back, switched_off
from stages.training.memory_adapters import Adapters
from stages.training.memory_shape import read_shape
from stages.training.model import Scorer, token_logprobs
from stages.training.parallel import spread
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_parallel import ALONE, WAYS, take_steps

GROUPS = random_groups(3, 2)


def adapted(untied: bool = True, **settings: Any) -> Any:
    """A tiny model with adapters of random weights."""
    model = add_adapters(tiny_model(tie_word_embeddings=not untied), Config(lora_r=3, lora_alpha=7, **settings))
    move(model)
    return model.eval()


def move(model: nn.Module, by: float = 0.05) -> None:
    """Weights that no initialization gives, for all that is trained."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=draws))


def by_rows(model: Any) -> Tensor:
    """[N] log-probabilities of all branches' tokens by the library's own logits, each branch a row of its own."""
    found = []
    for group in GROUPS:
        for branch in group.branches:
            ids = torch.tensor([[*group.prefix_ids, *branch.token_ids]])
            logprobs_TV = model(input_ids=ids).logits[0, len(group.prefix_ids) - 1 : -1].log_softmax(-1)
            found.append(logprobs_TV.gather(1, torch.tensor(branch.token_ids)[:, None])[:, 0])
    return torch.cat(found)


def scored(scorer: Scorer, groups: list[Group] = GROUPS) -> Tensor:
    batch = layout(groups, share_prefixes=scorer.share_prefixes)
    logprobs: Tensor = scorer(batch, token_logprobs(batch)).logprobs_N
    return logprobs


def gradients(model: nn.Module, logprobs_N: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token counts differently."""
    model.zero_grad()
    (logprobs_N * torch.linspace(-1, 2, len(logprobs_N))).sum().backward()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.grad is not None for one in trained.values())
    return {name: one.grad.clone() for name, one in trained.items() if one.grad is not None}


CHOSEN: list[dict[str, Any]] = [
    {"lora_target_modules": ["q_proj", "lm_head"]},
    {"lora_target_modules": ["lm_head", "embed_tokens"], "use_rslora": True},
    {"lora_target_modules": ["down_proj", "lm_head", "embed_tokens"], "use_dora": True},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"lora_target_modules": ["o_proj", "lm_head"], "modules_to_save": ["input_layernorm", "v_proj"]},
    {"layers_to_transform": [1], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.*": 3}},
]


@pytest.mark.parametrize("settings", CHOSEN, ids=lambda settings: "-".join(map(str, settings)))
def test_chosen_modules_equal_pefts_own_logits(settings: dict[str, Any]) -> None:
    """Shared prefixes, the last layer on few positions, our norms and the chunked head included: values, gradients."""
    model = adapted(**settings)
    packed = scored(packing_scorer(model))
    ours = gradients(model, packed)
    plain = adapted(**settings)
    theirs = gradients(plain, by_rows(plain))
    torch.testing.assert_close(packed, by_rows(plain), atol=2e-5, rtol=1e-5)
    assert (packed - by_rows(tiny_model(tie_word_embeddings=False)).detach()).abs().max() > 0.01
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: name + text)


class Scaled(nn.Module):
    """Stands for dropout: zeros and 1 / (1 - p), by feature, without chance."""

    def forward(self, states: Tensor) -> Tensor:
        return states * (torch.arange(states.shape[-1]) % 3 > 0) * 1.5


def test_dropout_of_the_heads_adapter_is_on_its_input_alone() -> None:
    models = [adapted(lora_target_modules=["lm_head"], lora_dropout=0.3) for _ in range(2)]
    undropped = scored(packing_scorer(models[0])).detach()
    for model in models:
        model.get_base_model().lm_head.lora_dropout["default"] = Scaled()
    dropped = scored(packing_scorer(models[0])).detach()
    torch.testing.assert_close(dropped, by_rows(models[1]).detach(), atol=2e-5, rtol=1e-5)
    assert (dropped - undropped).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": ["q_prj"]}, "LlamaForCausalLM has no module 'q_prj'; did you mean 'q_proj'"),
        ({"lora_target_modules": ["q_proj", "head"]}, "lora_target_modules: LlamaForCausalLM has no module 'head'"),
        ({"modules_to_save": ["embed"]}, "modules_to_save: LlamaForCausalLM has no module 'embed'"),
        ({"modules_to_save": ["mlp"]}, "'mlp' is made of other modules; name those"),
        ({"lora_target_modules": ["v_proj"], "modules_to_save": ["v_proj"]}, "v_proj is in lora_target_modules and in"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: LlamaForCausalLM has layers 0 to 1, found 2"),
        (
            {"rank_pattern": {"q_prj": 2}},
            "rank_pattern: no module that has an adapter fits 'q_prj'; did you mean 'q_proj'",
        ),
        (
            {"lora_target_modules": ["q_proj"], "alpha_pattern": {"up_proj": 2}},
            "alpha_pattern: no module that has an adapter fits 'up_proj'",
        ),
        ({"lora_target_modules": ["norm"]}, "adapters cannot be put on LlamaForCausalLM"),
        (
            {"lora_target_modules": ["lm_head"], "use_dora": True, "lora_dropout": 0.1},
            "use_dora on the head takes no lora_dropout",
        ),
    ],
)
def test_modules_that_cannot_be_chosen(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        adapted(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_target_modules": ["lm_head"]},
        {"lora_target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_a_tied_head_is_not_taken_apart(settings: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="embedding and head of this model are one weight"):
        adapted(untied=False, **settings)


@pytest.mark.parametrize("settings", [*CHOSEN, {}])
def test_an_adapters_folder_is_the_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Read again, and read by peft alone; merged it gives the same, and the same bytes are written again."""
    from peft import PeftModel

    model = adapted(**settings)
    expected = by_rows(model).detach()
    write_adapter(model, tmp_path / "a", None)
    ours = load_adapter(
        tiny_model(tie_word_embeddings=False), tmp_path / "a", dropout=0.0 if "use_dora" in settings else 0.5
    )
    write_adapter(ours, tmp_path / "b", None)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    alone = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=False), tmp_path / "a")
    merged = ours.eval().merge_and_unload()
    for one in (alone, merged):
        torch.testing.assert_close(by_rows(one).detach(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scored(packing_scorer(merged)).detach(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [*CHOSEN, {}])
def test_trained_parameters_are_predicted_exactly(settings: dict[str, Any]) -> None:
    config = Config(lora_r=3, **settings)
    model = add_adapters(tiny_model(tie_word_embeddings=False), config)
    adapters = Adapters.of(config)
    assert adapters is not None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert read_shape(model.get_base_model().config.to_dict()).adapter_parameters(adapters) == trained


def references(scorer: Scorer) -> Iterator[tuple[Reference, Tensor]]:
    """Each with what it must give: the base, or the adapter as it is now."""
    base = packing_scorer(tiny_model(tie_word_embeddings=False))
    scorer.eval()
    with torch.no_grad():
        yield switched_off(scorer), scored(base)
        yield put_back(scorer), scored(scorer)


@pytest.mark.parametrize("settings", [*CHOSEN, {"lora_dropout": 0.2}])
def test_references_hold_while_the_policy_moves(settings: dict[str, Any]) -> None:
    """To the bit before and after steps, and the steps are those of a run without passes of a reference."""
    model = adapted(**settings)
    scorer = packing_scorer(model)
    found = list(references(scorer))
    config = Config(lora_r=3, **settings, learning_rate=1e-2)
    parallel, lone = spread(scorer, config, ALONE, Whole()), packing_scorer(adapted(**settings))
    alone = spread(lone, config, ALONE, Whole())
    for _ in range(2):
        for reference, expected in found:
            with reference() as inside, torch.no_grad():
                assert torch.equal(scored(inside.eval()), expected)
        torch.manual_seed(3)
        steps = take_steps(scorer, parallel, 1)
        torch.manual_seed(3)
        assert steps == take_steps(lone, alone, 1)
    with torch.no_grad():
        assert not torch.equal(scored(scorer.eval()), found[1][1])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", [CHOSEN[1], CHOSEN[2], CHOSEN[3]])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.name}{getattr(way, 'stage', '')}")
def test_sharded_heads_take_the_steps_of_whole_ones(settings: dict[str, Any], way: Sharding) -> None:
    config = Config(lora_r=3, **settings, learning_rate=1e-2)
    taken = []
    for one in (Whole(), way):
        scorer = packing_scorer(adapted(**settings))
        taken.append(take_steps(scorer, spread(scorer, config, ALONE, one), 2))
    for (loss, norm), (same_loss, same_norm) in zip(*taken, strict=True):
        assert (same_loss, same_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))


def test_references_in_bfloat16_leave_the_masters_alone() -> None:
    config = Config(lora_r=3, lora_target_modules=["q_proj", "lm_head"], learning_rate=1e-2, bf16=True)
    scorers = [packing_scorer(adapted(lora_target_modules=["q_proj", "lm_head"])) for _ in range(2)]
    spreads = [spread(scorer, config, ALONE, Whole()) for scorer in scorers]
    kept = put_back(scorers[0])
    with torch.no_grad():
        before = scored(scorers[0].eval())
    for _ in range(2):
        for reference in (switched_off(scorers[0]), kept):
            with reference() as inside, torch.no_grad():
                after = scored(inside.eval())
        assert torch.equal(after, before)
        first, second = (take_steps(scorer, one, 1) for scorer, one in zip(scorers, spreads, strict=True))
        assert first == second
