"""How every training stage begins: the process group, the model, its adapters, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.context import Context
from stages.training.config import TrainingConfig
from stages.training.loop import Trainer
from stages.training.model import Scorer, add_adapters, load_causal_lm, load_tokenizer
from stages.training.objective import Objective
from stages.training.probes import check_head, settle_layout
from stages.training.processes import prepare_process


def start(context: Context, config: TrainingConfig, objective: Objective) -> tuple[Trainer, Any]:
    """(trainer over input `model` with adapters where asked for, its tokenizer)."""
    accelerator = prepare_process(context)
    context.phase("loading the model")
    folder = context.input("model")

    def build() -> Scorer:
        return Scorer(add_adapters(load_causal_lm(folder), config))

    scorer = build()
    check_head(scorer)
    settle_packing(context, scorer)
    return Trainer(context, config, accelerator, scorer, objective, build), load_tokenizer(folder)


def start_classifier(
    context: Context, config: TrainingConfig, objective: Objective, load: Callable[..., Any]
) -> tuple[Trainer, Any]:
    """As `start`, of input `model` with a fresh head; `load(folder, new_head_seed=...)`."""
    accelerator = prepare_process(context)
    context.phase("loading the model")
    folder = context.input("model")
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def build() -> Scorer:
        model = load(folder, new_head_seed=config.seed)
        model.config.pad_token_id = pad
        return Scorer(add_adapters(model, config))

    scorer = build()
    settle_packing(context, scorer)
    return Trainer(context, config, accelerator, scorer, objective, build), tokenizer


def frozen_scorer(context: Context, name: str, like: Scorer | None = None) -> Scorer:
    """A model that is not trained (reference, teacher), in evaluation mode."""
    scorer = Scorer(load_causal_lm(context.input(name))).eval().requires_grad_(False)
    check_head(scorer)
    settle_packing(context, scorer)
    if like is not None:
        like.share_prefixes = scorer.share_prefixes = like.share_prefixes and scorer.share_prefixes
    return scorer


def settle_packing(context: Context, scorer: Scorer) -> None:
    """Probe the model, and log the reason where its rows cannot be packed."""
    if (reason := settle_layout(scorer)) is not None:
        context.log(f"every completion gets a padded row with its own copy of the prompt: {reason}")
