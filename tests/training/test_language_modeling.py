"""The supervised objective's variants: other losses, weighted rows, noise on embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from stages.losses.supervised import dft
from stages.seeds import generator
from stages.training.batch import Branch, Group
from stages.training.language_modeling import RowSettings, TokenLoss
from stages.training.model import Scorer
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import agree, gradients, plain_logprobs


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model().double())


def test_dft(scorer: Scorer) -> None:
    groups = random_groups(4, 2)
    rows = plain_logprobs(scorer, groups)
    expected = -sum((row.detach().exp() * row).sum() for row in rows)
    assert isinstance(expected, torch.Tensor)
    agree(scorer, TokenLoss(dft), groups, expected)


def test_a_row_of_weight_two_counts_as_two_rows(scorer: Scorer) -> None:
    """Loss over weighted tokens and its gradient, against the row given twice; a row of weight 0 is not there."""
    one, two, none = random_groups(3, 1)
    weighted = [replace(one, data=RowSettings(1.0)), replace(two, data=RowSettings(2.0))]
    idle = [*weighted, replace(none, data=RowSettings(0.0))]
    repeated = [one, two, two]
    results = []
    for groups in (weighted, idle, repeated):
        loss, _ = TokenLoss()(scorer, scorer.layout(groups))
        count = sum(TokenLoss().count(group) for group in groups)
        results.append((loss / count, gradients(scorer, loss / count)))
    for loss, found in results[1:]:
        assert_close(loss, results[0][0], rtol=1e-12, atol=0)
        for gradient, other in zip(found, results[0][1], strict=True):
            assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def noisy(groups: list[Group]) -> list[Group]:
    return [replace(group, data=RowSettings(noise_key=(5, "neftune", 3, group.row_id))) for group in groups]


def whole(groups: list[Group]) -> list[Group]:
    """Each as one sequence whose first token is not trained."""
    rows = [[*group.prefix_ids, *group.branches[0].token_ids] for group in groups]
    return [
        replace(group, prefix_ids=(), branches=(Branch(ids, [False] + [True] * (len(ids) - 1)),))
        for group, ids in zip(groups, rows, strict=True)
    ]


def test_noise_is_each_rows_own() -> None:
    """Against transformers' model on embeddings with the same noise added by hand; packed, padded, whole or cut."""
    model = tiny_model()
    groups = noisy(whole(random_groups(4, 1)))
    expected = 0.0
    for group in groups:
        ids, settings = torch.tensor([group.branches[0].token_ids]), group.data
        length, hidden = ids.shape[1], 32
        size = 5.0 / (length * hidden) ** 0.5
        seed, *parts = settings.noise_key
        noise = torch.from_numpy(generator(seed, *parts).uniform(-size, size, (length, hidden))).float()
        assert noise.abs().max() <= size and noise.std() > 0.4 * size
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(ids) + noise
            logs = model(inputs_embeds=embeddings).logits[0, :-1].log_softmax(-1)
        expected -= float(logs.gather(1, ids[0, 1:, None]).sum())
    objective = TokenLoss(neftune_noise_alpha=5.0)
    for scorer in (packing_scorer(tiny_model()), Scorer(tiny_model())):
        at_once, _ = objective(scorer, scorer.layout(groups))
        parts_sum = sum(float(objective(scorer, scorer.layout([group]))[0].detach()) for group in groups)
        assert float(at_once.detach()) == pytest.approx(expected, rel=1e-5)
        assert parts_sum == pytest.approx(expected, rel=1e-5)
        quiet, _ = TokenLoss()(scorer, scorer.layout(groups))
        assert float(quiet.detach()) != pytest.approx(expected, rel=1e-4)
