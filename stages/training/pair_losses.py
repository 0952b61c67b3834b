"""The loss of a configuration over pairs, and the reference that follows the policy where it asks for one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.losses.f_divergence import f_divergence_of
from stages.losses.pair_logprobs import PairLogprobs
from stages.losses.preference import weighted
from stages.training.adapters import is_adapted
from stages.training.following import Following
from stages.training.loop import Trainer
from stages.training.objective import Windows
from stages.training.pair_windows import FollowingReference
from stages.training.preference import PairSettings
from stages.training.preference_config import PairLossConfig
from stages.training.start import frozen_scorer


def pair_loss(config: PairLossConfig) -> Callable[[PairLogprobs], Tensor]:
    """The weighted sum of the chosen losses."""
    weights = config.loss_weights or [1.0] * len(config.losses)
    return weighted([loss.name for loss in config.losses], weights, config.model_dump())


def pair_settings(config: PairLossConfig) -> PairSettings:
    """What turns tokens into the values that they compare."""
    settings = config.model_dump()
    metrics = {name: metric for loss in config.losses for name, metric in loss.metrics.items()}
    if len(config.losses) > 1:
        metrics |= {f"losses/{loss.name}": loss.with_settings(settings) for loss in config.losses}
    return PairSettings(
        beta=config.beta,
        divergence=f_divergence_of(config.f_divergence_type, config.f_alpha_divergence_coef),
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
        reward=config.losses[0].reward_with(settings) or PairLogprobs.log_ratios,
        metrics=metrics,
    )


def following_reference(context: Context, trainer: Trainer, windows: Windows, settings: PairSettings) -> Windows:
    """Windows whose reference moves towards the policy (TR-DPO), or towards its averaged weights. Raises StageError
    where only adapters are trained."""
    config = context.config
    assert isinstance(config, PairLossConfig)
    if is_adapted(trainer.scorer.model):
        raise StageError("sync_ref_model needs the whole model trained, and input model is an adapter; merge it first")
    # in float32, of which what follows makes what is computed with
    scorer = frozen_scorer(context, "reference" if context.has("reference") else "model", trainer.scorer)
    averaged = config.ref_model_follows == "average"
    following = Following(config.ref_model_mixup_alpha, config.ref_model_sync_steps, averaged)
    return FollowingReference(windows, trainer, settings, scorer.to(trainer.accelerator.device), following)
