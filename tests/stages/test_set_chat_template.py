"""A base model that learns to chat: tokens, embeddings, the end of a turn, and what trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from artifacts.errors import StageError
from stages.data import read_dataset
from stages.set_chat_template import CHATML, STAGE, Config
from stages.training.generation import end_token_ids
from tests.data.characters import build_tokenizer
from tests.stages.small_models import output, read_json, run_stage, save_dataset
from tests.training.conftest import tiny_model

TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def save_base(folder: Path, *, spare: int = 0, tied: bool = True, template: str | None = None) -> Any:
    """A model without a chat template, whose end token ends documents; `spare` rows fill its embedding up."""
    tokenizer = build_tokenizer(template=template or "")
    tokenizer.chat_template = template
    size = len(tokenizer) + spare
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model: Any = tiny_model(vocab_size=size, tie_word_embeddings=tied, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def made(folder: Path, inputs: dict[str, Path], **settings: Any) -> tuple[Any, Any, Path]:
    """(model, tokenizer, folder)"""
    target = output(run_stage("set_chat_template", folder, inputs, **settings), "model")
    return AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target), target


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_chatml_by_hand(tmp_path: Path, tied: bool, spare: int) -> None:
    """Old rows stay to the bit; those of the two new tokens, and all that fill up, are the mean of the old ones."""
    base = save_base(tmp_path / "base", spare=spare, tied=tied)
    before = AutoTokenizer.from_pretrained(tmp_path / "base")
    model, tokenizer, _ = made(tmp_path / "run", {"model": tmp_path / "base"}, pad_to_multiple_of=8)
    known, rows = len(before), base.get_input_embeddings().weight.shape[0]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (start, end, len(tokenizer)) == (known, known + 1, known + 2)
    expected = rows if rows >= known + 2 else -(-(known + 2) // 8) * 8
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(base, name)().weight, getattr(model, name)().weight
        assert new.shape[0] == expected == model.config.vocab_size
        assert torch.equal(new[:known], old[:known])
        torch.testing.assert_close(new[known:], old[:known].mean(0).expand(expected - known, -1))
    kept = {key: one for key, one in base.state_dict().items() if "embed" not in key and "lm_head" not in key}
    assert all(torch.equal(model.state_dict()[key], one) for key, one in kept.items())
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    assert tokenizer.encode("<|im_end|>ab<|im_start|>", add_special_tokens=False)[::3] == [end, start]
    # completions end with a turn, and where documents did
    assert tokenizer.eos_token == "<|im_end|>" and model.config.eos_token_id == end
    assert set(end_token_ids(model, tokenizer)) == {end, before.eos_token_id}


def with_hole(tokenizer: Any, token: str, places: int) -> Any:
    """The tokenizer with a token's id raised."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"][token] += places
    for added in values["added_tokens"]:
        added["id"] += places * (added["content"] == token)
    backend = Tokenizer.from_str(json.dumps(values))
    named = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def test_ids_that_are_no_tokens(tmp_path: Path) -> None:
    """A letter has an id beyond the number of tokens, from which new ones are counted: its row stays. With the id that
    the second new one would get, or where a tokenizer's files give it other ids, they are refused."""
    plain = build_tokenizer(template="")
    size = len(plain)
    for token, place, problem in (
        ("a", size + 7, None),
        ("a", size + 1, f"'<.im_end.>' would have id {size + 1}, as 'a'"),
        ("<eos>", size + 7, f"gives '<.im_start.>' id {size}, where it had {size + 8} before it was written"),
    ):
        folder = tmp_path / f"{token}{place}"
        tokenizer = with_hole(plain, token, place - plain.convert_tokens_to_ids(token))
        model: Any = tiny_model(vocab_size=place + 1, eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        if problem is not None:
            with pytest.raises(StageError, match=problem):
                made(folder / "run", {"model": folder / "base"})
            continue
        spoken_model, spoken, _ = made(folder / "run", {"model": folder / "base"}, pad_to_multiple_of=1)
        assert spoken.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [size, size + 1]
        old, new = (one.get_input_embeddings().weight for one in (model, spoken_model))
        assert new.shape == old.shape and torch.equal(new[:size], old[:size]) and torch.equal(new[place], old[place])
        torch.testing.assert_close(new[size:place], old[:size].mean(0).expand(place - size, -1))


def test_as_another_model_speaks(tmp_path: Path) -> None:
    like = build_tokenizer(template="{% for m in messages %}«{{ m.content }}<eot>{% endfor %}")
    like.add_tokens(["«", "<eot>"], special_tokens=True)
    like.eos_token = "<eot>"
    save_base(tmp_path / "base")
    save_base(tmp_path / "like")
    like.save_pretrained(tmp_path / "like")
    inputs = {"model": tmp_path / "base", "like": tmp_path / "like"}
    model, tokenizer, _ = made(tmp_path / "run", inputs, added_tokens=["<more>"])
    assert tokenizer.get_chat_template() == like.get_chat_template() and tokenizer.eos_token == "<eot>"
    assert {"«", "<eot>", "<more>"} <= set(tokenizer.get_vocab())
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "«ab<eot>«cd<eot>"
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)


def test_a_template_of_a_file_keeps_the_end_token(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    model, tokenizer, folder = made(
        tmp_path / "run", {"model": tmp_path / "base"}, chat_template=str(tmp_path / "chat.jinja")
    )
    assert tokenizer.eos_token_id == base.config.eos_token_id == model.config.eos_token_id
    assert model.config.vocab_size == base.config.vocab_size
    assert read_json(folder / "config.json").get("_name_or_path") is None


def test_a_chat_is_learnt_to_its_end(tmp_path: Path) -> None:
    """The whole way: sft on conversations makes the model say the end of the turn, and sampling stops at it."""
    save_base(tmp_path / "base")
    _, _, chatty = made(tmp_path / "run", {"model": tmp_path / "base"})
    rows = save_dataset(
        tmp_path / "rows", "prompt_completion", [{"prompt": TALK[:1], "completion": TALK[1:]}] * 4, conversational=True
    )
    settings = {"train_batch_size": 4, "max_steps": 30, "learning_rate": 2e-2}
    trained = output(run_stage("sft", tmp_path / "sft", {"model": chatty, "dataset": rows}, **settings), "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    prompts = save_dataset(tmp_path / "prompts", "prompt", [{"prompt": TALK[:1]}], conversational=True)
    asked = {"temperature": 0.0, "max_completion_length": 12, "outputs": ["completions"], "num_generations": 1}
    drawn = run_stage("sample", tmp_path / "drawn", {"model": trained, "dataset": prompts}, **asked)
    (row,) = read_dataset(output(drawn, "completions"))
    assert row["completion"] == TALK[1:]


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            "{% for m in messages %}x{% endfor %}",
            {},
            "does not show 'what is asked' of an example; it makes 'xx' of it",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {"eos_token": "<eos>"}, "does not end what the assist"),
        ("{{ messages[0]", {}, "the chat template cannot be used: "),
        (CHATML, {"eos_token": "<no>"}, "eos_token '<no>' is no token of the model's tokenizer; name it in added_toke"),
    ],
)
def test_templates_that_teach_nothing_are_refused(
    tmp_path: Path, template: str, settings: dict[str, Any], message: str
) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(template)
    with pytest.raises(StageError, match=message):
        made(tmp_path / "run", {"model": tmp_path / "base"}, chat_template=str(tmp_path / "chat.jinja"), **settings)


def test_two_templates_are_refused() -> None:
    assert STAGE.check is not None
    (problem,) = STAGE.check(Config(chat_template="chat.jinja"), frozenset({"model", "like"}))
    assert problem == "chat_template is given, and input like is wired in; the template comes from one of them"
