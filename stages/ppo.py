"""Proximal policy optimization: a policy and what values its tokens, rewarded token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice
from stages.stage import MODELS, Input, Stage
from stages.training.config import PolicyConfig, policy_outputs
from stages.training.correction_settings import CorrectionConfig, correction_problems
from stages.training.eval_settings import held_out_problems
from stages.training.memory import same_shape
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.memory_shape import ModelShape
from stages.training.memory_value import beside_value_model
from stages.training.rollout_settings import PenalizedConfig, RolloutConfig, dropout_problems, reward_problems
from stages.training.value_settings import VALUE_MODEL, ValueConfig, value_problems

if TYPE_CHECKING:
    from stages.context import Context


class Config(EngineChoice, CorrectionConfig, ValueConfig, PenalizedConfig, RolloutConfig, PolicyConfig):
    """Settings of PPO, under TRL's names. An item of train_batch_size is a completion, one of each prompt.

    Values are those of a head on the policy, or of input `value_model`, which starts as it comes: a reward model with
    its score, a language model with a head that says 0. max_grad_norm is of all gradients together, the policy's and
    what learns values'.
    """

    learning_rate: float = Field(3e-6, gt=0)
    """Peak learning rate, of the policy."""
    train_batch_size: int = Field(64, gt=0)
    """Completions of one optimizer step over all processes."""
    num_ppo_epochs: int = Field(4, gt=0)
    """Times that every completion is used."""
    num_mini_batches: int = Field(1, gt=0)
    """Optimizer steps that one generation is cut into."""
    cliprange: float = Field(0.2, gt=0)
    """Ratios of new to old probability are clipped to 1 - cliprange and 1 + cliprange."""
    temperature: float = Field(0.7, gt=0)
    """Sampling temperature; also divides the logits in the loss."""
    max_completion_length: int = Field(53, gt=0)
    """Most tokens of a completion."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt in tokens; longer ones are dropped and counted in the ledger."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + value_problems(config, wired)
    problems += dropout_problems(config) + engine_problems(config, None) + correction_problems(config)
    problems += held_out_problems(config, wired)
    if "reference" in wired and not config.kl_coef:
        problems.append("input reference is wired in, but kl_coef is 0, so it would not be used")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`; with input
    `value_model`, train that beside it."""
    from stages.data.ledger import RowLedger
    from stages.training.initial import reference_of
    from stages.training.online_run import read_prompts, train_on_rollouts
    from stages.training.ppo import PpoLoss, PpoSettings
    from stages.training.start import start
    from stages.training.value_model import export_value_model, require_room, valued_policy_of
    from stages.training.valued_rollouts import valued_windows

    config: Config = context.config
    objective = PpoLoss(
        PpoSettings(
            temperature=config.temperature,
            cliprange=config.cliprange,
            vf_coef=config.vf_coef,
            cliprange_value=config.cliprange_value,
        )
    )
    trainer, tokenizer = start(context, config, objective, valued_policy_of(context))
    reference = reference_of(context, trainer) if config.kl_coef else None
    ledger = RowLedger()
    prompts = read_prompts(context, trainer, tokenizer, ledger)
    require_room(trainer.scorer, prompts, config.max_completion_length)
    windows = valued_windows(context, prompts, trainer, tokenizer, reference)
    trained = train_on_rollouts(context, trainer, tokenizer, windows, windows.rollouts, ledger)
    if config.save_value_model:
        export_value_model(context, trained)


def memory(request: Request) -> list[Phase]:
    """Sampling, the passes of the policy and of reward and value model, and the steps; a value head is a row of
    weights."""
    config, prompt = request.config, longest_prompt(request)
    row, rows = prompt + config.max_completion_length, config.train_batch_size * config.num_mini_batches
    scored, work = request.passes(row=row, rows=rows), request.passes(row=row, rows=config.train_batch_size)
    value = request.models[VALUE_MODEL].as_classifier() if VALUE_MODEL in request.models else None
    phases = online_phases(
        request,
        reference=request.models.get("reference", request.model) if config.kl_coef else None,
        asked=Sampled(-(-rows // request.setup.processes), prompt, config.max_completion_length),
        scored=[(request.model, scored), (request.models.get("reward_model"), scored), (value, scored)],
        work=work,
        use=HeadUse(),
    )
    return phases if value is None else beside_value_model(phases, request, value, work)


def outputs(config: Config) -> tuple[str, ...]:
    """Those that it writes."""
    return policy_outputs(config, "rollouts", *([VALUE_MODEL] if config.save_value_model else []))


def shapes(config: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """The policy as it came, and a value model as a reward model."""
    value = {VALUE_MODEL: models[VALUE_MODEL].as_classifier()} if VALUE_MODEL in models else {}
    return {**same_shape(config, models), **value}


STAGE = Stage(
    name="ppo",
    version=6,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES),
        "eval_dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
        VALUE_MODEL: Input(("reward_model", "model"), required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset", VALUE_MODEL: "reward_model"},
    active_outputs=outputs,
    dataset_types=lambda config, inputs: {"rollouts": "prompt_completion"},
    run=run,
    summary="PPO with a value head on the policy, or with a value model",
    check=check,
    main_metric="objective/scores",
    memory=memory,
    shapes=shapes,
    tokenized=open_prompts,
)
