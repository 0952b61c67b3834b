"""On-line preference optimization: pairs of the model's own completions, judged as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.rollouts.requests import SamplingConfig
from stages.rollouts.reward_spec import Reward
from stages.stage import MODELS, Input, Stage
from stages.training.config import policy_outputs
from stages.training.memory import Phase, Request, same_shape
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_sampling import Sampled
from stages.training.preference_config import PairLossConfig, loss_problems, names_of
from stages.training.rollout_settings import RolloutConfig, reward_problems

if TYPE_CHECKING:
    from stages.context import Context


class Config(RolloutConfig, SamplingConfig, PairLossConfig):
    """Settings of on-line preference optimization. An item of train_batch_size is a prompt's pair."""

    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate of AdamW."""
    num_generations: int = Field(2, ge=2)
    """Completions of a prompt; the one with the highest reward is chosen, the one with the lowest rejected."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Times a step that prompts whose completions are all worth the same are replaced by the next ones (DAPO,
    arXiv:2503.14476); such pairs teach nothing. 0: never."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions: built-in names, or `file.py:name` of your own; input reward_model adds one more."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward, the reward model's last; null: all 1."""
    missing_eos_penalty: float | None = Field(None, gt=0)
    """Taken off the reward of completions that ended at max_completion_length."""
    temperature: float = Field(0.9, gt=0)
    """Sampling temperature; the loss is of the model without it, as in TRL."""
    max_completion_length: int = Field(64, gt=0)
    """Most tokens of a completion."""
    max_length: int = Field(512, gt=1)
    """Longest prompt in tokens; longer ones are dropped and counted in the ledger."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + loss_problems(config)
    other = [loss for loss in config.losses if loss.gold or loss.couples_rows]
    if other:
        problems.append(
            f"loss_type {names_of(other)} takes more than one pair at a time; on-line pairs come one by one"
        )
    if "reference" in wired and not config.needs_reference:
        problems.append(f"input reference is wired in, but {names_of(config.losses)} has no reference")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.data.tokenize import tokenize_prompts
    from stages.training.export import export
    from stages.training.generation import room_for_prompts
    from stages.training.initial import reference_of
    from stages.training.objective import Windows
    from stages.training.online_pairs import OnlinePairs, ReferencedPairs, pair_rollouts
    from stages.training.pair_losses import following_reference, pair_loss, pair_settings
    from stages.training.preference import PreferenceLoss
    from stages.training.rollout_export import write_rollouts
    from stages.training.start import start

    config: Config = context.config
    settings = pair_settings(config)
    trainer, tokenizer = start(context, config, PreferenceLoss(pair_loss(config), settings))
    ledger = RowLedger()
    prompts = tokenize_prompts(
        read_dataset(context.input("dataset")),
        tokenizer,
        max_length=room_for_prompts(trainer.scorer, config.max_length, config.max_completion_length),
        ledger=ledger,
    )
    rollouts = pair_rollouts(context, prompts, trainer, tokenizer)
    windows: Windows = OnlinePairs(rollouts)
    if config.sync_ref_model:
        windows = following_reference(context, trainer, windows, settings)
    elif config.needs_reference:
        windows = ReferencedPairs(windows, trainer, settings, reference_of(context, trainer))
    context.counts["prompts"] = len(prompts)
    trained = trainer.run(windows, ledger.states)
    rollouts.drawing.note_unused(ledger)
    export(context, trained, ledger.to_json(), samples=rollouts.samples)
    if context.is_main:
        write_rollouts(context, rollouts.generations)


def memory(request: Request) -> list[Phase]:
    """Sampling, the passes of reward model and reference, and the steps."""
    config, prompt, longest = request.config, longest_prompt(request), request.config.max_completion_length
    completions, prompts = config.num_generations, config.train_batch_size
    needed = config.needs_reference or config.sync_ref_model
    reference = request.models.get("reference", request.model) if needed else None
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
    )


STAGE = Stage(
    name="online_dpo",
    version=1,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",)),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset"},
    active_outputs=lambda config: policy_outputs(config, "rollouts"),
    run=run,
    summary="on-line DPO: pairs of the model's own completions, judged as they come",
    check=check,
    main_metric="reward",
    memory=memory,
    shapes=same_shape,
)
