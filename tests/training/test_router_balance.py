"""The routers' loss beside an objective's: that of a plain loop over separate rows, however a step is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.context import Context
from stages.sharding import Sharding, Whole
from stages.training import loop
from stages.training.adapters import add_adapters
from stages.training.batch import Branch, Group, layout
from stages.training.held_out import measure
from stages.training.language_modeling import TokenLoss, asked_tokens
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.probes import settle_layout
from stages.training.processes import prepare_process
from stages.training.router_balance import RouterBalance, balance_of
from stages.training.sequence_totals import SequenceTotals
from stages.training.windows import DatasetWindows
from tests.training.conftest import tiny_model
from tests.training.experts import DEEPSEEK, EXPERTS
from tests.training.test_loop import context_for, sequences
from tests.training.test_packed_rows import assert_close_to, gradients, groups_sharing_much
from tests.training.test_parallel import WAYS

COEFFICIENT = 0.3
"""So large that the gradient would be another one without it."""


def rows_of(groups: list[Group]) -> list[tuple[Tensor, Tensor]]:
    """(ids [1, T], which of them are trained [T]) of every sequence."""
    rows = []
    for group in groups:
        for branch in group.branches:
            ids = [*group.prefix_ids, *branch.token_ids]
            asked = [False] * len(group.prefix_ids) + list(branch.loss_mask or [True] * len(branch.token_ids))
            rows.append((torch.tensor([ids]), torch.tensor(asked)))
    return rows


def plain_loop(model: Any, groups: list[Group]) -> tuple[float, float, list[Tensor], dict[str, Tensor]]:
    """(loss, auxiliary loss, [E] tokens by expert for every layer, gradients), row by row with transformers alone."""
    model.train()
    losses, balances, loads = [], [], []
    for ids, asked in rows_of(groups):
        output = model(input_ids=ids, output_router_logits=True)
        places = asked.nonzero()[:, 0]
        losses.append(-output.logits[0].log_softmax(-1)[places - 1, ids[0, places]].sum())
        balances.append(output.aux_loss)
        chosen = [layer.topk(model.num_experts_per_tok, -1).indices for layer in output.router_logits]
        loads.append(torch.stack([torch.bincount(one.flatten(), minlength=model.num_experts) for one in chosen]))
    items = sum(asked_tokens(group) for group in groups)
    balance = torch.stack(balances).mean()
    loss = torch.stack(losses).sum() / items + COEFFICIENT * balance
    loss.backward()
    return float(loss), float(balance), list(torch.stack(loads).sum(0)), gradients(model)


def trainer_for(
    folder: Path, model: nn.Module, *, shared: bool = True, coefficient: float | None = COEFFICIENT, **settings: Any
) -> Trainer:
    context = context_for(folder, router_aux_loss_coef=coefficient, max_grad_norm=None, **settings)
    scorer = Scorer(model)
    assert settle_layout(scorer) is None
    scorer.share_prefixes = shared
    balance = balance_of(context, scorer, context.config.router_aux_loss_coef)
    rebuild = lambda: Scorer(model)  # noqa: E731 - not called
    return Trainer(context, context.config, prepare_process(context), scorer, TokenLoss(), rebuild, balance)


def one_step(trainer: Trainer, groups: list[Group]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics of the step, gradients); the weights stay."""
    found: dict[str, Tensor] = {}
    trainer.parallel.step = lambda rate: found.update(gradients(trainer.scorer.model))  # type: ignore[method-assign]
    windows = DatasetWindows(groups, trainer.config)
    row, _ = trainer.step(1, 6, windows.window(0))
    return row, found


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"micro_batch_tokens": 40}], ids=str)
@pytest.mark.parametrize("model_type", EXPERTS)
def test_shared_prompts_and_micro_batches_give_the_step_of_separate_rows(
    tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    groups = groups_sharing_much()
    loss, balance, loads, expected = plain_loop(tiny_model(model_type, **EXPERTS[model_type]), groups)
    trainer = trainer_for(
        tmp_path, tiny_model(model_type, **EXPERTS[model_type]), train_batch_size=len(groups), **settings
    )
    row, found = one_step(trainer, groups)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["aux_loss"] == pytest.approx(balance, rel=1e-5)
    busiest = max(float(layer.max() / layer.sum()) for layer in loads)
    assert row["router/max_load"] == pytest.approx(busiest * len(loads[0]), rel=1e-6)
    assert_close_to(expected, found, 1e-4)


def test_padded_rows_give_it_too(tmp_path: Path) -> None:
    groups = groups_sharing_much()
    loss, balance, _, expected = plain_loop(tiny_model("mixtral", **EXPERTS["mixtral"]), groups)
    trainer = trainer_for(
        tmp_path, tiny_model("mixtral", **EXPERTS["mixtral"]), shared=False, train_batch_size=len(groups)
    )
    row, found = one_step(trainer, groups)
    assert (row["loss"], row["aux_loss"]) == pytest.approx((loss, balance), rel=1e-5)
    assert_close_to(expected, found, 1e-4)


def test_without_it_the_gradient_is_another(tmp_path: Path) -> None:
    """Else the tests above would say nothing."""
    groups = groups_sharing_much()
    _, _, _, expected = plain_loop(tiny_model("mixtral", **EXPERTS["mixtral"]), groups)
    model = tiny_model("mixtral", **EXPERTS["mixtral"])
    row, found = one_step(trainer_for(tmp_path, model, coefficient=0.0, train_batch_size=len(groups)), groups)
    assert "aux_loss" not in row and "router/max_load" not in row
    with pytest.raises(AssertionError):
        assert_close_to(expected, found, 0.05)


def test_adapters_learn_from_it(tmp_path: Path) -> None:
    """The last layer's positions that nothing reads count too: prompts are longer than what is asked for."""
    groups = [Group("a", list(range(3, 30)), (Branch([7, 8]), Branch([9])))]

    def adapted() -> Any:
        context = context_for(tmp_path, lora_r=4)
        model = add_adapters(tiny_model("mixtral", **EXPERTS["mixtral"]), context.config)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        return model

    _, balance, _, expected = plain_loop(adapted(), groups)
    row, found = one_step(trainer_for(tmp_path, adapted(), train_batch_size=1), groups)
    assert row["aux_loss"] == pytest.approx(balance, rel=1e-5)
    assert_close_to(expected, found, 1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.name}{getattr(way, 'stage', '')}")
def test_sharded_models_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Sharding) -> None:
    """With checkpointed layers, which are computed again while the routers' gradient comes in."""
    groups, seen = sequences(8), []
    for number, sharding in enumerate((Whole(), way)):
        monkeypatch.setattr(loop, "launched_sharding", lambda sharding=sharding: sharding)
        model = tiny_model("mixtral", **EXPERTS["mixtral"])
        settings: dict[str, Any] = {"micro_batch_tokens": 20, "gradient_checkpointing": True}
        trainer = trainer_for(tmp_path / str(number), model, **settings)
        windows = DatasetWindows(groups, trainer.config)
        seen.append([trainer.step(step, 3, windows.window(step))[0] for step in range(3)])
    for expected, found in zip(*seen, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_held_out_rows_have_it_in_their_loss(tmp_path: Path) -> None:
    groups = sequences(5)
    model = tiny_model("mixtral", **EXPERTS["mixtral"])
    loss, balance, _, _ = plain_loop(model, groups)
    trainer = trainer_for(tmp_path, model)
    found = measure(trainer, groups)
    assert found["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval/aux_loss"] == pytest.approx(balance, rel=1e-5)


def test_totals_of_a_deep_tree_are_those_of_rows() -> None:
    """Every value once for each sequence that its token is part of; padding and tokens that fill up never."""
    groups = groups_sharing_much()
    lengths = [ids.shape[1] for ids, _ in rows_of(groups)]
    for batch in (layout(groups, multiple=64), layout(groups, share_prefixes=False)):
        totals = SequenceTotals(batch)
        tokens_P = batch.input_ids_BT.flatten().double()[:, None]
        assert totals.tokens_K.tolist() == lengths
        assert totals(torch.ones_like(tokens_P))[:, 0].tolist() == lengths
        assert totals(tokens_P)[:, 0].tolist() == [float(ids.sum()) for ids, _ in rows_of(groups)]


def balance_for(folder: Path, model: nn.Module, coefficient: float | None) -> tuple[RouterBalance | None, Context]:
    context = context_for(folder)
    return balance_of(context, Scorer(model), coefficient), context


def test_the_configuration_of_the_model_says_the_coefficient(tmp_path: Path) -> None:
    """As in transformers: where it asks for its routers' logits."""
    for asks in (False, True):
        model = tiny_model("mixtral", **EXPERTS["mixtral"], router_aux_loss_coef=0.02, output_router_logits=asks)
        assert balance_for(tmp_path, model, None)[0] == (RouterBalance(0.02, 2, 2, 4) if asks else None)
        assert balance_for(tmp_path, model, 0.0)[0] is None
        assert balance_for(tmp_path, model, 0.5)[0] == RouterBalance(0.5, 2, 2, 4)
    assert balance_for(tmp_path, tiny_model(), None)[0] is None
    assert balance_for(tmp_path, tiny_model(), 0.0)[0] is None


def test_models_without_such_a_loss_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"coef is 0.01, but input model is a llama \(LlamaForCausalLM\): it has no"):
        balance_for(tmp_path, tiny_model(), 0.01)
    deepseek = tiny_model("deepseek_v3", **DEEPSEEK)
    assert balance_for(tmp_path, deepseek, None)[0] is None
    with pytest.raises(StageError, match=r"a deepseek_v3 \(DeepseekV3ForCausalLM\): its class computes no auxiliary"):
        balance_for(tmp_path, deepseek, 0.01)


def test_another_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral", **EXPERTS["mixtral"])
    model.forward = _tripled(model.forward)
    with pytest.raises(StageError, match=r"its own auxiliary loss of a short row is .* set router_aux_loss_coef to 0"):
        balance_for(tmp_path, model, 0.01)


def test_a_dense_model_of_a_class_of_experts_has_no_such_loss(tmp_path: Path) -> None:
    """Whose own forward pass fails where it is asked for its routers."""
    sizes = EXPERTS["qwen3_moe"] | {"mlp_only_layers": [0, 1], "output_router_logits": True}
    model = tiny_model("qwen3_moe", **sizes)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1, 2]]), output_router_logits=True)
    assert balance_for(tmp_path, model, None)[0] is None
    with pytest.raises(StageError, match="or it has no experts; leave the setting out"):
        balance_for(tmp_path, model, 0.01)


def _tripled(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.aux_loss = output.aux_loss * 3
        return output

    return changed
