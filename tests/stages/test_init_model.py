"""Models from nothing: the tokenizer's lists by hand, weights and files bit for bit, loading with nothing of ours."""

import hashlib
from collections import Counter

import numpy
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.errors import DataError
from stages.context import local_context
from stages.data import RowLedger, write_dataset
from stages.data.chat import Encoder
from stages.init_model import InitModelConfig
from stages.seeds import generator
from tests.stages.normalized import assistant, system, user

TALKS = [
    [user("12+30="), assistant("42")],
    [system("Add."), user("1+1="), assistant("2"), user("é\n?"), assistant("ja")],
]
TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"row_id": f"r{i}", "messages": messages} for i, messages in enumerate(TALKS)]
    ledger = RowLedger()
    ledger.use(2)
    write_dataset(folder, rows, type="language_modeling", conversational=True, ledger=ledger, source={})
    return folder


def made(folder, chats, **config):
    context = local_context("init_model", {**TINY, **config}, folder=folder, inputs={"dataset": [chats]})
    context.stage.run(context)
    return folder / "job" / "out" / "model", context


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


CONFIGS = [{"tokenizer": "characters"}, {"architecture": "qwen3", "vocab_size": 300, "num_key_value_heads": 1}]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_bytes_again_and_other_weights_with_another_seed(tmp_path, chats, config):
    first, _ = made(tmp_path / "1", chats, **config)
    again, _ = made(tmp_path / "2", chats, **config)
    other, _ = made(tmp_path / "3", chats, **config, seed=1)
    assert digests(first) == digests(again)
    differing = {name for name, digest in digests(first).items() if digests(other)[name] != digest}
    assert differing == {"model.safetensors"}


@pytest.mark.parametrize("config", CONFIGS)
def test_loads_with_transformers_alone(tmp_path, chats, config):
    folder, context = made(tmp_path, chats, **config)
    assert "auto_map" not in (folder / "config.json").read_text()  # no code of ours is asked for
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model.config.model_type]
    ids = tokenizer.apply_chat_template([user("1+1=")], add_generation_prompt=True, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(generated).startswith("<|user|>1+1=<|assistant|>")
    assert len(generated) == ids["input_ids"].shape[1] + 2 or generated[-1] == tokenizer.eos_token_id
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert context.metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_weights_follow_from_name_and_seed(tmp_path, chats):
    folder, _ = made(tmp_path, chats, tokenizer="characters", seed=5, tie_word_embeddings=False, initializer_range=0.5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            drawn = generator(5, "init_model", name).standard_normal(tuple(parameter.shape), dtype=numpy.float32)
            assert torch.equal(parameter, torch.from_numpy(drawn * numpy.float32(0.5))), name
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_rotary_positions_turn_by_their_base(tmp_path, chats):
    """theta^(-2i/d) a token (arXiv:2104.09864, section 3.2.2)."""
    folder, _ = made(tmp_path, chats, tokenizer="characters", rope_theta=16.0, head_dim=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_one_token_a_character(tmp_path, chats):
    folder, context = made(tmp_path, chats, tokenizer="characters")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    characters = sorted(set("12+30=42Add.1+1=2é\n?ja"))
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == special + characters
    assert tokenizer.tokenize("1 2\né") == ["1", "<|unknown|>", "2", "\n", "é"]
    assert tokenizer.decode(tokenizer("12+30=é\n?")["input_ids"]) == "12+30=é\n?"
    assert context.counts == {"unknown_characters": 0}


def test_a_small_vocabulary_keeps_the_frequent_characters_and_counts_the_rest(tmp_path, chats):
    folder, context = made(tmp_path, chats, tokenizer="characters", vocab_size=10)
    counts = Counter("".join(message["content"] for talk in TALKS for message in talk))
    # four of 17 find room: 1 (x3), = (x2, lower than 2, d and 4), + (x2), and 2 (x3)
    assert [AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(i) for i in range(6, 10)] == [
        "+",
        "1",
        "2",
        "=",
    ]
    assert context.counts == {"unknown_characters": counts.total() - sum(counts[kept] for kept in "12=+")}


def test_bytes_know_every_text_and_spell_digits(tmp_path, chats):
    folder, context = made(tmp_path, chats, vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Straße 1234 \t日本 😀\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    assert context.metrics["vocab_size"] == len(tokenizer) <= 300


def test_chat_template_marks_the_assistant_and_only_ever_appends(tmp_path, chats):
    folder, _ = made(tmp_path, chats, tokenizer="characters")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    talk = TALKS[1]
    ((token_ids, mask),) = encoder.assistant_masks([talk], ["r"])
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    expected = ["<|system|>", *"Add.", "<|user|>", *"1+1=", "<|assistant|>", "2", "<|end|>"]
    expected += ["<|user|>", *"é\n?", "<|assistant|>", *"ja", "<|end|>"]
    assert tokens == expected
    trained = [index for index, one in enumerate(mask) if one]
    assert [tokens[index] for index in trained] == ["2", "<|end|>", "j", "a", "<|end|>"]
    for count in range(1, len(talk) + 1):
        (part,) = encoder.conversations([talk[:count]], ["r"])
        assert token_ids[: len(part)] == part
        if count < len(talk) and talk[count]["role"] == "assistant":
            (asked,) = encoder.conversations([talk[:count]], ["r"], generation_prompt=True)
            assert token_ids[: len(asked)] == asked and tokens[len(asked) - 1] == "<|assistant|>"
    with pytest.raises(DataError, match="refuses this conversation: unknown role tool"):
        encoder.conversations([[{"role": "tool", "content": "x"}]], ["r"])


def test_datasets_without_text(tmp_path):
    ledger = RowLedger()
    ledger.use(1)
    folder = tmp_path / "empty"
    folder.mkdir()
    rows = [{"row_id": "r", "text": ""}]
    write_dataset(folder, rows, type="language_modeling", conversational=False, ledger=ledger, source={})
    with pytest.raises(DataError, match="hold no text"):
        made(tmp_path, folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "3 wide; rotary positions need an even number"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"vocab_size": 260}, "byte_bpe needs 256 bytes and 5 special tokens, 261"),
        ({"architecture": "gpt2"}, "'llama' or 'qwen3'"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValidationError, match=message):
        InitModelConfig.model_validate(config)


def test_golden(tmp_path, chats):
    """Fails when the same settings would give another model: raise the stage's version, then these values.

    Weights and token ids rather than files, which hold the versions of the libraries that wrote them.
    """
    folder, _ = made(tmp_path, chats, vocab_size=270, seed=7)
    digest = hashlib.sha256()
    for name, parameter in sorted(AutoModelForCausalLM.from_pretrained(folder).named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALKS[0], return_dict=False)
    assert digest.hexdigest() == "703849ca9fbd66d71523f92393b30ea5ed95d5193dc3b88039d22df239afd210"
    # <|user|> 3, <|assistant|> 4, <|end|> 1; a printable ASCII byte is its code - 33 + 5: "1" is 21, "+" 15, "=" 33
    assert ids == [3, 21, 22, 15, 23, 20, 33, 4, 24, 22, 1]
