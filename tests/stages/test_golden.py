"""What every stage makes of a fixed input, so that behaviour cannot change under an unchanged `version`.

Weights differ in their last bits between kinds of CPU, so nothing is hashed that follows from them bit by bit:
words, ids and counts are compared exactly, and of every float field the weighted mean, to a thousandth. (Checked
with PyTorch's kernels for AVX-512, AVX2 and none: they agree to the fifth digit.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from artifacts import canonical_json, open_store, sha256_bytes
from flows.recipe import Recipe
from stages.identity import semantic_config
from stages.stage import STAGES, load_stage
from tests.every_stage import Done, local_run  # noqa: F401

RELATIVE, ABSOLUTE = 1e-3, 1e-6
_READ = (
    "contamination.json",
    "pairs.jsonl",
    "ledger.json",
    "dataset.json",
    "results.json",
    "metrics.jsonl",
    "steps.jsonl",
    "samples.jsonl",
)

# stage of the recipe: its version, digests of its configuration and of all that is no float, and the floats
GOLDEN: dict[str, tuple[int, str, str, dict[str, float]]] = {
    "rows": (
        3,
        "beffe2e51175708f",
        "9df25633bb422c0a",
        {},
    ),
    "leaks": (
        1,
        "d3b67137637b1fa0",
        "72052e22541ccafa",
        {
            "contamination/contamination: contaminated_rate": 1.0,
            "contamination/contamination: pairs: score": 1.4833,
            "contamination/pairs: score": 1.4833,
        },
    ),
    "doubled": (1, "57b8fc15fe51e1aa", "2688d191cdef74aa", {}),
    "base": (1, "77992e9ed0649125", "9c7df7a7d0529831", {"model/weights: norm": 12.902}),
    "drawn": (
        1,
        "708a02208e7dee21",
        "6e2c6ff2bf94e853",
        {
            "completions/data: reward": 1.3386,
            "completions/data: reward_length": 1.3386,
            "pairs/data: chosen_score": 1.6133,
            "pairs/data: rejected_score": 0.92188,
        },
    ),
    "sft": (
        3,
        "72829c0af53dd096",
        "e53a1d30aa11fed5",
        {
            "model/metrics: loss": 3.8009,
            "model/metrics: grad_norm": 3.756,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.19259,
            "model/metrics: entropy": 3.831,
            "model/metrics: mean_token_accuracy": 0.082011,
            "model/weights: norm": 12.909,
        },
    ),
    "adapter": (
        3,
        "a435306c4d7498a5",
        "a4d743f2281e18f3",
        {
            "adapter/weights: norm": 4.3771,
            "adapter/metrics: loss": 3.8521,
            "adapter/metrics: grad_norm": 3.1874,
            "adapter/metrics: learning_rate": 0.00081481,
            "adapter/metrics: epoch": 0.19259,
            "adapter/metrics: entropy": 3.8312,
            "adapter/metrics: mean_token_accuracy": 0.082011,
        },
    ),
    "adapter_dpo": (
        4,
        "f7a47b1039db92a3",
        "20165d69215aaff6",
        {
            "adapter/weights: norm": 4.3809,
            "adapter/metrics: loss": 0.92456,
            "adapter/metrics: grad_norm": 0.17788,
            "adapter/metrics: learning_rate": 0.00081481,
            "adapter/metrics: epoch": 0.19259,
            "adapter/metrics: rewards/chosen": -0.002448,
            "adapter/metrics: rewards/rejected": -0.00173,
            "adapter/metrics: rewards/accuracies": 0.40278,
            "adapter/metrics: rewards/margins": -0.00071806,
            "adapter/metrics: logps/chosen": -10.294,
            "adapter/metrics: logps/rejected": -10.473,
            "adapter/metrics: mean_token_accuracy": 0.082011,
            "adapter/metrics: entropy": 3.8308,
        },
    ),
    "merged": (
        1,
        "44136fa355b3678a",
        "9c7df7a7d0529831",
        {
            "model/weights: norm": 12.911,
        },
    ),
    "soup": (
        1,
        "1ec5c308a526717e",
        "9c7df7a7d0529831",
        {"model/weights: norm": 12.906},
    ),
    "judge_of_steps": (
        2,
        "41ccc20190c3783d",
        "fc8827e0775ac245",
        {
            "model/metrics: loss": 1.523,
            "model/metrics: grad_norm": 30.181,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.19259,
            "model/metrics: accuracy": 0.51389,
            "model/weights: norm": 13.012,
        },
    ),
    "solutions": (
        3,
        "337cc13fec6331a0",
        "fdef2a2030742d34",
        {},
    ),
    "kto": (
        3,
        "3452c4b079fc4567",
        "ee945ab9b573ffe3",
        {
            "model/metrics: loss": 0.66728,
            "model/metrics: grad_norm": 0.13707,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.096296,
            "model/metrics: rewards/chosen": -0.018873,
            "model/metrics: rewards/rejected": -0.01394,
            "model/metrics: logps/chosen": -10.382,
            "model/metrics: logps/rejected": -9.8581,
            "model/metrics: entropy": 3.8294,
            "model/metrics: kl": 0.0,
            "model/metrics: rewards/margins": -0.0049335,
            "model/weights: norm": 12.9,
        },
    ),
    "reference": (
        2,
        "245d2dce77120e3b",
        "51c110d288663d75",
        {"logprobs/logprobs: chosen_logps": -10.953, "logprobs/logprobs: rejected_logps": -11.283},
    ),
    "dpo": (
        4,
        "7e4ef5fecdbb9e80",
        "f740cad78ac245e1",
        {
            "model/metrics: loss": 0.92373,
            "model/metrics: grad_norm": 0.30868,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.19259,
            "model/metrics: rewards/chosen": -0.0075668,
            "model/metrics: rewards/rejected": -0.0085227,
            "model/metrics: rewards/accuracies": 0.58333,
            "model/metrics: rewards/margins": 0.00095587,
            "model/metrics: logps/chosen": -10.066,
            "model/metrics: logps/rejected": -10.282,
            "model/metrics: mean_token_accuracy": 0.082011,
            "model/metrics: entropy": 3.8295,
            "model/weights: norm": 12.91,
        },
    ),
    "judge": (
        2,
        "cc448c99d8bff974",
        "d05b5e3460d6cabb",
        {
            "model/metrics: loss": 0.91934,
            "model/metrics: grad_norm": 2.389,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.19259,
            "model/metrics: accuracy": 0.51389,
            "model/metrics: margin": 0.017713,
            "model/metrics: mean_reward": -0.47003,
            "model/weights: norm": 12.967,
        },
    ),
    "ppo": (
        1,
        "726671052f452832",
        "5561237511ce33c7",
        {
            "model/metrics: loss": 0.070016,
            "model/metrics: grad_norm": 2.0836,
            "model/metrics: learning_rate": 0.00078125,
            "model/metrics: completions/mean_length": 7.1797,
            "model/metrics: completions/min_length": 2.1875,
            "model/metrics: completions/max_length": 8.25,
            "model/metrics: completions/clipped_ratio": 1.0312,
            "model/metrics: completions/mean_terminated_length": 3.9688,
            "model/metrics: reward": 0.37385,
            "model/metrics: rewards/length/mean": 1.2266,
            "model/metrics: rewards/length/std": 0.65553,
            "model/metrics: rewards/reward_model/mean": -0.33709,
            "model/metrics: rewards/reward_model/std": 1.6599,
            "model/metrics: val/num_eos_tokens": 2.75,
            "model/metrics: episode": 17.5,
            "model/metrics: objective/kl": 0.085475,
            "model/metrics: objective/kl_coef": 0.06875,
            "model/metrics: kl": 0.015902,
            "model/metrics: objective/scores": 0.37385,
            "model/metrics: objective/entropy": 20.54,
            "model/metrics: objective/non_score_reward": -0.0042737,
            "model/metrics: objective/rlhf_reward": 0.36957,
            "model/metrics: sampling/sampling_logp_difference/mean": 1.2405e-07,
            "model/metrics: policy/approxkl_avg": 0.00072642,
            "model/metrics: policy/clipfrac_avg": 0.0,
            "model/metrics: policy/entropy_avg": 3.919,
            "model/metrics: entropy": 3.919,
            "model/metrics: loss/policy_avg": -0.020374,
            "model/metrics: loss/value_avg": 0.9039,
            "model/metrics: val/clipfrac_avg": 0.0,
            "model/metrics: val/ratio": 1.3759,
            "model/weights: norm": 12.913,
            "model/samples: logprobs": -4.0098,
            "model/samples: reward": -0.050413,
            "model/samples: reward_length": 0.5625,
            "model/samples: reward_reward_model": -0.36291,
            "model/samples: advantage": -0.31503,
            "rollouts/data-00000: logprobs": -4.2759,
            "rollouts/data-00000: reward": 0.34155,
            "rollouts/data-00000: reward_length": 1.3018,
            "rollouts/data-00000: reward_reward_model": -0.40942,
            "rollouts/data-00000: advantage": -0.089171,
        },
    ),
    "online": (
        1,
        "888629d430b74acd",
        "79a2ad5485d816a4",
        {
            "model/metrics: loss": 0.8673,
            "model/metrics: grad_norm": 0.56875,
            "model/metrics: learning_rate": 0.000875,
            "model/metrics: completions/mean_length": 6.5156,
            "model/metrics: completions/min_length": 2.0,
            "model/metrics: completions/max_length": 7.5,
            "model/metrics: completions/clipped_ratio": 0.875,
            "model/metrics: completions/duplicate_ratio": 0.0,
            "model/metrics: completions/mean_terminated_length": 4.4375,
            "model/metrics: reward": 1.0894,
            "model/metrics: frac_reward_zero_std": 0.0,
            "model/metrics: rewards/length/mean": 1.0625,
            "model/metrics: rewards/length/std": 0.49719,
            "model/metrics: rewards/reward_model/mean": 0.026912,
            "model/metrics: rewards/reward_model/std": 1.3861,
            "model/metrics: objective/scores": 1.0894,
            "model/metrics: objective/scores_margin": 1.3291,
            "model/metrics: val/contain_eos_token": 0.375,
            "model/metrics: rewards/chosen": -0.0022298,
            "model/metrics: rewards/rejected": -0.0005226,
            "model/metrics: rewards/accuracies": 0.375,
            "model/metrics: rewards/margins": -0.0017072,
            "model/metrics: logps/chosen": -19.758,
            "model/metrics: logps/rejected": -17.645,
            "model/metrics: mean_token_accuracy": 0.13839,
            "model/metrics: entropy": 3.5896,
            "model/weights: norm": 12.906,
            "model/samples: logprobs": -4.2643,
            "model/samples: reward": 1.4488,
            "model/samples: reward_length": 1.3125,
            "model/samples: reward_reward_model": 0.1363,
            "model/samples: advantage": 0.054527,
            "rollouts/data-00000: logprobs": -4.2957,
            "rollouts/data-00000: reward": 1.2069,
            "rollouts/data-00000: reward_length": 1.2344,
            "rollouts/data-00000: reward_reward_model": -0.027499,
            "rollouts/data-00000: advantage": 0.0025337,
        },
    ),
    "grpo": (
        4,
        "450b7fa6ae72aa4b",
        "7d6ca38bd18cf71a",
        {
            "model/metrics: loss": -0.068777,
            "model/metrics: grad_norm": 1.2352,
            "model/metrics: learning_rate": 0.000875,
            "model/metrics: completions/mean_length": 7.125,
            "model/metrics: completions/min_length": 5.25,
            "model/metrics: completions/max_length": 7.5,
            "model/metrics: completions/clipped_ratio": 0.96875,
            "model/metrics: completions/duplicate_ratio": 0.0,
            "model/metrics: reward": 1.2908,
            "model/metrics: reward_std": 1.6734,
            "model/metrics: frac_reward_zero_std": 0.0,
            "model/metrics: rewards/length/mean": 1.2188,
            "model/metrics: rewards/length/std": 0.37796,
            "model/metrics: rewards/reward_model/mean": 0.07206,
            "model/metrics: rewards/reward_model/std": 1.6809,
            "model/metrics: entropy": 3.5896,
            "model/metrics: clip_ratio/low_mean": 0.0,
            "model/metrics: clip_ratio/high_mean": 0.0,
            "model/metrics: clip_ratio/region_mean": 0.0,
            "model/metrics: sampling/sampling_logp_difference/mean": 1.1153e-07,
            "model/metrics: sampling/sampling_logp_difference/max": 4.1723e-07,
            "model/metrics: completions/mean_terminated_length": 4.6667,
            "model/weights: norm": 12.908,
            "model/samples: logprobs": -4.2627,
            "model/samples: reward": 1.4912,
            "model/samples: reward_length": 1.2227,
            "model/samples: reward_reward_model": 0.26857,
            "model/samples: advantage": -0.019132,
            "rollouts/data-00000: logprobs": -4.3011,
            "rollouts/data-00000: reward": 1.572,
            "rollouts/data-00000: reward_length": 1.4512,
            "rollouts/data-00000: reward_reward_model": 0.12079,
            "rollouts/data-00000: advantage": -0.0029367,
        },
    ),
    "rescored": (
        1,
        "9c09176a5f0a1675",
        "7ffa8a0bcda53b73",
        {
            "rollouts/data: logprobs": -4.3011,
            "rollouts/data: reward": 1.4512,
            "rollouts/data: reward_length": 1.4512,
            "best/data: reward": 1.5,
            "best/data: reward_length": 1.5,
            "pairs/data: chosen_score": 1.5,
            "pairs/data: rejected_score": 1.0,
            "labels/data: reward": 1.4512,
            "labels/data: reward_length": 1.4512,
        },
    ),
    "small": (
        2,
        "4853f37301e9f604",
        "06cbbe8ba1b07f8c",
        {
            "model/metrics: loss": 0.0043144,
            "model/metrics: grad_norm": 0.030645,
            "model/metrics: learning_rate": 0.00081481,
            "model/metrics: epoch": 0.19259,
            "model/metrics: on_policy": 0.55556,
            "model/metrics: divergence": 0.0043144,
            "model/metrics: completions/mean_length": 6.0,
            "model/metrics: completions/clipped_ratio": 1.0,
            "model/weights: norm": 9.0384,
        },
    ),
    "scores": (
        1,
        "9f90b0b38e1a458f",
        "c066fe00544a0072",
        {
            "evaluation/results: accuracy: value": 0.0,
            "evaluation/results: accuracy: low": 0.0,
            "evaluation/results: accuracy: high": 0.0,
            "evaluation/results: loss: value": 2.8185,
            "evaluation/results: loss: low": 2.7664,
            "evaluation/results: loss: high": 2.8585,
            "evaluation/results: reward: value": 2.1065,
            "evaluation/results: reward: low": 2.0377,
            "evaluation/results: reward: high": 2.1834,
            "evaluation/results: completions/mean_length: value": 6.0,
            "evaluation/results: completions/mean_length: low": 6.0,
            "evaluation/results: completions/mean_length: high": 6.0,
            "evaluation/results: completions/clipped_ratio: value": 1.0,
            "evaluation/results: completions/clipped_ratio: low": 1.0,
            "evaluation/results: completions/clipped_ratio: high": 1.0,
            "evaluation/results: perplexity: value": 16.751,
            "evaluation/results: perplexity: low": 15.901,
            "evaluation/results: perplexity: high": 17.435,
            "evaluation/samples: loss": 4.1372,
            "evaluation/samples: reward": 0.0,
            "evaluation/samples: reward_exact_match": 0.0,
            "evaluation/samples: score": 3.0871,
        },
    ),
}


def contents(folder: Path) -> dict[str, Any]:
    """File -> what it says as JSON values, without what the libraries that wrote it decide."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            found[path.stem] = parquet.read_table(path).to_pylist()
        elif path.suffix == ".jinja":
            found[path.stem] = path.read_text()
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as weights:
                shapes = {name: list(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}
                squares = sum(float((weights.get_tensor(name).astype("float64") ** 2).sum()) for name in shapes)
            found["weights"] = {"shapes": shapes, "norm": math.sqrt(squares)}
        elif path.name in _READ:
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[path.stem] = [json.loads(line) for line in lines]
    return found


def without_floats(value: Any) -> Any:
    """The value with null for every float."""
    if isinstance(value, dict):
        return {key: without_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_floats(entry) for entry in value]
    return None if isinstance(value, float) else value


def floats(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """(field, value) of every float; the entries of a list share their list's name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from floats(entry, f"{name}: {key}")
    elif isinstance(value, list):
        for entry in value:
            yield from floats(entry, name)
    elif isinstance(value, float):
        yield name, value


def weighted_means(value: dict[str, Any]) -> dict[str, float]:
    """Field -> mean of x_i * (1 + i / n): a changed sign or order shows, and advantages do not cancel out."""
    fields: dict[str, list[float]] = {}
    for file, entry in value.items():
        for name, number in floats(entry, file):
            fields.setdefault(name, []).append(number)
    return {
        name: sum(number * (1 + i / len(numbers)) for i, number in enumerate(numbers)) / len(numbers)
        for name, numbers in fields.items()
    }


def short(value: Any) -> str:
    """A digest that fits on a line."""
    return sha256_bytes(canonical_json(value))[:16]


def observed(run: Done, name: str) -> tuple[int, str, str, dict[str, float]]:
    """What the run made of a stage, as GOLDEN has it."""
    store, entry = open_store(str(run.store)), run.payload["stages"][name]
    made = {
        f"{output}/{file}": content
        for output, found in entry["outputs"].items()
        for file, content in contents(store.materialize(store.find(found["id"]))).items()
    }
    config = semantic_config(Recipe.load(str(run.recipe)).stages[name].config)
    means = {field: float(f"{mean:.5g}") for field, mean in weighted_means(made).items()}
    return load_stage(entry["uses"]).version, short(config), short(without_floats(made)), means


def test_there_is_a_golden_run_of_every_stage(local_run: Done) -> None:  # noqa: F811
    assert {local_run.payload["stages"][name]["uses"] for name in GOLDEN} == set(STAGES)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(local_run: Done, name: str) -> None:  # noqa: F811
    now, (version, config, exact, means) = observed(local_run, name), GOLDEN[name]
    stage = local_run.payload["stages"][name]["uses"]
    update = f"put this into GOLDEN:\n    {name!r}: {now!r},"
    assert now[0] == version, f"the version of stage {stage} was raised; {update}"
    assert now[1] == config, (
        f"the configuration of stage {stage} has other fields or defaults. Fingerprints follow by themselves, so no "
        f"version need be raised; if it is meant, {update}"
    )
    changed = [] if now[2] == exact else ["words, ids or counts"]
    changed += [
        field
        for field in {**means, **now[3]}
        if not math.isclose(now[3].get(field, math.inf), means.get(field, 0.0), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    ]
    assert not changed, (
        f"stage {stage} gives something else for the same input ({', '.join(changed)}), or something before it "
        f"does. If that is meant, raise `version` of the first stage that changed, and {update}"
    )
