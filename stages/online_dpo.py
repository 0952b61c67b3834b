"""On-line preference optimization: pairs of the model's own completions, judged as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice
from stages.stage import MODELS, Input, Stage
from stages.training.config import policy_outputs
from stages.training.eval_settings import held_out_problems
from stages.training.memory import same_shape
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.preference_config import PairLossConfig, loss_problems, names_of
from stages.training.rollout_settings import JudgedRolloutConfig, dropout_problems, reward_problems

if TYPE_CHECKING:
    from torch import Tensor

    from stages.context import Context
    from stages.losses.pair_logprobs import PairLogprobs
    from stages.training.preference import PairSettings

Alpha = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(gt=0)]


class Config(EngineChoice, JudgedRolloutConfig, PairLossConfig):
    """Settings of on-line preference optimization. An item of train_batch_size is a prompt's pair."""

    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate."""
    beta: Beta | Annotated[tuple[Beta, ...], Field(min_length=1)] = 0.1  # type: ignore[assignment]
    """How strongly the model is held to the reference; of losses without one, the scale of the margin. Several: one for
    each pass over the prompts, then the last."""
    num_generations: int = Field(2, ge=2)
    """Completions of a prompt; the one with the highest reward is chosen, the one with the lowest rejected."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Times a step that prompts whose completions are all worth the same are replaced by the next ones (DAPO,
    arXiv:2503.14476); such pairs teach nothing. 0: never."""
    xpo_alpha: Alpha | Annotated[tuple[Alpha, ...], Field(min_length=1)] = 0.0
    """XPO: one of two completions is the reference's, and so many times its log-probability is added to the loss, which
    leads the policy away from it (TRL's alpha). Several: one for each pass over the prompts, then the last. 0: both
    completions are the policy's."""

    def at_beta(self, beta: float) -> Config:
        """With one beta."""
        return self.model_copy(update={"beta": beta})

    @property
    def explores(self) -> bool:
        """Whether this is XPO."""
        return self.xpo_alpha != 0.0


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + loss_problems(config)
    problems += dropout_problems(config) + _exploration_problems(config) + engine_problems(config, config)
    problems += held_out_problems(config, wired)
    other = [loss for loss in config.losses if loss.gold or loss.couples_rows]
    if other:
        problems.append(
            f"loss_type {names_of(other)} takes more than one pair at a time; on-line pairs come one by one"
        )
    if "reference" in wired and not config.needs_reference:
        problems.append(f"input reference is wired in, but {names_of(config.losses)} has no reference")
    return problems


def _exploration_problems(config: Config) -> list[str]:
    """Of XPO."""
    if not config.explores:
        return []
    problems = []
    if config.num_generations != 2:
        problems.append(
            f"num_generations is {config.num_generations}, but with xpo_alpha there are two completions of a prompt: "
            "the policy's and the reference's"
        )
    if not config.needs_reference:
        problems.append(f"xpo_alpha is of losses with a reference; {names_of(config.losses)} has none")
    if config.rollouts.lora_sync == "adapter":
        problems.append(
            "xpo_alpha samples the reference too, and rollouts.lora_sync adapter sends the policy's adapter alone; "
            "leave lora_sync out, so that the engine is sent all weights of either"
        )
    if config.sync_ref_model:
        problems.append("xpo_alpha explores away from a reference that stays; sync_ref_model moves it; choose one")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`."""
    from stages.data.ledger import RowLedger
    from stages.training.changing_beta import beta_of_step, first_beta
    from stages.training.initial import reference_of
    from stages.training.objective import Windows
    from stages.training.online_loss import OnlinePairLoss
    from stages.training.online_pairs import ReferencedPairs, online_pairs
    from stages.training.online_run import read_prompts, train_on_rollouts
    from stages.training.pair_losses import following_reference, pair_loss, pair_settings
    from stages.training.start import start

    config: Config = context.config

    def at(beta: float) -> tuple[Callable[[PairLogprobs], Tensor], PairSettings]:
        one = config.at_beta(beta)
        return pair_loss(one), pair_settings(one)

    loss, settings = at(first_beta(config.beta))
    objective = OnlinePairLoss(loss, settings, referenced=config.needs_reference, explores=config.explores)
    trainer, tokenizer = start(context, config, objective)
    ledger = RowLedger()
    prompts = read_prompts(context, trainer, tokenizer, ledger)
    stays = config.needs_reference and not config.sync_ref_model
    reference = reference_of(context, trainer) if stays else None
    pairs = online_pairs(context, prompts, trainer, tokenizer, reference)
    windows: Windows = pairs
    if config.sync_ref_model:
        windows = following_reference(context, trainer, pairs, settings)
    elif reference is not None:
        windows = ReferencedPairs(pairs, trainer, settings, reference)
    windows = beta_of_step(windows, config, len(prompts), lambda beta: objective.use(*at(beta)))
    train_on_rollouts(context, trainer, tokenizer, windows, pairs.rollouts, ledger)


def memory(request: Request) -> list[Phase]:
    """Sampling, the passes of reward model and reference, and the steps."""
    config, prompt, longest = request.config, longest_prompt(request), request.config.max_completion_length
    completions, prompts = config.num_generations, config.train_batch_size
    needed = config.needs_reference or config.sync_ref_model
    reference = request.models.get("reference", request.model) if needed else None
    # what a reference that follows has beyond one that stays
    moves = request.following(reference) - request.frozen(reference) if reference and config.sync_ref_model else 0.0
    work = request.passes(row=prompt + 2 * longest, rows=prompts)
    judged = request.passes(row=prompt + completions * longest, rows=prompts)
    share = -(-prompts * completions // request.setup.processes)
    return online_phases(
        request,
        reference=reference,
        asked=Sampled(share, prompt, longest, completions, sorts=config.top_p < 1),
        scored=[(reference, work), (request.models.get("reward_model"), judged)],
        work=work,
        use=HeadUse(together=True),
        teacher=moves,
    )


STAGE = Stage(
    name="online_dpo",
    version=7,
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
    summary="on-line DPO and XPO: pairs of the model's own completions, judged as they come",
    check=check,
    main_metric="reward",
    memory=memory,
    shapes=same_shape,
    tokenized=open_prompts,
)
