"""Predicted memory: counts against the real engine, and sizes against numbers derived by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.losses import head, linear_group_loss, logprobs
from stages.sft import Config
from stages.sharding import Fsdp, Whole, Zero
from stages.training import memory_head, model
from stages.training.adapters import add_adapters
from stages.training.batch import Branch, Group
from stages.training.memory import training_step
from stages.training.memory_activations import (
    READS_FEW_BELOW,
    Layers,
    attention_gradient_bytes,
    norm_bytes,
    saved_bytes,
)
from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import ALLOCATOR_SHARE, HEAP_BYTES, room_for, slack
from stages.training.memory_head import HeadUse, held_tensors
from stages.training.memory_phase import PROCESS_BYTES
from stages.training.memory_request import passes
from stages.training.memory_sampling import Sampled, sampling
from stages.training.memory_shape import ModelShape, UnknownShapeError, read_shape
from stages.training.memory_training import Setup, Training
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.optimization import Optimization
from stages.training.probes import settle_layout
from stages.training.processes import Processes
from stages.training.router_balance import balance_in
from tests.training.conftest import VOCABULARY, tiny_model

EXPERTS = {
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32},
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"]


def settings(kind: str) -> dict[str, Any]:
    return EXPERTS.get(kind, {})


def shape_of(loaded: Any) -> ModelShape:
    """Read from the config.json that the library would write."""
    return read_shape({**json.loads(loaded.config.to_json_string()), "architectures": [type(loaded).__name__]})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in FAMILIES),
        *((kind, {"tie_word_embeddings": False}) for kind in FAMILIES),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_parameters_are_counted_exactly(kind: str, changes: dict[str, Any]) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "num_labels": 1}
    config = AutoConfig.for_model(kind, **sizes, **heads, **settings(kind), **changes)
    for library in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        with torch.device("meta"):
            loaded = library.from_config(config)
        assert shape_of(loaded).parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_adapters_are_counted_exactly(kind: str) -> None:
    loaded = tiny_model(kind, **settings(kind))
    shape = shape_of(loaded)
    adapted = add_adapters(loaded, Config(lora_r=3))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.adapter_parameters(Adapters(3)) == trained


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_lengths_of_dora_are_counted_exactly(kind: str) -> None:
    loaded = tiny_model(kind, **settings(kind))
    shape = shape_of(loaded)
    adapted = add_adapters(loaded, Config(lora_r=3, use_dora=True))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.adapter_parameters(Adapters(3, lengths=True)) == trained


def rows(count: int, tokens: int, asked: int) -> list[Group]:
    """Rows whose last tokens are asked for."""
    ids = [[(7 * index + row) % (VOCABULARY - 3) + 3 for index in range(tokens)] for row in range(count)]
    mask = [index >= tokens - asked for index in range(tokens)]
    return [Group(f"r{row}", (), (Branch(ids[row], mask),)) for row in range(count)]


def saved_by_the_engine(scorer: Scorer, groups: list[Group], top_k: int | None = None) -> int:
    """Bytes of all storages but the parameters' that autograd keeps of a forward pass; with `top_k` experts of a token,
    of the routers' loss too."""
    scorer.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in scorer.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = scorer.layout(groups)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        readout = Readout(batch.source_N, lambda hidden_NH, _: (hidden_NH * hidden_NH).sum())
        result = scorer(batch, readout if top_k is None else replace(readout, of_routers=balance_in(batch, top_k)))
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("asked", "bf16", "rank"), [(63, False, None), (16, False, None), (63, True, None), (63, False, 4)]
)
def test_activations_are_what_autograd_saves(kind: str, asked: int, bf16: bool, rank: int | None) -> None:
    """All positions read, a quarter of them (the last layer runs on these alone), bfloat16, adapters."""
    loaded = tiny_model(kind, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=16, **settings(kind))
    shape = shape_of(loaded)
    scorer = Scorer(add_adapters(loaded, Config(lora_r=rank)))
    assert settle_layout(scorer) is None
    if bf16:
        for parameter in scorer.parameters():
            parameter.data = parameter.data.bfloat16()
    groups = rows(4, 64, asked)
    predicted = saved_bytes(Layers(shape, 2 if bf16 else 4, "cpu", rank), 4 * 64, 4 * asked, 64)
    assert predicted == pytest.approx(saved_by_the_engine(scorer, groups), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_the_routers_loss_keeps_all_probabilities(kind: str, checkpointing: bool) -> None:
    """Though a quarter of the positions is read, the last layer runs on all of them. So many experts that it shows."""
    many = settings(kind) | {"num_local_experts" if kind == "mixtral" else "num_experts": 32}
    loaded = tiny_model(kind, num_hidden_layers=3, **many)
    scorer = Scorer(loaded)
    assert settle_layout(scorer) is None
    if checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    plain = Layers(shape_of(loaded), checkpointing=checkpointing)
    groups = rows(4, 64, 16)
    all_read = saved_bytes(plain, 256, 256, 64) - saved_bytes(plain, 256, 64, 64)
    predicted = saved_bytes(replace(plain, balanced=True), 256, 64, 64) - saved_bytes(plain, 256, 64, 64)
    assert predicted > all_read or not checkpointing
    found = saved_by_the_engine(scorer, groups, 2) - saved_by_the_engine(scorer, groups)
    assert predicted == pytest.approx(found, rel=0.05)


def test_whose_routers_have_a_loss() -> None:
    """By the settings, or else by the model."""
    shape, quiet = (shape_of(tiny_model("mixtral", **settings("mixtral"), router_aux_loss_coef=c)) for c in (0.02, 0.0))
    assert Training.of(Config(), shape, Setup()).balanced
    assert not Training.of(Config(), quiet, Setup()).balanced
    assert not Training.of(Config(router_aux_loss_coef=0), shape, Setup()).balanced
    assert Training.of(Config(router_aux_loss_coef=0.1), quiet, Setup()).balanced
    assert not Training.of(Config(), HAND, Setup()).balanced
    unsaid = shape_of(tiny_model("qwen3_moe", **settings("qwen3_moe")))
    assert unsaid.router_aux_loss_coef == AutoConfig.for_model("qwen3_moe").router_aux_loss_coef
    assert unsaid.router_aux_loss_coef == AutoConfig.for_model("mixtral").router_aux_loss_coef


def test_gradient_checkpointing_keeps_every_layers_input() -> None:
    loaded = tiny_model("qwen3", num_hidden_layers=3)
    scorer = Scorer(loaded)
    settle_layout(scorer)
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    layers = Layers(shape_of(loaded), checkpointing=True)
    found = saved_by_the_engine(scorer, rows(4, 64, 63))
    shorter = replace(layers.shape, layers=2)
    one_layer = saved_bytes(Layers(layers.shape), 256, 252, 64) - saved_bytes(Layers(shorter), 256, 252, 64)
    its_input = 256 * 32 * 4  # is among what was found: what is computed again begins with it
    outside = 256 * 2 * 8 * 4 + 252 * 24  # rotations and ids are there, but no node of the graph holds them
    assert saved_bytes(layers, 256, 252, 64) == pytest.approx(found + one_layer - its_input + outside, rel=0.01)


def test_numbers_that_imports_would_tell() -> None:
    """The prediction imports no torch, so it repeats a few constants of what does."""
    assert memory_head._CHUNK_BYTES == head.CHUNK_BYTES
    assert memory_head._LEAST_TOKENS == head.LEAST_TOKENS
    assert memory_head._KEPT_BYTES == logprobs.KEPT_BYTES
    assert memory_head._BLOCK_BYTES == linear_group_loss.BLOCK_BYTES
    assert READS_FEW_BELOW == model._FEW


HAND = ModelShape(
    family=read_shape(json.loads(tiny_model("llama").config.to_json_string())).family,
    hidden=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    intermediate=16,
    vocabulary=100,
    context=64,
    tied=True,
)
# layer: q 8x8, k and v 8x4 each, o 8x8, three of 8x16, two norms of 8: 64 + 64 + 64 + 384 + 16 = 592
# model: embedding 800, two layers, final norm 8: 1992


def test_state_by_hand() -> None:
    assert (HAND.layer_parameters, HAND.parameters) == (592, 1992)
    plain = Training(HAND, Setup()).state()
    assert plain == {"weights": 4 * 1992, "gradients": 4 * 1992, "optimizer": 8 * 1992}
    low = Training(HAND, Setup(), bf16=True).state()
    assert low == {"weights": (2 + 4) * 1992, "gradients": 4 * 1992, "optimizer": 8 * 1992}
    # rank 2 on q, k, v, o, gate, up, down: 2 x (16 + 12 + 12 + 16 + 24 + 24 + 24) a layer
    adapters = 2 * 2 * 128
    lora = Training(HAND, Setup(), adapters=Adapters(2)).state()
    assert lora == {"weights": 4 * (1992 + adapters), "gradients": 4 * adapters, "optimizer": 8 * adapters}


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adafactor", "muon"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("qwen3_moe", False)])
def test_an_optimizers_state_is_counted_exactly(kind: str, tied: bool, optim: Any) -> None:
    """Against the real one after its first step. In 8 bits, tensors of 4096 elements at least have every block full."""
    sizes = {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128}
    experts = {"moe_intermediate_size": 64, "num_experts": 64, "num_experts_per_tok": 2} if kind == "qwen3_moe" else {}
    loaded = tiny_model(kind, tie_word_embeddings=tied, **sizes, **experts)
    trained = {name: one for name, one in loaded.named_parameters() if one.requires_grad}
    optimization = Optimization(trained, Config(optim=optim), Processes(0, 1, torch.device("cpu")))
    optimization.gradient_norm()
    optimization.step(1e-3)
    tables = ("qmap1", "qmap2")  # one for all tensors
    kept = [(key, one) for name in trained for key, one in optimization.moments(name).items() if key not in tables]
    assert Training(shape_of(loaded), Setup(), optim=optim).optimizer.state == sum(one.nbytes for _, one in kept)


def test_the_update_of_adafactor_by_hand() -> None:
    """The embedding of 2 million words: its squares, their estimate and its update, beside all gradients."""
    shape = replace(HAND, vocabulary=2_000_000)
    states = [Training(shape, Setup(), optim=name) for name in ("adamw", "adafactor")]
    before, after = (training_step(one, passes(64, row=8, rows=1), HeadUse()) for one in states)
    assert after.parts["optimizer"] - states[1].state()["optimizer"] == 3 * 4 * 8 * 2_000_000
    assert before.parts["optimizer"] == 2 * before.parts["weights"]


@pytest.mark.parametrize("sharding", [Fsdp(), Zero(2), Zero(3)])
def test_sharding_spreads_the_optimizer(sharding: Fsdp | Zero) -> None:
    whole = Training(HAND, Setup(4, Whole())).state()
    spread = Training(HAND, Setup(4, sharding)).state()
    assert spread["optimizer"] == whole["optimizer"] / 4


def test_layers_by_hand() -> None:
    """One Llama layer in float32 on a CPU, a token: two norms (input and root: 36 bytes), their outputs (32 each),
    q and out (32 each), k and v (16 each), two normalizers (8), and twice the width of the feed-forward part."""
    layers = Layers(HAND)
    assert norm_bytes(layers, 8) == 36
    token = 2 * 36 + 2 * 32 + 2 * 32 + 2 * 16 + 8 + 2 * 64
    # and once: the final norm (36) and what it gives (32), two tables of rotations (2 x 16), ids (16 and 24)
    assert saved_bytes(layers, 10, 10, 10) == 10 * (2 * token + 36 + 32 + 32 + 16 + 24)


def test_head_by_hand() -> None:
    """50 positions, vocabulary 100: one chunk of 20 kB. Losses that know their gradient at once: it, the weight's
    gradient (3.2 kB) and the hidden states' (1.6 kB). Pairs keep the probabilities, and directions in float32."""
    common: dict[str, Any] = {"device": "cpu", "compute": 4}
    alone, pairs = HeadUse(), HeadUse(together=True)
    assert held_tensors(HAND, alone, 50, frozen=False, **common) == [3_200, 20_000, 1_600]
    assert held_tensors(HAND, pairs, 50, frozen=False, **common) == [3_200, 20_000, 1_600, 1_600]
    assert held_tensors(HAND.as_classifier(), alone, 50, frozen=False, **common) == []
    # a divergence beside it has two chunks, a second gradient, and 50 states of its teacher, of 32 numbers
    beside = held_tensors(
        HAND, replace(pairs, teacher=replace(HAND, hidden=32), entropy=True), 50, frozen=False, **common
    )
    assert sorted(beside) == sorted([3_200, 20_000, 1_600, 1_600, 3_200, 20_000, 20_000, 1_600, 6_400])
    teacher = replace(HAND, vocabulary=300)  # a chunk of its own of 60 kB, and 11 tensors as large that compare the two
    found = held_tensors(HAND, HeadUse(teacher=teacher, groups=True), 50, frozen=False, **common)
    assert sorted(found) == [1_600, 1_600, 3_200, 20_000, *[60_000] * 12]


def test_what_allocators_add_goes_by_the_size_of_a_tensor() -> None:
    """Of a vocabulary of 2 million, a chunk (8 positions) and a gradient (8 floats a token) take 64 MB: they are given
    back, and 12 % is held beside them. Hidden states (1.6 kB) stay in the heap, which holds as much again."""
    shape = replace(HAND, vocabulary=2_000_000)
    found = room_for(held_tensors(shape, HeadUse(), 50, device="cpu", compute=4, frozen=False), "cpu")
    assert found == pytest.approx(1.12 * 2 * 64e6 + 2 * 1_600)
    assert slack(HEAP_BYTES - 1, "cpu") == 2 and slack(1, "cuda") == 1.05


def test_a_large_vocabulary_is_never_there_as_a_whole() -> None:
    """Twice the positions: twice their own hidden states, and no more logits."""
    shape = replace(HAND, vocabulary=200_000)
    once, twice = (
        sum(held_tensors(shape, HeadUse(), n, device="cpu", compute=4, frozen=False)) for n in (8_000, 16_000)
    )
    assert twice - once == 8_000 * 8 * 4


def test_passes_are_bounded_by_budget_rows_and_the_longest_row() -> None:
    assert passes(8192, row=1024, rows=32) == passes(8192, row=1024, rows=32, read=9999)
    full = passes(8192, row=1024, rows=32)
    assert (full.tokens, full.count) == (8192, 4)
    few = passes(8192, row=100, rows=8)
    assert (few.tokens, few.count) == (800, 1)
    long = passes(512, row=1024, rows=8)
    assert (long.tokens, long.count) == (1024, 8)
    shared = passes(8192, row=1024, rows=32, processes=8)
    assert (shared.tokens, shared.count) == (4096, 1)


def test_the_last_attention_is_the_worst_moment_where_few_positions_are_read() -> None:
    """A token: gradients of queries and output (3 x 8 floats), keys and values (6 x 4): 192 bytes. What the layer's
    second half lets go (36 + 32 + 128 bytes a token that is read) is more where all are read, less where few are."""
    layers = Layers(HAND)
    assert attention_gradient_bytes(layers, 100, 100) == 100 * (192 - 196)
    assert attention_gradient_bytes(layers, 100, 2) == 100 * 192 - 2 * 196


def test_a_step_of_several_passes_holds_the_gradients_of_those_before() -> None:
    training = Training(replace(HAND, vocabulary=10), Setup())
    one = training_step(training, passes(4096, row=512, rows=8), HeadUse())
    many = training_step(training, passes(4096, row=512, rows=80), HeadUse())
    assert "gradients" not in one.parts and many.parts["gradients"] == training.state()["gradients"]
    assert one.parts["process"] == PROCESS_BYTES["cpu"]
    # the head has none of its own then, of 10 x 8 floats, for which the heap takes twice as much
    assert many.total - one.total == many.parts["gradients"] - 2 * 10 * 8 * 4
    low = Training(replace(HAND, vocabulary=10), Setup(), bf16=True)
    one, many = (training_step(low, passes(4096, row=512, rows=rows), HeadUse()) for rows in (8, 80))
    assert many.total - one.total == many.parts["gradients"]


def test_what_is_whole_is_written_without_a_copy() -> None:
    """Of slices, weights and moments (12 bytes a parameter) are gathered, by each of four processes its share."""
    work = passes(512, row=512, rows=8)
    assert "checkpoint" not in training_step(Training(HAND, Setup()), work, HeadUse()).parts
    sliced = training_step(Training(HAND, Setup(4, Fsdp())), work, HeadUse())
    assert sliced.parts["checkpoint"] == 12 * 1992 / 4


def test_averaged_weights_by_hand() -> None:
    """The weights at the beginning and the average's way from them; of bema the corrected one's too. Processes share
    them; beside a GPU the host may have them; of adapters there is nothing else."""
    work, adapters = passes(512, row=512, rows=8), 2 * 2 * 128
    plain = training_step(Training(HAND, Setup()), work, HeadUse())
    assert "averages" not in plain.parts
    for settings, setup, more, expected in (
        ({"kind": "ema"}, Setup(), {}, 8 * 1992),
        ({"kind": "bema"}, Setup(4), {}, 12 * 1992 / 4),
        ({"kind": "bema"}, Setup(), {"lora_r": 2}, 12 * adapters),
        ({"kind": "ema"}, Setup(2, device="cuda"), {}, 8 * 1992 / 2),
        ({"kind": "bema", "device": "cpu"}, Setup(device="cuda"), {}, 0),
        ({"kind": "bema", "device": "cpu"}, Setup(), {}, 12 * 1992),
    ):
        training = Training.of(Config(weight_averaging=settings, **more), HAND, setup)
        assert training_step(training, work, HeadUse()).parts.get("averages", 0) == expected
        assert training.resident().get("averages", 0) == expected
    whole = training_step(Training.of(Config(weight_averaging={"kind": "ema"}), HAND, Setup()), work, HeadUse())
    assert whole.total == plain.total + 8 * 1992


def test_keys_and_values_of_the_sampler_by_hand() -> None:
    """16 completions of 6 tokens and 2 prompts of 9, each padded to 16, 2 layers, keys and values of 4 floats:
    18 x 16 x 2 x 2 x 4 x 4 = 18,432 bytes, and three times the logits of 16 rows."""
    asked = Sampled(completions=16, prompt=10, completion=6, per_prompt=8)
    found = sampling(HAND, Setup(), asked, number=4, resident={"weights": 1.0})
    expected = 18_432 + 16 * 100 * 4 * 3
    assert found.parts["sampler"] == pytest.approx(expected * (1 + ALLOCATOR_SHARE["cpu"]))


def test_what_a_form_needs_by_hand() -> None:
    """Of 100 tokens in each of 16 rows the logits that are left, and a flag twice."""
    asked = Sampled(completions=16, prompt=10, completion=6, per_prompt=8)
    plain, held = (sampling(HAND, Setup(), one, number=4, resident={}) for one in (asked, replace(asked, of_form=True)))
    more = held.parts["sampler"] - plain.parts["sampler"]
    assert more == pytest.approx(16 * 100 * 6 * (1 + ALLOCATOR_SHARE["cpu"]))


@pytest.mark.parametrize(("completion", "number", "copies"), [(16, 4, True), (15, 4, False), (16, 2, False)])
def test_packed_weights_of_the_sampler_by_hand(completion: int, number: int, copies: bool) -> None:
    """Of each of 2 layers q and o with 8 x 8, k and v with 8 x 4, three of 8 x 16: 576 numbers; and the head's 800."""
    asked = Sampled(completions=1, prompt=17, completion=completion)
    found = sampling(HAND, Setup(), asked, number=number, resident={})
    cache = (4 * 16 + 16) * 2 * 2 * 4 * number
    expected = cache + 4 * 100 * 4 * 3 + 4 * copies * (2 * 576 + 800)
    assert found.parts["sampler"] == pytest.approx(expected * (1 + ALLOCATOR_SHARE["cpu"]))


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(UnknownShapeError, match=r"'qwen4' is not among those whose memory is known; did you mean"):
        read_shape({"model_type": "qwen4"})
    with pytest.raises(UnknownShapeError, match="has no 'hidden_size'"):
        read_shape({"model_type": "llama", "num_attention_heads": 4})
