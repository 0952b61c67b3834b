"""Every optimizer against its formulas in float64, what it keeps, and where it cannot be used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from artifacts.errors import RequestError, StageError
from flows.recipe import Recipe
from stages import stage
from stages.sft import Config
from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.stage import missing_packages
from stages.training.muon import orthogonalized
from stages.training.optimization import Optimization, is_matrix_of_layer
from stages.training.processes import Processes
from tests.training.conftest import tiny_model
from tests.waiting import LIMIT_SECONDS
from tests.warm import Warm

ALONE = Processes(0, 1, torch.device("cpu"))
SHAPES = {
    "model.embed_tokens.weight": (12, 5),
    "model.layers.0.mlp.up_proj.weight": (7, 5),
    "model.layers.0.mlp.down_proj.weight": (5, 7),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 6, 4),
    "model.layers.1.mlp.experts.down_proj_bias": (3, 6),
    "model.layers.1.norm.weight": (5,),
}
RATES = [1e-2, 7e-3, 3e-3]


def drawn(seed: int, shapes: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stepped(
    config: Config, gradients: list[dict[str, Tensor]], rates: list[float], shapes: dict[str, Any] = SHAPES
) -> Optimization:
    """The weights of seed 0 after these steps."""
    taken = Optimization({name: nn.Parameter(one) for name, one in drawn(0, shapes).items()}, config, ALONE)
    for rate, given in zip(rates, gradients, strict=True):
        step(taken, given, rate)
    return taken


def step(taken: Optimization, gradients: dict[str, Tensor], rate: float) -> None:
    for name, parameter in taken.trained.items():
        parameter.grad = gradients[name].clone()
    taken.gradient_norm()
    taken.step(rate)


def clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """In float64, divided where all together are longer."""
    norm = sum(float(one.double().square().sum()) for one in gradients.values()) ** 0.5
    return {name: one.double() * min(1.0, max_norm / (norm + 1e-6)) for name, one in gradients.items()}


def polar_by_singular_values(matrix: Tensor) -> Tensor:
    """What the quintic of kellerjordan.github.io/posts/muon makes of each singular value, five times."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (3, 6, 4), (2, 4, 9)])
def test_singular_values_go_through_the_polynomial(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalized(matrix).double(), polar_by_singular_values(matrix), atol=2e-5, rtol=2e-5)
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def muon_by_hand(weight: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """arXiv:2502.16982, equation 4, with Nesterov's momentum of 0.9 as a mean."""
    mean = torch.zeros_like(weight)
    for rate, gradient in zip(RATES, gradients, strict=True):
        mean = 0.9 * mean + 0.1 * gradient
        direction = polar_by_singular_values(0.9 * mean + 0.1 * gradient)
        weight = weight * (1 - rate * decay) - rate * 0.2 * max(weight.shape[-2:]) ** 0.5 * direction
    return weight


def adafactor_by_hand(weight: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """arXiv:1804.04235, algorithms 4 and 5 at a given rate: decay 1 - t^-0.8, updates clipped at a root mean square
    of 1."""
    row, column, whole = (torch.zeros(()).double() for _ in range(3))
    for number, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        keep, square = 1 - number**-0.8, gradient**2 + 1e-30
        if gradient.ndim > 1:
            row = keep * row + (1 - keep) * square.mean(-1)
            column = keep * column + (1 - keep) * square.mean(-2)
            second = row[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]
        else:
            second = whole = keep * whole + (1 - keep) * square
        update = gradient / second.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        weight = weight * (1 - rate * decay) - rate * update
    return weight


def adamw_by_hand(weight: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """arXiv:1711.05101, algorithm 2."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for number, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        update = first / (1 - 0.8**number) / ((second / (1 - 0.95**number)).sqrt() + 1e-6)
        weight = weight * (1 - rate * decay) - rate * update
    return weight


SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.5}
ADAM = {"betas": (0.8, 0.95), "adam_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("settings", "of_matrices", "of_others"),
    [
        ({"optim": "adamw", **ADAM}, adamw_by_hand, adamw_by_hand),
        ({"optim": "adamw_8bit", **ADAM}, adamw_by_hand, adamw_by_hand),  # tensors so small stay in float32
        ({"optim": "adafactor"}, adafactor_by_hand, adafactor_by_hand),
        ({"optim": "muon", "muon_momentum": 0.9, **ADAM}, muon_by_hand, adamw_by_hand),
    ],
    ids=lambda value: value["optim"] if isinstance(value, dict) else "",
)
def test_three_steps_by_hand(settings: dict[str, Any], of_matrices: Callable[..., Tensor], of_others: Any) -> None:
    """With clipping, and weight decay on matrices only, not on biases in one tensor (gpt-oss's)."""
    gradients = [drawn(number, SHAPES) for number in (1, 2, 3)]
    taken = stepped(Config(**SETTINGS, **settings), gradients, RATES)
    seen = [clipped(given, 1.5) for given in gradients]
    for name, weight in drawn(0, SHAPES).items():
        decays = weight.ndim > 1 and not name.endswith("bias")
        by_hand = (of_matrices if decays and name.startswith("model.layers") else of_others)(
            weight.double(), [given[name] for given in seen], 0.1 if decays else 0.0
        )
        found = taken.trained[name].detach().double()
        torch.testing.assert_close(found, by_hand, atol=2e-6, rtol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


LARGE = {"model.layers.0.mlp.up_proj.weight": (96, 64), "model.embed_tokens.weight": (128, 64)}


def test_8_bits_stay_near_32() -> None:
    """A moment is rounded to within 1/16 of itself or of 1/256 of the largest of its block; the embedding's are not."""
    gradients = [drawn(number, LARGE) for number in range(1, 9)]
    rates = [1e-2] * 8
    low, full = (stepped(Config(optim=name), gradients, rates, LARGE) for name in ("adamw_8bit", "adamw"))
    matrix, embedding = LARGE
    start = drawn(0, LARGE)[matrix]
    moved, apart = (full.trained[matrix] - start).norm(), (full.trained[matrix] - low.trained[matrix]).norm()
    assert 1e-4 * moved < apart < 0.05 * moved
    torch.testing.assert_close(low.trained[embedding], full.trained[embedding], atol=1e-6, rtol=1e-6)
    assert {one.dtype for key, one in low.moments(matrix).items() if key.startswith("state")} == {torch.uint8}


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_what_is_kept_is_all_that_a_next_step_needs(optim: str) -> None:
    """Saved after two steps as safetensors do, and taken up: the third gives the same bits."""
    gradients = [drawn(number, LARGE) for number in (1, 2, 3)]
    whole = stepped(Config(optim=optim), gradients, RATES, LARGE)
    before = stepped(Config(optim=optim), gradients[:2], RATES[:2], LARGE)
    after = stepped(Config(optim=optim), [], [], LARGE)
    for name, parameter in after.trained.items():
        parameter.data.copy_(before.trained[name].detach())
        after.set_moments(name, {key: one.clone() for key, one in before.moments(name).items()}, 2)
    step(after, gradients[2], RATES[2])
    for name, parameter in whole.trained.items():
        assert torch.equal(after.trained[name], parameter), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_matrices_of_layers_are_the_linear_parts(kind: str) -> None:
    model: Any = tiny_model(kind)
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    }
    stacks = {name for name, one in model.named_parameters() if one.ndim == 3}
    routers = {name for name, one in model.named_parameters() if name.endswith("mlp.gate.weight")}
    found = {name for name, one in model.named_parameters() if is_matrix_of_layer(name, one.ndim)}
    assert found == linear | stacks | routers and len(found) > 3


PROGRAM = """
import sys
import torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from stages.sft import Config
from stages.training.optimization import Optimization
from stages.training.processes import Processes

dist.init_process_group("gloo")
rank, folder, bf16 = dist.get_rank(), sys.argv[1], sys.argv[2] == "bf16"
mesh = init_device_mesh("cpu", (2,))
for way, put in {
    "whole": lambda one: one,
    "sliced": lambda one: distribute_tensor(one, mesh, [Shard(0)]),
}.items():
    weights = {name: torch.nn.Parameter(put(one)) for name, one in load_file(f"{folder}/weights").items()}
    taken = Optimization(weights, Config(optim="muon", bf16=bf16), Processes(rank, 2, torch.device("cpu")))
    for number, rate in enumerate((1e-2, 7e-3, 3e-3), start=1):
        gradients = load_file(f"{folder}/gradients-{number}")
        for name, parameter in weights.items():
            parameter.grad = put(gradients[name])
        taken.gradient_norm()
        taken.step(rate)
    whole = {name: one.full_tensor() if way == "sliced" else one for name, one in weights.items()}
    if rank == 1:
        save_file({name: one.detach().contiguous() for name, one in whole.items()}, f"{folder}/{way}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("number", ["fp32", "bf16"])
def test_two_processes_share_the_matrices_out(tmp_path: Path, number: str, warm_process: Warm) -> None:
    """Whole in both of them, or in slices: the weights of one process, whose gradients are the same to the bit."""
    gradients = [drawn(number, SHAPES) for number in (1, 2, 3)]
    save_file(drawn(0, SHAPES), tmp_path / "weights")
    for index, given in enumerate(gradients, start=1):
        save_file(given, tmp_path / f"gradients-{index}")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    done = subprocess.run(
        [sys.executable, *launcher, *warm_process.command("-c", PROGRAM, str(tmp_path), number)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = stepped(Config(optim="muon", bf16=number == "bf16"), gradients, RATES)
    for way in ("whole", "sliced"):
        for name, found in load_file(tmp_path / way).items():
            torch.testing.assert_close(found, alone.trained[name].detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adafactor", "betas": (0.9, 0.95)}, "betas is given, but optim is adafactor"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon is given, but optim is adafactor"),
        ({"muon_momentum": 0.9}, "muon_momentum is given, but optim is adamw"),
    ],
)
def test_settings_of_another_optimizer_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("optim", "able"),
    [
        ("adamw", [Whole(), Fsdp(), Zero(2), Zero(3)]),
        ("muon", [Whole(), Fsdp()]),
        ("adafactor", [Whole()]),
        ("adamw_8bit", [Whole()]),
    ],
)
@pytest.mark.parametrize("way", [Whole(), Fsdp(), Zero(2), Zero(3)], ids=lambda way: way.name)
def test_which_ways_of_sharding_an_optimizer_takes(optim: Any, able: list[Sharding], way: Sharding) -> None:
    assert ("optim" not in Config(optim=optim).against(way)) == (way in able)


RECIPE = """
name: wrong
stages:
  model: {uses: init_model, inputs: {dataset: data.jsonl}}
  sft:
    uses: sft
    with: {optim: adafactor}
    launch: {processes: 2, config: fsdp2}
    inputs: {model: model, dataset: data}
"""


def test_a_recipe_with_such_a_launcher_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RequestError) as caught:
        Recipe.load(path)
    assert "adafactor and sharding (fsdp2) exclude each other: launch with ddp, or take adamw" in str(caught.value)


def test_what_needs_a_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    asked = Config(optim="adamw_8bit", quantization="nf4", lora_r=4, report_to=("mlflow",))
    missing = {"optim": "bitsandbytes", "quantization": "bitsandbytes", "report_to": "mlflow"}
    assert {name: what.split()[3].strip(",") for name, what in missing_packages(asked).items()} == missing
    assert missing_packages(Config(optim="muon")) == {}


def test_muon_without_matrices_is_refused() -> None:
    with pytest.raises(StageError, match=r"optim muon is for tensors .*: model\.embed_tokens\.weight"):
        Optimization({"model.embed_tokens.weight": nn.Parameter(torch.ones(3, 2))}, Config(optim="muon"), ALONE)
