"""How every training stage begins: the process group, the model, its adapters, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from artifacts.errors import StageError
from stages.adapters import ModelSource, model_source, name_for_good
from stages.context import Context
from stages.stage import missing_packages
from stages.training.adapter_start import SharedStart
from stages.training.adapters import add_adapters, load_adapter
from stages.training.classifiers import padding_of
from stages.training.config import PolicyConfig, TrainingConfig
from stages.training.dropout import without_dropout
from stages.training.loop import Trainer
from stages.training.model import Scorer, load_causal_lm, load_tokenizer
from stages.training.objective import Objective
from stages.training.parallel import use_bfloat16
from stages.training.probes import check_head, settle_layout
from stages.training.processes import Processes, launched_sharding, prepare_process
from stages.training.quantization import quantized
from stages.training.reference import LOGPROBS
from stages.training.router_balance import balance_of
from stages.training.trunk import is_multimodal, text_parameters


def start(
    context: Context,
    config: PolicyConfig,
    objective: Objective,
    scorer_of: Callable[[Any], Scorer] = Scorer,
    *,
    own_dropout: bool = False,
) -> tuple[Trainer, Any]:
    """(trainer over input `model`, with adapters where asked for or wired in, its tokenizer).

    `own_dropout`: the model trains with the dropout of its configuration.
    """
    _check_machine(config)
    source = model_source(context, "model")
    _check_adapters(source, config)
    accelerator = prepare_process(context)
    context.phase("loading the model")
    if not config.merge_adapters and context.is_main:
        name_for_good(context, "model")  # now, for a base that has no place is better missed before the training
    shared = SharedStart(Processes.of(accelerator))
    off: dict[str, float] = {}

    def build(settings: dict[str, Any]) -> Scorer:
        model = load_causal_lm(source.folder, **settings)
        if not own_dropout:
            off.update(without_dropout(model))
        if source.adapter is None:
            return scorer_of(add_adapters(model, config, shared))
        return scorer_of(load_adapter(model, source.adapter, config.lora_dropout))

    scorer = build(quantized(config.quantization, accelerator.device))
    _say_quantized(context, config, scorer)
    say_parts(context, scorer)
    _say_dropout(context, off)
    check_head(scorer)
    settle_packing(context, scorer)
    balance = balance_of(context, scorer, config.router_aux_loss_coef)
    trainer = Trainer(context, config, accelerator, scorer, objective, partial(build, {}), balance)
    return trainer, load_tokenizer(source.tokenizer)


def _check_machine(config: TrainingConfig) -> None:
    for name, what in {**missing_packages(config), **config.against(launched_sharding())}.items():
        raise StageError(f"{name}: {what}")


def _check_adapters(source: ModelSource, config: PolicyConfig) -> None:
    if source.adapter is not None and config.lora_r is not None:
        raise StageError(
            "input model is an adapter, which is trained on as it is: leave lora_r out, or merge it first (stage "
            "merge_adapter) to put a fresh one on it"
        )
    if source.adapter is None and config.lora_r is None:
        for given, text in (
            (not config.merge_adapters, "merge_adapters is false"),
            (config.quantization is not None, f"quantization is {config.quantization}"),
            (config.loraplus_lr_ratio is not None, f"loraplus_lr_ratio is {config.loraplus_lr_ratio}"),
        ):
            if given:
                raise StageError(f"{text}, but there are no adapters: input model is a whole model, and lora_r is null")


def start_classifier(
    context: Context, config: TrainingConfig, objective: Objective, load: Callable[..., Any]
) -> tuple[Trainer, Any]:
    """As `start`, of input `model` with a fresh head; `load(folder, new_head_seed=...)`."""
    _check_machine(config)
    accelerator = prepare_process(context)
    context.phase("loading the model")
    folder = context.input("model")
    tokenizer = load_tokenizer(folder)
    shared = SharedStart(Processes.of(accelerator))
    off: dict[str, float] = {}

    def build(settings: dict[str, Any]) -> Scorer:
        model = load(folder, new_head_seed=config.seed, **settings)
        model.config.get_text_config().pad_token_id = padding_of(tokenizer)
        off.update(without_dropout(model))
        return Scorer(add_adapters(model, config, shared))

    scorer = build(quantized(config.quantization, accelerator.device, "score"))
    _say_quantized(context, config, scorer)
    say_parts(context, scorer)
    _say_dropout(context, off)
    settle_packing(context, scorer)
    return Trainer(context, config, accelerator, scorer, objective, partial(build, {})), tokenizer


def frozen_scorer(context: Context, name: str, like: Scorer | None = None, *, bf16: bool = False) -> Scorer:
    """A model that is not trained (reference, teacher), in evaluation mode; adapters are merged into it.

    `bf16`: its weights are rounded to bfloat16, which takes half the memory.
    """
    source = model_source(context, name)
    model = load_causal_lm(source.folder)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter).merge_and_unload()
    scorer = Scorer(model)
    check_head(scorer)
    freeze(context, scorer, bf16)
    if like is not None:
        like.share_prefixes = scorer.share_prefixes = like.share_prefixes and scorer.share_prefixes
    return scorer


def freeze(context: Context, scorer: Scorer, bf16: bool) -> Scorer:
    """Without gradients, in evaluation mode, with packed rows where it can, its weights in bfloat16 or as they are."""
    scorer.eval().requires_grad_(False)
    settle_packing(context, scorer)
    if bf16:
        use_bfloat16(scorer)
    return scorer


def tokenizer_of(context: Context, name: str) -> Any:
    """The tokenizer of an input that takes models or adapters."""
    return load_tokenizer(model_source(context, name).tokenizer)


def say_parts(context: Context, scorer: Scorer) -> None:
    """Log what of a multimodal model is left as it is."""
    model = scorer.transformers_model
    if is_multimodal(model.config):
        frozen = sum(one.numel() for one in model.parameters()) - sum(one.numel() for one in text_parameters(model))
        context.log(
            f"{type(model).__name__} is multimodal: its language model is trained on text alone, the {frozen:,} other "
            "parameters stay as they are"
        )


def _say_quantized(context: Context, config: TrainingConfig, scorer: Scorer) -> None:
    """Log what stays in full precision, where that may be a surprise."""
    kind = config.quantization
    if kind is None:
        return
    if stacks := sum(one.numel() for one in text_parameters(scorer.transformers_model) if one.ndim == 3):
        context.log(f"quantization {kind} is of linear layers: {stacks:,} weights of experts stay as they are")
    for name in ("reference", *LOGPROBS):
        if context.has(name):
            context.log(
                f"input {name} is of weights in full precision, and the policy starts from those of {kind}, so they "
                "differ from the first step on; without the input, the reference is what the policy starts from"
            )


def say_own_teacher(context: Context) -> None:
    """Log what input `model` is as its own teacher, where that may be a surprise."""
    if (kind := context.config.quantization) is not None:
        context.log(
            f"the teacher is input model with its weights in full precision, and what is trained starts from those of "
            f"{kind}, so they differ from the first step on"
        )


def _say_dropout(context: Context, off: Mapping[str, float]) -> None:
    if off:
        settings = ", ".join(f"{name} {value:g}" for name, value in off.items())
        context.log(f"trained without the model's own dropout ({settings})")


def settle_packing(context: Context, scorer: Scorer) -> None:
    """Probe the model, and log the reason where its rows cannot be packed."""
    if (reason := settle_layout(scorer)) is not None:
        context.log(f"every completion gets a padded row with its own copy of the prompt: {reason}")
