"""`posttrain plan --memory`: whose sizes are known through a recipe, what fits, and the smallest change that does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from flows.cli import main
from flows.machine import Machine, available_ram
from flows.memory import Prediction, predict
from flows.plan import plan
from flows.recipe import Recipe
from stages.sharding import Zero
from stages.training.memory_head import HeadUse, chunk_bytes, held_tensors
from stages.training.memory_phase import worst
from stages.training.memory_request import Request
from stages.training.memory_shape import read_shape
from stages.training.memory_training import Setup
from tests.test_architecture import loaded_after

# Qwen3-8B's own config.json: 8.19 billion parameters
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
PARAMETERS = 8_190_735_360
HUGE = Machine(ram_bytes=10**15)


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**QWEN3_8B, **changes}))
    return path


def recipe_of(tmp_path: Path, stages: dict[str, Any]) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    rows, pairs = (
        {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": kind}}
        for kind in ("prompt_completion", "preference")
    )
    return Recipe.from_dict({"name": "r", "stages": {"rows": rows, "pairs": pairs, **stages}}, base=tmp_path)


def predicted(tmp_path: Path, stages: dict[str, Any], machine: Machine = HUGE) -> dict[str, Prediction]:
    return predict(plan(recipe_of(tmp_path, stages), open_store(str(tmp_path / "store"))), machine)


def stage(uses: str, model: str, *, inputs: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    dataset = "pairs" if uses in ("preference", "reward_model", "reference_logprobs") else "rows"
    return {"uses": uses, "inputs": {"model": model, "dataset": dataset, **(inputs or {})}, "with": config}


def test_sizes_go_through_a_chain(tmp_path: Path) -> None:
    """An 8B model, tuned with LoRA, tuned again, made a reward model, a student beside it: all are the input's size."""
    folder(tmp_path / "base")
    sft = {**stage("sft", "./base", lora_r=16), "launch": {"config": "cpu"}}
    chain = {
        "sft": sft,
        "reference": stage("reference_logprobs", "sft"),
        "dpo": stage("preference", "sft", inputs={"reference_logprobs": "reference"}),
        "reward": stage("reward_model", "dpo"),
        "rl": stage("rl", "dpo", inputs={"reward_model": "reward"}, train_batch_size=8, rewards=["exact_match"]),
    }
    found = predicted(tmp_path, chain)
    assert set(found) == set(chain)
    adapters = 36 * 16 * (8192 + 2 * 5120 + 8192 + 3 * 16384)  # q and o, k and v, the feed-forward part
    assert found["sft"].worst.parts["weights"] == 4 * (PARAMETERS + adapters)
    assert found["sft"].worst.parts["optimizer"] == 8 * adapters
    assert found["reference"].worst.parts["weights"] == 4 * PARAMETERS
    assert "optimizer" not in found["reference"].worst.parts
    assert found["dpo"].worst.parts["optimizer"] == 8 * PARAMETERS
    # a score of 4096 numbers in place of the head
    classifier = PARAMETERS - 151936 * 4096 + 4096
    assert found["reward"].worst.parts["weights"] == 4 * classifier and "head" not in found["reward"].worst.parts
    assert found["rl"].worst.parts["reference"] == 4 * classifier
    assert [phase.name for phase in found["rl"].phases] == ["sampling", "scoring", "training step"]


def test_a_model_that_a_stage_will_make(tmp_path: Path) -> None:
    made = {"architecture": "qwen3", "vocab_size": 1000, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2}
    base = {"uses": "init_model", "inputs": {"dataset": "rows"}, "with": {**made, **sizes}}
    found = predicted(tmp_path, {"base": base, "sft": stage("sft", "base")})
    assert set(found) == {"sft"}  # the others hold nothing that matters
    # a layer: q, k, v, o of 64 x 128, three of 64 x 96, two norms of 64 and two of 32
    parameters = 1000 * 64 + 2 * (4 * 64 * 128 + 3 * 64 * 96 + 2 * 64 + 2 * 32) + 64
    assert found["sft"].worst.parts["weights"] == 4 * parameters


def test_what_is_unknown_is_said_with_its_reason(tmp_path: Path) -> None:
    folder(tmp_path / "new", model_type="qwen9")
    found = predicted(tmp_path, {"sft": stage("sft", "./new"), "dpo": stage("preference", "sft")})
    for one in found.values():
        assert one.fits is None and one.unknown is not None
        assert one.unknown.startswith("input model: architecture 'qwen9' is not among those whose memory is known")
        assert set(one.to_json()) == {"processes", "device", "unknown"}


def test_a_hub_model_that_is_not_here_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    stages = {"sft": stage("sft", f"somebody/model@{commit}")}
    missing = predicted(tmp_path, stages)["sft"].unknown
    assert missing is not None and "somebody/model is not in the local cache yet" in missing
    here = tmp_path / "hub" / "models--somebody--model"
    folder(here / "snapshots" / commit)
    assert predicted(tmp_path, stages)["sft"].worst.parts["optimizer"] == 8 * PARAMETERS


def change_for(tmp_path: Path, gpu_gb: float, uses: str = "sft", **config: Any) -> Prediction:
    folder(tmp_path / "base")
    return predicted(tmp_path, {"s": stage(uses, "./base", **config)}, Machine(10**15, int(gpu_gb * 10**9)))["s"]


def test_smaller_micro_batches_come_first(tmp_path: Path) -> None:
    """In bfloat16 the state of 8B parameters takes 18 bytes each, 147 GB; at 8,192 tokens activations take more."""
    whole = change_for(tmp_path, 10_000, bf16=True)
    assert whole.fits and whole.change is None
    found = change_for(tmp_path, whole.worst.total / 1e9 - 1, bf16=True)
    assert not found.fits and found.change is not None
    assert dict(found.change.fields) == {"micro_batch_tokens": (8192, 4096)} and found.change.same_result
    assert found.change.words() == "micro_batch_tokens 8192 -> 4096"
    assert found.limit is not None and found.change.peak_bytes <= found.limit


@pytest.mark.parametrize(
    ("gpu_gb", "config", "fields", "same_result"),
    [
        (170, {"bf16": True, "max_length": 8192}, {"gradient_checkpointing": (False, True)}, True),
        (80, {}, {"launch.processes": (1, 4), "launch.config": (None, "zero3")}, True),
        (30, {"bf16": True, "lora_r": 16, "max_length": 4096}, {"gradient_checkpointing": (False, True)}, True),
        (190, {"bf16": True, "weight_averaging": {"kind": "ema"}}, {"weight_averaging.device": ("model", "cpu")}, True),
    ],
)
def test_then_what_costs_time_or_machines(
    tmp_path: Path, gpu_gb: float, config: dict[str, Any], fields: dict[str, Any], same_result: bool
) -> None:
    found = change_for(tmp_path, gpu_gb, **config)
    assert not found.fits and found.change is not None
    changed = {name: value for name, value in found.change.fields.items() if name != "micro_batch_tokens"}
    assert changed.items() >= fields.items(), found.change.words()
    assert found.change.same_result is same_result


def test_then_what_changes_the_result(tmp_path: Path) -> None:
    """On a CPU more processes share the same memory, so an 8B model in 64 GB is left with adapters."""
    folder(tmp_path / "base")
    found = predicted(tmp_path, {"s": stage("sft", "./base")}, Machine(64 * 10**9))["s"]
    assert found.change is not None and not found.change.same_result
    assert found.change.fields["lora_r"] == (None, 16)
    assert found.change.words().endswith("(changes the result)")
    nothing = predicted(tmp_path, {"s": stage("sft", "./base")}, Machine(8 * 10**9))["s"]
    assert nothing.fits is False and nothing.change is None


def test_the_change_fits_when_it_is_made(tmp_path: Path) -> None:
    """The advice, written into the recipe, gives a plan that fits, at the peak that was promised."""
    advised = change_for(tmp_path, 80)
    assert advised.change is not None
    values = {name: then for name, (_, then) in advised.change.fields.items()}
    launch = {name.removeprefix("launch."): values.pop(name) for name in list(values) if name.startswith("launch.")}
    changed = {**stage("sft", "./base", **values), "launch": launch}
    again = predicted(tmp_path, {"s": changed}, Machine(10**15, 80 * 10**9))["s"]
    assert again.fits and round(again.worst.total) == advised.change.peak_bytes


def test_processes_on_a_cpu_share_the_machine(tmp_path: Path) -> None:
    folder(tmp_path / "base")
    two = {**stage("sft", "./base"), "launch": {"processes": 2, "config": "cpu"}}
    found = predicted(tmp_path, {"s": two}, Machine(10**12, gpu_bytes=10**9))["s"]
    assert (found.device, found.processes, found.limit) == ("cpu", 2, 5 * 10**11)


def test_each_stage_declares_its_own(tmp_path: Path) -> None:
    """A reference pass of its own is among the phases of a preference stage, and gone where it is precomputed."""
    from stages.preference import STAGE, Config

    shape = read_shape(QWEN3_8B)
    assert STAGE.memory is not None
    online = STAGE.memory(Request(Config(), {"model": shape}, frozenset({"model", "dataset"}), Setup()))
    given = frozenset({"model", "dataset", "reference_logprobs"})
    precomputed = STAGE.memory(Request(Config(), {"model": shape}, given, Setup()))
    assert [phase.name for phase in online] == ["training step", "scoring"]
    assert [phase.name for phase in precomputed] == ["training step"]
    sharded = STAGE.memory(Request(Config(), {"model": shape}, given, Setup(8, Zero(3), "cuda")))
    assert worst(sharded, 10**15).parts["optimizer"] == PARAMETERS  # 8 bytes each, on 8 processes


def test_a_teacher_that_has_said_what_it_knows(tmp_path: Path) -> None:
    """Its pass has all of it and nothing else; the student beside it has its head alone, of 151,936 x 4,096 numbers."""
    folder(tmp_path / "base")
    folder(tmp_path / "student", num_hidden_layers=2)
    chain = {
        "taught": stage("teacher_states", "./base"),
        "kept": stage("distill", "./student", inputs={"teacher_states": "taught"}, lmbda=0.0),
        "beside": stage("distill", "./student", inputs={"teacher": "./base"}, lmbda=0.0),
    }
    found = {name: one.worst.parts for name, one in predicted(tmp_path, chain).items()}
    assert found["taught"]["weights"] == found["beside"]["reference"] == 4 * PARAMETERS
    assert "optimizer" not in found["taught"]
    assert found["kept"]["reference"] == 4 * 151936 * 4096
    assert found["kept"]["head"] == found["beside"]["head"]


def test_a_teacher_that_is_asked_for_the_sampled_token_alone(tmp_path: Path) -> None:
    """Of 2 x 32 MiB or more of logits, the student's and the teacher's, there is one; the exact divergence beside the
    policy gradient has both, and the student's exponentials."""
    folder(tmp_path / "base")
    folder(tmp_path / "student", num_hidden_layers=2)
    kinds = {
        "whole": {},
        "iw_opd": {"loss_type": "iw_opd"},
        "sampled": {"loss_type": "minillm", "single_step_decomposition": False},
        "decomposed": {"loss_type": "minillm"},
    }
    chain = {
        name: stage("distill", "./student", inputs={"teacher": "./base"}, **settings)
        for name, settings in kinds.items()
    }
    head = {name: one.phases[0].parts["head"] for name, one in predicted(tmp_path, chain).items()}
    assert head["iw_opd"] == head["sampled"]
    teacher, exponentials = head["whole"] - head["iw_opd"], head["decomposed"] - head["whole"]
    assert teacher > exponentials > 2**25


def test_every_one_of_several_teachers_counts(tmp_path: Path) -> None:
    """Of two here, both weights stay; on servers, each has its weights and a cache of its own."""
    folder(tmp_path / "base")
    folder(tmp_path / "student", num_hidden_layers=2)
    both = {"teacher": ["./base", "./base"]}
    served = {"loss_top_k": 8, "teacher_engine": {"engine": "vllm_server", "kv_cache_gib": 12}}
    named = {"lmbda": 0.0, "teacher_column": "subject"}
    chain = {
        "one": stage("distill", "./student", inputs={"teacher": "./base"}, lmbda=0.0),
        "two": stage("distill", "./student", inputs=both, **named),
        "one_apart": stage("distill", "./student", inputs={"teacher": "./base"}, lmbda=0.0, **served),
        "apart": stage("distill", "./student", inputs=both, **named, **served),
        "mixed": stage(
            "distill",
            "./student",
            inputs=both,
            **named,
            loss_top_k=8,
            teacher_engines=[{}, served["teacher_engine"]],
        ),
    }
    found = {name: one.worst.parts for name, one in predicted(tmp_path, chain).items()}
    assert found["one"]["reference"] == found["mixed"]["reference"] == 4 * PARAMETERS
    assert found["two"]["reference"] == 2 * found["one"]["reference"]
    assert found["two"]["head"] == found["one"]["head"]
    assert "reference" not in found["apart"]
    assert found["apart"]["engine"] == 2 * found["one_apart"]["engine"] == 2 * found["mixed"]["engine"]
    assert found["one_apart"]["engine"] > 4 * PARAMETERS + 12 * 2**30


def test_held_out_prompts_take_as_many_completions_at_once(tmp_path: Path) -> None:
    """Of 64 prompts in the place of 8, with the keys and values of 112 tokens each (padded from 99): 36 layers of 2
    times 8 heads of 128 numbers, with what a CPU's allocator holds besides. In groups as in training it is the same."""
    folder(tmp_path / "base")
    settings = {"rewards": ["exact_match"], "train_batch_size": 64, "max_length": 100, "max_completion_length": 20}
    inputs = {"eval_dataset": "rows"}
    chain = {
        "plain": stage("rl", "./base", **settings),
        "apart": stage("rl", "./base", inputs=inputs, **settings),
        "alike": stage("rl", "./base", inputs=inputs, eval_num_generations=8, eval_temperature=1, **settings),
    }
    found = {name: one.phases for name, one in predicted(tmp_path, chain).items()}
    assert found["alike"] == found["plain"] and found["apart"][1:] == found["plain"][1:]
    more = found["apart"][0].parts["sampler"] - found["plain"][0].parts["sampler"]
    assert more == pytest.approx(1.12 * (64 - 8) * 112 * 36 * 2 * 8 * 128 * 4)


def test_the_teacher_of_sdpo(tmp_path: Path) -> None:
    """Of an 8B policy: a float32 copy that follows it (with one more to compute with in bfloat16), one in bfloat16
    beside a GPU's model, or none; its pass has the gradients of a step beside it, which sampling has not."""
    folder(tmp_path / "base")
    settings = {"rewards": ["exact_match"], "train_batch_size": 8}
    chain = {
        "ema": stage("sdpo", "./base", **settings),
        "narrow": stage("sdpo", "./base", bf16=True, **settings),
        "base": stage("sdpo", "./base", teacher_model_kind="base", bf16=True, **settings),
        "live": stage("sdpo", "./base", teacher_model_kind="live", feedback_column="answer", **settings),
        "none": stage("sdpo", "./base", distillation_weight=0.0, **settings),
        "adapted": stage("sdpo", "./base", teacher_model_kind="base", lora_r=8, **settings),
        "rl": stage("rl", "./base", **settings),
    }
    found = {name: one.phases for name, one in predicted(tmp_path, chain).items()}
    assert found["none"] == found["rl"]
    copies = {"ema": 4 * PARAMETERS, "narrow": 6 * PARAMETERS, "base": 4 * PARAMETERS, "live": 0}
    for name, copy in copies.items():
        *others, teaching = found[name]
        assert [phase.name for phase in found[name]] == ["sampling", "training step", "teaching"]
        assert [phase.parts.get("reference", 0) for phase in found[name]] == [copy] * 3
        assert teaching.parts["gradients"] == 4 * PARAMETERS and "gradients" not in others[0].parts
    # a model without its adapters is there already
    assert "reference" not in found["adapted"][-1].parts
    # a prompt of 1024, two solutions of 256 and the words around them, and 8 completions; with feedback of any length
    # up to 10240
    few, many = (found[name][-1].parts["activations"] for name in ("ema", "live"))
    assert few < many


@pytest.mark.parametrize("together", [False, True])
def test_a_comparison_beside_a_loss_has_a_gradient_of_the_head_of_its_own(together: bool) -> None:
    """And of hidden states; its chunk has a teacher's beside it, also where the loss couples tokens."""
    shape = read_shape(QWEN3_8B)
    alone, both, loss = (
        held_tensors(shape, use, 1024, device="cuda", compute=2, frozen=False)
        for use in (
            HeadUse(teacher=shape),
            HeadUse(together, teacher=shape, apart=True),
            HeadUse(together),
        )
    )
    weight, hidden, chunk = 4 * 4096 * 151936, 2 * 1024 * 4096, chunk_bytes(shape, 1024, "cuda")
    assert sum(alone) == weight + 2 * chunk + 2 * hidden
    # a chunk of the loss alone is gone before the comparison
    assert sum(both) - sum(loss) == weight + (2 if together else 1) * chunk + 2 * hidden


def test_a_value_model_is_there_in_every_phase_of_ppo(tmp_path: Path) -> None:
    """Beside an 8B policy a value model of two of its 36 layers, made from a language model: 2 numbers of its moments
    and a weight all the time, its gradient in the steps; it has a score of 4096 numbers in place of the head."""
    folder(tmp_path / "base")
    folder(tmp_path / "small", num_hidden_layers=2)
    settings = {"rewards": ["exact_match"], "train_batch_size": 8, "kl_coef": 0.0}
    chain = {
        "head": stage("ppo", "./base", **settings),
        "apart": stage("ppo", "./base", inputs={"value_model": "./small"}, save_value_model=True, **settings),
        "again": stage("ppo", "./base", inputs={"value_model": "apart.value_model"}, **settings),
    }
    found = predicted(tmp_path, chain)
    embedding = 151936 * 4096
    layer = (PARAMETERS - 2 * embedding - 4096) // 36
    value = embedding + 2 * layer + 2 * 4096  # final norm and score
    names = ["sampling", "scoring", "scoring", "training step"]
    assert [phase.name for phase in found["apart"].phases] == names
    assert found["again"].phases == found["apart"].phases
    sampling, step = (tuple(found[name].phases[place] for name in ("head", "apart")) for place in (0, -1))
    for part, size in (("weights", 4), ("optimizer", 8)):
        for head, apart in (sampling, step):
            assert apart.parts[part] - head.parts[part] == size * value
    assert sampling[1].total - sampling[0].total == 12 * value
    assert step[1].parts["gradients"] - step[0].parts["gradients"] == 4 * value
    assert step[1].parts["activations"] > step[0].parts["activations"]
    assert step[1].parts["process"] == step[0].parts["process"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text(
        "stages:\n"
        "  rows: {uses: normalize, with: {source: {path: rows.jsonl}, type: prompt_completion}}\n"
        "  sft: {uses: sft, inputs: {model: ./base, dataset: rows}}\n"
    )
    arguments = ["plan", str(tmp_path / "r.yaml"), "--store", str(tmp_path / "store"), "--memory-gb", "80"]
    assert main([*arguments, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert "memory" not in stages["rows"]
    found = stages["sft"]["memory"]
    assert found["fits"] is False and found["limit_bytes"] == 80 * 10**9 and found["device"] == "cuda"
    assert found["peak_bytes"] == pytest.approx(sum(found["parts"].values()), abs=10)
    assert found["parts"]["weights"] == 4 * PARAMETERS
    assert found["change"]["fields"]["launch.config"] == {"from": None, "to": "zero3"}
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "training step" in printed and "zero3" in printed and "no: 80.0 GB GPU" in printed
    assert main(["plan", str(tmp_path / "r.yaml"), "--store", str(tmp_path / "store")]) == 0
    assert "training step" not in capsys.readouterr().out


def test_it_is_arithmetic_alone() -> None:
    loaded = loaded_after("import flows.memory, flows.memory_table, flows.machine")
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "datasets", "prefect", "huggingface_hub"}


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_counts(tmp_path: Path, version: int) -> None:
    """The least of the groups that lie in each other; no limit is a word or a huge number."""
    top = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n" if version == 2 else "4:cpu:/x\n3:memory:/a/b\n")
    (top / "a/b").mkdir(parents=True)
    (top / "a/b" / name).write_text("max\n" if version == 2 else "9223372036854771712\n")
    unlimited = available_ram(tmp_path)
    (top / "a" / name).write_text("123456789\n")
    assert available_ram(tmp_path) == 123456789 < unlimited
