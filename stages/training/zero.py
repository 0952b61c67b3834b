"""DeepSpeed's ZeRO: optimizer state, gradients and (stage 3) parameters are shared out among the processes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from artifacts.errors import StageError
from stages.sharding import Zero
from stages.training.batch import TokenBatch
from stages.training.compiled import build_for_cpu
from stages.training.config import TrainingConfig
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.optimization import build_adamw, set_rate
from stages.training.parallel import use_bfloat16
from stages.training.processes import Processes

_BUCKET_ELEMENTS = 100_000_000
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides the number of steps."""


class ZeroSharded:
    """A DeepSpeed engine, driven a micro-batch at a time; where a step ends is said by hand.

    Works on DeepSpeed's own flat float32 tensors (`optimizer` below) where it offers no way to measure the gradient
    norm before a step, or to give it the state of a step that was taken elsewhere.
    """

    lockstep = True

    def __init__(self, scorer: Scorer, config: TrainingConfig, processes: Processes, sharding: Zero) -> None:
        deepspeed = _deepspeed()
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls
        self.processes, self.stage = processes, sharding.stage
        self.trained = {name: one for name, one in scorer.named_parameters() if one.requires_grad}
        self._shapes = {name: one.shape for name, one in self.trained.items()}
        self.adamw = build_adamw(self.trained, config)
        exact = {name: one.detach().cpu().clone() for name, one in self.trained.items()} if config.bf16 else {}
        if processes.device.type == "cpu":
            build_for_cpu()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        settings = _engine_config(config, sharding, self._shapes)
        if self.stage == 3:  # parameter by parameter, so that the whole model is never on the device
            if config.bf16:
                use_bfloat16(scorer)
            deepspeed.zero.Init(module=scorer, config_dict_or_path=settings, dtype=next(scorer.parameters()).dtype)
            for buffer in scorer.buffers():
                buffer.data = buffer.data.to(processes.device)
        self.engine: Any = deepspeed.initialize(model=scorer, optimizer=self.adamw, config=settings)[0]
        self.optimizer: Any = self.engine.optimizer
        self._begin_state()
        if self.stage == 3:
            # the head's weight is used by readouts, outside of its module's forward pass
            head = scorer.transformers_model.get_output_embeddings()
            for parameter in head.parameters() if head is not None else ():
                deepspeed.zero.register_external_parameter(scorer, parameter)
        for name, weight in exact.items():  # DeepSpeed's master weights start from rounded ones
            self.load(name, weight, {}, 0)
        if exact:
            self.loaded()

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """Stage 3 gathers parameters on the way."""
        return self.engine(batch, readout)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over processes; undo that."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.processes.size)

    def gradient_norm(self) -> Tensor:
        """As the step computes it once more to clip; infinite where a gradient is not finite."""
        if self.stage < 3:
            norm = self.optimizer.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        return torch.as_tensor(norm, device=self.processes.device)

    def step(self, rate: float) -> None:
        """The engine clips, updates and forgets the gradients."""
        set_rate(self.adamw, rate)
        self.engine.step()

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.averaged_gradients.clear()
        if self.stage < 3:
            self.optimizer.all_grad_tensors.clear()

    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the whole tensors."""
        return self._shapes

    def weight(self, name: str) -> Tensor:
        """Put together from the master weights."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = safe_get_full_fp32_param(self.trained[name])
        return whole

    def moments(self, name: str) -> dict[str, Tensor]:
        """Put together from all processes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {key: safe_get_full_optimizer_state(self.trained[name], key) for key in _MOMENTS}

    def put(self, name: str, weight: Tensor) -> None:
        """Keep this process's part."""
        self._keep(name, weight, None)

    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Keep this process's part."""
        for state in self.adamw.state.values() if moments else ():
            state["step"].fill_(steps)
        self.put(name, weight)
        for key, value in moments.items():
            self._keep(name, value, key)

    def loaded(self) -> None:
        """The weights that forward passes use, from the master weights."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for index in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if resident := self.optimizer.persistent_parameters:
            resident[0].all_gather(resident)

    def _keep(self, name: str, whole: Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter: Any = self.trained[name]
        if self.stage < 3:
            parameter.set_full_hp_param(whole.to(self.processes.device), key)
            return
        size = parameter.partition_numel()
        padded = torch.zeros(size * self.processes.size, dtype=torch.float32)
        padded[: whole.numel()] = whole.flatten().cpu()
        part = padded.narrow(0, size * self.processes.rank, size).to(self.processes.device)
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def _begin_state(self) -> None:
        """AdamW's state, as its first step would make it: that of stages 1 and 2 is tied to the parameters once, when
        only the first group has been stepped."""
        flat = (
            self.optimizer.single_partition_of_fp32_groups
            if self.stage < 3
            else self.optimizer.fp32_partitioned_groups_flat
        )
        for tensor in flat:
            self.adamw.state[tensor] = {
                "step": torch.tensor(0.0, device=tensor.device),
                **{key: torch.zeros_like(tensor) for key in _MOMENTS},
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise StageError("ZeRO needs DeepSpeed; pip install 'posttrain[deepspeed]'") from error
    return deepspeed


def _engine_config(config: TrainingConfig, sharding: Zero, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    # a buffer of this size is made in every backward pass, however small the model
    bucket = min(_BUCKET_ELEMENTS, sum(shape.numel() for shape in shapes.values()))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "bf16": {"enabled": config.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_optimization": {"reduce_bucket_size": bucket, **sharding.options, "stage": sharding.stage},
    }
