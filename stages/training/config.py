"""Settings that every training stage shares. Names and units are those of transformers' TrainingArguments and peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.monitors import MONITORS, ROW_MONITORS
from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.stage import Config, operational
from stages.training.adapter_settings import BITSANDBYTES, AdapterConfig
from stages.training.averaging_settings import WeightAveraging
from stages.training.schedule import DECAYS, ENDLESS, FALLS, SETTINGS

TRACKERS = {
    "tensorboard": "'posttrain[trackers]'",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
"""`report_to`, which are packages of that name -> what pip installs them by."""

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "muon"]

if TYPE_CHECKING:
    MonitorName = str
    FallName = str
    DecayName = str
else:  # the tables are what may be chosen
    MonitorName = Literal[(*MONITORS, *ROW_MONITORS)]
    FallName, DecayName = Literal[tuple(FALLS)], Literal[tuple(DECAYS)]


class OptimizationConfig(Config):
    """The optimizer, its learning rate, and what it computes in."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: FallName = "linear"
    """How the learning rate falls after warm-up: along a line, a half cosine, several of them (cosine_with_restarts), a
    power of the line (polynomial), with the root of the steps (inverse_sqrt), not at all (constant), or at the end
    alone (warmup_stable_decay)."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Share of all steps over which the learning rate rises from zero."""
    warmup_steps: int | None = Field(None, ge=0)
    """The number of these steps, in place of warmup_ratio."""
    lr_decay_ratio: float = Field(0.2, gt=0, le=1)
    """Share of all steps over which warmup_stable_decay falls."""
    lr_decay_type: DecayName = "linear"
    """How it falls there: along a line, a half cosine, or as 1 - sqrt(share of these steps)."""
    lr_num_cycles: int = Field(1, gt=0)
    """Falls of cosine_with_restarts, each from the peak."""
    lr_power: float = Field(1.0, gt=0)
    """Exponent of polynomial; 1: as linear."""
    lr_timescale: int | None = Field(None, gt=0)
    """Steps in which inverse_sqrt falls to 1 / sqrt(2); null: those of warm-up, or 10,000 without one."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of learning_rate at which the fall ends."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the dataset; ignored where max_steps is given."""
    max_steps: int | None = Field(None, gt=0)
    """Number of optimizer steps."""
    train_batch_size: int = Field(32, gt=0)
    """Items (rows, pairs or completions) of one optimizer step over all processes."""
    optim: OptimizerName = "adamw"
    """adamw; adamw_8bit: its state in a quarter of the memory (needs bitsandbytes); adafactor: nearly no state
    (arXiv:1804.04235); muon: orthogonal updates of the layers' matrices, with half of the state, and adamw for the rest
    (arXiv:2502.16982; the same learning rates)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of muon's mean of gradients."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; null: never."""
    weight_averaging: WeightAveraging | None = None
    """Average the weights over the steps; the output, and what measures input eval_dataset, are the averaged ones."""
    seed: int = Field(42, ge=0)
    """Every random number of the stage follows from it."""
    bf16: bool = False
    """Forward and backward in bfloat16 over float32 master weights."""
    pure_bf16: bool = False
    """With bf16, nothing is kept in float32: weights, gradients and adamw's moments are bfloat16, rounded at random so
    that small updates count on average (arXiv:2010.06192). 8 bytes a weight in place of 18, and a noise that bf16 alone
    has not."""


class TrainingConfig(AdapterConfig, OptimizationConfig):
    """How a model is optimized. Fields marked operational do not change the result."""

    gradient_checkpointing: bool = operational(False)
    """Compute activations again in the backward pass: less memory, about a third more time."""
    micro_batch_tokens: int = operational(8192, gt=0)
    """Most tokens (padding included) of one forward pass; larger batches are split, with the same gradient."""
    checkpoint_steps: int | None = operational(None, gt=0)
    """Save a resumable state every so many steps; null: so often that saving takes at most 5 % of the time."""
    stop_on: tuple[MonitorName, ...] = operational(())
    """Monitors that end the run with an error, the last checkpoint kept; all of them give notice in any case."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = operational(())
    """Trackers that get the metrics as they come, besides metrics.jsonl."""

    @property
    def stops_every(self) -> int | None:
        """Steps between measurements by which the run may end, where they are given."""
        return None

    def packages(self) -> dict[str, dict[str, str]]:
        """Of trackers and optimizers."""
        found: dict[str, dict[str, str]] = {"report_to": {str(name): TRACKERS[name] for name in self.report_to}}
        found |= {"optim": BITSANDBYTES} if self.optim == "adamw_8bit" else {}
        return super().packages() | found

    def against(self, sharding: Sharding) -> dict[str, str]:
        """Optimizers that need more than slices of the tensors they update."""
        found = super().against(sharding)
        if self.pure_bf16 and not isinstance(sharding, Whole):
            both = f"pure_bf16 and sharding ({sharding.name}) exclude each other"
            return found | {"pure_bf16": f"{both}: launch with ddp, or leave it out"}
        able = {"adamw": (Whole, Fsdp, Zero), "muon": (Whole, Fsdp)}.get(self.optim, (Whole,))
        if isinstance(sharding, able):
            return found
        ways = "ddp or fsdp2" if self.optim == "muon" else "ddp"
        return found | {
            "optim": f"{self.optim} and sharding ({sharding.name}) exclude each other: launch with {ways}, or take "
            f"adamw"
        }

    @model_validator(mode="after")
    def _the_schedule_uses_what_is_given(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are given; give one of them")
        for name, owner in SETTINGS.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.lr_scheduler_type != owner:
                raise ValueError(f"{name} is of lr_scheduler_type {owner}, found {self.lr_scheduler_type}")
        if self.min_lr_ratio and self.lr_scheduler_type in ENDLESS:
            raise ValueError(
                f"min_lr_ratio is given, but lr_scheduler_type is {self.lr_scheduler_type}, whose fall has no such end"
            )
        return self

    @model_validator(mode="after")
    def _the_optimizer_uses_what_is_given(self) -> Self:
        fields = type(self).model_fields
        unused = {"betas": self.optim == "adafactor", "adam_epsilon": self.optim == "adafactor"}
        unused["muon_momentum"] = self.optim != "muon"
        for name, is_unused in unused.items():
            if is_unused and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is given, but optim is {self.optim}, which would not use it")
        return self

    @model_validator(mode="after")
    def _averages_are_updated(self) -> Self:
        averaging = self.weight_averaging
        if averaging is not None and (problem := averaging.problem(self.max_steps, self.stops_every)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _weights_in_bfloat16_have_an_optimizer(self) -> Self:
        if self.pure_bf16 and not self.bf16:
            raise ValueError("pure_bf16 is given, but bf16 is false: passes would be in float32; give bf16: true too")
        if self.pure_bf16 and self.optim != "adamw":
            raise ValueError(f"pure_bf16 is given, but optim is {self.optim}: only adamw rounds at random")
        return self


class PolicyConfig(TrainingConfig):
    """Of stages that train a language model, which may leave its adapters as they are."""

    goes_on: ClassVar[bool] = True
    merge_adapters: bool = True
    """Output `model` has the adapters in its weights; false: output `adapter`, in peft's format, names its base."""
    router_aux_loss_coef: float | None = Field(None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts, a mean over sequences (arXiv:2101.03961); null: that
    of the model's configuration, where its `output_router_logits` asks for it; 0: none."""


def policy_outputs(config: PolicyConfig, *others: str) -> tuple[str, ...]:
    """`Stage.active_outputs` of these stages: a model or an adapter, and what else there is."""
    return ("model" if config.merge_adapters else "adapter", *others)


class PassConfig(Config):
    """Of stages whose fixed model passes over given completions, for another stage to use."""

    max_length: int = Field(1024, gt=1)
    """Longest prompt with completion in tokens; must be that of the stage that uses the result."""
    bf16: bool = False
    """Compute in bfloat16, and keep in it what is kept as computed."""
    micro_batch_tokens: int = operational(8192, gt=0)
    """Most tokens (padding included) of one forward pass."""
    shard_rows: int = operational(256, gt=0)
    """Rows that are saved at a time, fewer where they are large: what a killed run computes again at most."""


class MeasuredConfig(TrainingConfig):
    """Of stages that measure rows of input `eval_dataset` while they train on others."""

    eval_steps: int | None = Field(None, gt=0)
    """Measure input `eval_dataset` every so many steps, and at the end; null: ten times over the run."""
    keep: Literal["last", "best"] = "last"
    """The output has the last weights, or those of the best measurement: the lowest loss, or the highest reward where
    completions are sampled and rewarded."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """End the run once so many measurements in a row were no better; null: take all steps."""

    @property
    def stops_every(self) -> int | None:
        """By input `eval_dataset`."""
        return None if self.early_stopping_patience is None else self.eval_steps

    def measures(self) -> list[str]:
        """What is given of measuring; of no use without input `eval_dataset`."""
        given = {
            "eval_steps": self.eval_steps is not None,
            "keep: best": self.keep == "best",
            "early_stopping_patience": self.early_stopping_patience is not None,
        }
        return [name for name, is_given in given.items() if is_given]


def unused_measuring(config: MeasuredConfig, wired: frozenset[str], *more: str) -> list[str]:
    """What is given for input `eval_dataset` where that is not wired; `more`: inputs that would be of it."""
    if "eval_dataset" in wired:
        return []
    given = [*config.measures(), *(f"input {name}" for name in more if name in wired)]
    return [f"{name} is given, but input eval_dataset is not wired, so it would not be used" for name in given]


def check_measured(config: MeasuredConfig, wired: frozenset[str], own: str = "reference_logprobs") -> list[str]:
    """`Stage.check` of these stages. `own`: the input that is made of input `dataset` beforehand, by the stage of that
    name; there is one of `eval_dataset` too."""
    apart, theirs = "eval_dataset", f"eval_{own}"
    problems = unused_measuring(config, wired, theirs)
    if apart in wired and own in wired and theirs not in wired:
        problems.append(f"{own} are of input dataset; wire {theirs} too, from a stage {own} on {apart}")
    if theirs in wired and own not in wired:
        problems.append(f"{theirs} is wired in, but {own} is not; both are of one model")
    return problems
