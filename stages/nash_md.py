"""Nash-MD: the policy against its own mixture with the reference, towards a policy that none is preferred to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.losses.online import PREFERENCES
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

    PreferenceName = str
else:  # the table of preferences is what may be chosen
    PreferenceName = Literal[tuple(PREFERENCES)]

Beta = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(JudgedRolloutConfig, PolicyConfig):
    """Settings of Nash-MD, under TRL's names. An item of train_batch_size is a prompt: two completions, of which the
    policy's is trained."""

    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate."""
    beta: Beta | Annotated[tuple[Beta, ...], Field(min_length=1)] = 0.1
    """How strongly the policy is held to the reference. Several: one for each pass over the prompts, then the last."""
    mixture_coef: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.5
    """The reference's share in the opponent, whose next tokens are drawn from policy^(1 - mixture_coef)
    reference^mixture_coef: 0 is the policy itself, 1 the reference. Several: one for each pass over the prompts, then
    the last."""
    preference: PreferenceName = "bradley_terry"
    """How rewards say which completion is preferred: with probability sigmoid(their difference), or always the one with
    the higher reward."""

    absent: ClassVar[Mapping[str, str]] = {
        "rollouts": (
            "every token of the opponent is drawn from the logits of policy and reference together, and engines like "
            "vLLM give those of one model; leave it out, and the embedded engine samples. online_dpo with xpo_alpha, "
            "whose completions have one author each, takes it"
        )
    }


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + dropout_problems(config)
    return problems + held_out_problems(config, wired)


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`."""
    from stages.data.ledger import RowLedger
    from stages.training.changing_beta import beta_of_step, first_beta
    from stages.training.initial import reference_of
    from stages.training.nash_md import NashMdLoss, contest_windows
    from stages.training.online_run import read_prompts, train_on_rollouts
    from stages.training.start import start

    config: Config = context.config
    objective = NashMdLoss(first_beta(config.beta))
    trainer, tokenizer = start(context, config, objective)
    reference = reference_of(context, trainer)
    ledger = RowLedger()
    prompts = read_prompts(context, trainer, tokenizer, ledger)
    contest = contest_windows(context, prompts, trainer, tokenizer, reference)
    windows = beta_of_step(contest, config, len(prompts), objective.use)
    train_on_rollouts(context, trainer, tokenizer, windows, contest.rollouts, ledger)


def memory(request: Request) -> list[Phase]:
    """Sampling with both models, the passes of reward model and reference, and the steps."""
    config, prompt = request.config, longest_prompt(request)
    row, rows = prompt + config.max_completion_length, config.train_batch_size
    reference = request.models.get("reference", request.model)
    work = request.passes(row=row, rows=rows)
    judged = request.passes(row=row + config.max_completion_length, rows=rows)
    share = -(-rows // request.setup.processes)
    return online_phases(
        request,
        reference=reference,
        asked=Sampled(share, prompt, config.max_completion_length, sorts=config.top_p < 1, beside=reference),
        scored=[(reference, work), (request.models.get("reward_model"), judged)],
        work=work,
        use=HeadUse(),
    )


STAGE = Stage(
    name="nash_md",
    version=5,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES),
        "eval_dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset"},
    active_outputs=lambda config: policy_outputs(config, "rollouts"),
    dataset_types=lambda config, inputs: {"rollouts": "prompt_completion"},
    run=run,
    summary="Nash-MD: the policy against its mixture with the reference",
    check=check,
    main_metric="objective/model_scores",
    memory=memory,
    shapes=same_shape,
    tokenized=open_prompts,
)
