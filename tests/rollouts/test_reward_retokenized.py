"""A reward model with another tokenizer than the policy scores the text, as transformers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from artifacts.errors import DataError, StageError
from stages.data.retokenize import Retokenizer
from tests.data import characters
from tests.data.characters import IDS
from tests.stages.small_models import output, read_lines, reward_of, run_stage, save_dataset, save_model

# the same letters under other numbers, and two more tokens
OTHER = {token: index for index, token in enumerate([*reversed(list(IDS)), "x", "y"])}
TEMPLATE = "{% for m in messages %}x{{ m.content }}y{% endfor %}{% if add_generation_prompt %}x{% endif %}"


def other_tokenizer(template: str | None = TEMPLATE) -> Any:
    with mock.patch.object(characters, "IDS", OTHER):
        return characters.build_tokenizer(template=template)


def save_reward_model(folder: Path, *, context: int = 64) -> Any:
    """A reward model with a tokenizer of its own."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(OTHER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=OTHER["<bos>"],
        eos_token_id=OTHER["<eos>"],
        pad_token_id=None,
        initializer_range=0.6,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    return model


def numbers(text: str) -> list[int]:
    """Token ids by hand: $ is <eos>, everything else is itself."""
    return [OTHER["<eos>" if letter == "$" else letter] for letter in text]


def test_plain_text_ends_where_the_completion_did():
    tokenize = Retokenizer(other_tokenizer())
    row = {"row_id": "r0", "prompt": "ab"}
    assert tokenize(row, ["cd", "", "c"], [True, False, False]) == (
        numbers("a"),
        [numbers("bcd$"), numbers("b"), numbers("bc")],
    )
    assert tokenize(row, ["cd"], [True]) == (numbers("ab"), [numbers("cd$")])
    assert tokenize(row, [], []) == (numbers("ab"), [])


def test_conversations_are_rendered_by_its_template():
    tokenize = Retokenizer(other_tokenizer())
    row = {"row_id": "r0", "prompt": [{"role": "user", "content": "ab"}]}
    assert tokenize(row, ["cd", ""], [True, False]) == (numbers("xabyx"), [numbers("cdy"), numbers("y")])
    with pytest.raises(DataError, match="no chat template"):
        Retokenizer(other_tokenizer(template=None))(row, ["c"], [True])


@pytest.mark.parametrize("conversational", [False, True])
def test_the_score_is_that_of_the_text(tmp_path: Path, conversational: bool) -> None:
    save_model(tmp_path / "model", seed=1)
    judge = save_reward_model(tmp_path / "judge")
    texts = ["abc", "hg", "eeee", "d"]
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    data = save_dataset(
        tmp_path / "data", "prompt", [{"prompt": prompt} for prompt in prompts], conversational=conversational
    )
    inputs = {"model": tmp_path / "model", "dataset": data, "reward_model": tmp_path / "judge"}
    settings = {"max_completion_length": 5, "temperature": 1.0, "num_generations": 3}
    context = run_stage("evaluate", tmp_path / "run", inputs, **settings)
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    assert len(records) == 12 and len({record["completion"] for record in records}) > 6
    for record in records:
        prompt = texts[int(record["row_id"].removeprefix("r").split("/")[0])]
        end = "$" if record["finished"] else ""
        seen = f"x{prompt}yx{record['completion']}y" if conversational else prompt + record["completion"] + end
        assert record["score"] == pytest.approx(reward_of(judge, numbers(seen)), abs=1e-5), record


def test_a_text_too_long_for_the_reward_model_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1)
    save_reward_model(tmp_path / "judge", context=6)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": "ab"}, {"prompt": "abcdefgh"}])
    inputs = {"model": tmp_path / "model", "dataset": data, "reward_model": tmp_path / "judge"}
    with pytest.raises(
        StageError, match=r"row r1, completion 0: \d+ tokens for the reward model, which takes 6; lower"
    ):
        run_stage("evaluate", tmp_path / "run", inputs, max_completion_length=2)
