"""A*-PO: regression on the advantage under the optimal policy, with values sampled once from the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice
from stages.stage import MODELS, Input, Stage
from stages.training.config import PolicyConfig, policy_outputs
from stages.training.eval_settings import held_out_problems
from stages.training.memory import same_shape
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.rollout_settings import JudgedRolloutConfig, dropout_problems, reward_problems

if TYPE_CHECKING:
    from stages.context import Context


class Config(EngineChoice, JudgedRolloutConfig, PolicyConfig):
    """Settings of A*-PO, under TRL's names. An item of train_batch_size is a completion, one of each prompt."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.5, gt=0)
    """V* of a prompt is beta1 log mean exp(reward / beta1) over its completions in input `samples`; small: the best
    reward, large: the mean."""
    beta2: float = Field(1e-3, gt=0)
    """How strongly the policy is held to the reference: beta2 times its log-ratio is fitted to reward - V*."""
    filter_all_incorrect: bool = True
    """Leave prompts out of which every sampled completion has reward 0; the ledger counts them."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the loss is of the model without it, as in TRL."""
    max_completion_length: int = Field(256, gt=0)
    """Most tokens of a completion."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + dropout_problems(config)
    return problems + engine_problems(config, config) + held_out_problems(config, wired)


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`.

    Input `samples` has several rewarded completions of each prompt by the reference: output `completions` of `sample`.
    """
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.training.a2po import AdvantageRegression, optimal_values, regressed_windows, with_values
    from stages.training.initial import reference_of
    from stages.training.online_run import read_prompts, train_on_rollouts
    from stages.training.start import start

    config: Config = context.config
    values = optimal_values(read_dataset(context.input("samples")), beta1=config.beta1)
    trainer, tokenizer = start(context, config, AdvantageRegression(config.beta2))
    reference = reference_of(context, trainer)
    ledger = RowLedger()
    prompts = read_prompts(context, trainer, tokenizer, ledger)
    prompts = with_values(prompts, values, ledger, filter_all_incorrect=config.filter_all_incorrect)
    rollouts, windows = regressed_windows(context, prompts, values, trainer, tokenizer, reference)
    train_on_rollouts(context, trainer, tokenizer, windows, rollouts, ledger)


def memory(request: Request) -> list[Phase]:
    """Sampling, the passes of reward model and reference, and the steps."""
    config, prompt = request.config, longest_prompt(request)
    row, rows = prompt + config.max_completion_length, config.train_batch_size
    reference = request.models.get("reference", request.model)
    work = request.passes(row=row, rows=rows)
    share = -(-rows // request.setup.processes)
    return online_phases(
        request,
        reference=reference,
        asked=Sampled(share, prompt, config.max_completion_length, sorts=config.top_p < 1),
        scored=[(reference, work), (request.models.get("reward_model"), work)],
        work=work,
        use=HeadUse(together=True),
    )


STAGE = Stage(
    name="a2po",
    version=5,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES),
        "eval_dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "samples": Input(("dataset",)),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset"},
    active_outputs=lambda config: policy_outputs(config, "rollouts"),
    dataset_types=lambda config, inputs: {"rollouts": "prompt_completion"},
    run=run,
    summary="A*-PO: regression on the optimal policy's advantage, one completion a prompt",
    check=check,
    main_metric="reward",
    memory=memory,
    shapes=same_shape,
    tokenized=open_prompts,
)
