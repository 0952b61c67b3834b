"""The column `chat_template_kwargs`: what a row gives the chat template besides messages and tools."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from artifacts.errors import DataError
from stages.data import RowLedger, read_dataset, tokenize_pairs, tokenize_prompts, tokenize_sequences
from stages.data.dataset import DATA_FILE
from stages.data.privileged import tokenize_privileged
from stages.data.template_arguments import OWN_ARGUMENTS
from stages.data.unpaired import tokenize_unpaired
from tests.data.characters import build_tokenizer, dataset, ids, turns
from tests.data.test_malformed import GOOD, kind_of
from tests.stages.normalized import Normalized, write_jsonl
from tests.stages.small_models import output, record_samples, rows_of, run_stage, save_dataset, save_model

# as Qwen 3 has it: the last turn has a thought, here the empty one ==, and who asks for no thought is given it already
THINKING = (
    "{% if style %}={{ style }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}>{% if loop.last %}=={% endif %}{{ m.content }}<eos>"
    "{% elif m.role == 'user' %}<{{ m.content }}{% else %}={{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% if enable_thinking is defined and enable_thinking is false %}=={% endif %}"
    "{% endif %}"
)
MARKED = THINKING.replace(
    "{% if loop.last %}=={% endif %}{{ m.content }}<eos>",
    "{% set thinking = enable_thinking is not defined or enable_thinking %}"
    "{% if loop.last and not thinking %}=={% endif %}"
    "{% generation %}{% if loop.last and thinking %}=={% endif %}{{ m.content }}<eos>{% endgeneration %}",
)
TALK = turns("=h", "ab", "c", "d", "ef")
ARGUMENTS = "chat_template_kwargs"


def row(arguments: Any, **columns: Any) -> dict[str, Any]:
    return {**columns, ARGUMENTS: arguments}


def marked(text: str) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each is between « and »."""
    mask, trained = [], False
    for character in text:
        if character in "«»":
            trained = character == "«"
        else:
            mask.append(trained)
    return ids(text.replace("«", "").replace("»", "")), mask


NONE, WITH, WITHOUT = None, {"enable_thinking": True}, {"enable_thinking": False}


@pytest.mark.parametrize("arguments", [NONE, WITH, WITHOUT, {"style": "gg", "enable_thinking": False}])
def test_token_ids_are_those_of_the_tokenizer(arguments: dict[str, Any] | None) -> None:
    tokenizer = build_tokenizer(template=THINKING)

    def expected(messages: list[dict[str, str]], *, generation_prompt: bool = False) -> list[int]:
        settings = {"add_generation_prompt": generation_prompt, "return_dict": False, **(arguments or {})}
        return list(tokenizer.apply_chat_template(messages, **settings))

    chat = dataset("language_modeling", [row(arguments, messages=TALK)], True)
    (sequence,) = tokenize_sequences(chat, tokenizer, max_length=None, ledger=RowLedger())
    assert sequence.token_ids == expected(TALK)
    asked = dataset("prompt", [row(arguments, prompt=TALK[:4])], True)
    for data in (chat, asked):
        (prompt,) = tokenize_prompts(data, tokenizer, max_length=None, ledger=RowLedger())
        assert prompt.prompt_ids == expected(TALK[:4], generation_prompt=True)


@pytest.mark.parametrize("template", [THINKING, MARKED])
@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (NONE, "=h<ab>«c$»<d>«==ef$»"),
        (WITH, "=h<ab>«c$»<d>«==ef$»"),
        (WITHOUT, "=h<ab>«c$»<d>==«ef$»"),
        ({"style": "g", **WITHOUT}, "=g=h<ab>«c$»<d>==«ef$»"),
    ],
)
def test_masks_follow_what_the_model_was_given(template: str, arguments: Any, seen: str) -> None:
    data = dataset("language_modeling", [row(arguments, messages=TALK)], True)
    tokenizer = build_tokenizer(template=template)
    (sequence,) = tokenize_sequences(data, tokenizer, max_length=None, ledger=RowLedger(), assistant_only_loss=True)
    assert (sequence.token_ids, sequence.loss_mask) == marked(seen)


def test_rows_of_every_type_by_hand() -> None:
    """Side by side, the rows with and without thoughts; what they are asked to think belongs to the completion."""
    tokenizer = build_tokenizer(template=THINKING)
    both = [WITHOUT, WITH]
    prompt, end = TALK[:4], TALK[4:]
    limits: dict[str, Any] = {"max_length": None}

    def rows(kind: str, **columns: Any) -> Any:
        return dataset(kind, [row(one, prompt=prompt, **columns) for one in both], True)

    sequences = tokenize_sequences(rows("prompt_completion", completion=end), tokenizer, ledger=RowLedger(), **limits)
    assert [(one.token_ids, one.loss_mask) for one in sequences] == [
        marked("=h<ab>c$<d>==«ef$»"), marked("=h<ab>c$<d>«==ef$»")]  # fmt: skip
    other = turns("x", "g")[1:]
    pairs = tokenize_pairs(rows("preference", chosen=end, rejected=other), tokenizer, ledger=RowLedger(), **limits)
    assert [(one.prompt_ids, one.chosen_ids, one.rejected_ids) for one in pairs] == [
        (ids("=h<ab>c$<d>=="), ids("ef$"), ids("g$")),
        (ids("=h<ab>c$<d>"), ids("==ef$"), ids("==g$")),
    ]
    triples = rows("triple_preference", chosen=end, rejected=other, reference=turns("x", "a")[1:])
    found = tokenize_pairs(triples, tokenizer, ledger=RowLedger(), **limits)
    assert [one.gold_ids for one in found] == [ids("a$"), ids("==a$")]
    judged = rows("unpaired_preference", completion=end, label=True)
    unpaired = tokenize_unpaired(judged, tokenizer, ledger=RowLedger(), **limits)
    assert [one.completion_ids for one in unpaired] == [ids("ef$"), ids("==ef$")]
    known = rows("privileged_context", privileged_context=turns("g"))
    template = "{prompt} {privileged_context}"
    taught = tokenize_privileged(known, tokenizer, template=template, max_length=40, ledger=RowLedger())
    assert [(one.prompt_ids, one.teacher_ids) for one in taught] == [
        (ids("=h<ab>c$<d>=="), ids("=h<ab>c$<d g>==")),
        (ids("=h<ab>c$<d>"), ids("=h<ab>c$<d g>")),
    ]


def test_sample_answers_what_the_row_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its output has the column, so that what is trained on it sees the same."""
    save_model(tmp_path / "model", seed=1)
    build_tokenizer(template=THINKING).save_pretrained(tmp_path / "model")
    rows = [row(WITHOUT, prompt=turns("ab")), row(WITH, prompt=turns("c")), row(NONE, prompt=turns("d"))]
    data = save_dataset(tmp_path / "data", "prompt", rows, conversational=True)
    sampled = record_samples(monkeypatch)
    settings = {"outputs": ["completions"], "num_generations": 1, "max_completion_length": 2}
    context = run_stage("sample", tmp_path / "run", {"model": tmp_path / "model", "dataset": data}, **settings)
    assert sorted(prompt for prompt, _ in sampled) == sorted([ids("<ab>=="), ids("<c>"), ids("<d>")])
    made = {one["prompt"][0]["content"]: one[ARGUMENTS] for one in rows_of(output(context, "completions"))}
    assert made == {"ab": WITHOUT, "c": WITH, "d": None}


def normalized(folder: Path, *rows: dict[str, Any], **config: Any) -> Normalized:
    return Normalized(folder, write_jsonl(folder / "in" / "rows.jsonl", list(rows)), **config)


def test_a_dataset_gives_back_what_went_in(tmp_path: Path) -> None:
    """Other arguments in every row, in their order; JSON text or objects; nothing given is null."""
    given = {"z": [1, None], "a": {"c": "ü", "b": 2.5}}
    values = [WITHOUT, json.dumps(given), given, {"level": "low"}, {}, "", None]
    made = normalized(tmp_path, *(row(value, messages=TALK) for value in values), deduplicate=False)
    expected = [WITHOUT, given, given, {"level": "low"}, None, None, None]
    assert made.rows() == [row(value, messages=TALK) for value in expected]
    assert json.dumps(made.rows()[1][ARGUMENTS]) == json.dumps(given)
    schema = pyarrow.parquet.read_schema(made.out / "train" / DATA_FILE)
    assert schema.field(ARGUMENTS).type == pyarrow.string()


def test_in_tables_no_row_gets_the_arguments_of_others(tmp_path: Path) -> None:
    rows = [row(WITHOUT, messages=TALK), row({"level": "low"}, messages=TALK), row(None, messages=TALK)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert Normalized(tmp_path, path).rows() == rows


def test_a_mixture_keeps_them(tmp_path: Path) -> None:
    one, two = normalized(tmp_path / "a", row(WITHOUT, messages=TALK)), normalized(tmp_path / "b", {"messages": TALK})
    ids_of = [made.dataset()[0]["row_id"] for made in (one, two)]
    assert ids_of[0] != ids_of[1]
    folders = [made.out / "train" for made in (one, two)]
    inputs: dict[str, Any] = {"datasets": folders}
    context = run_stage("mixture", tmp_path, inputs, weights=[1.0, 1.0], rows="all_exhausted")
    made = {one["row_id"]: one[ARGUMENTS] for one in read_dataset(output(context, "dataset"))}
    assert made == dict(zip(ids_of, [WITHOUT, None], strict=True))


CHATS = [name for name in GOOD if name.endswith("chat")]
OTHERS = [name for name in GOOD if name not in CHATS]
OWN = "rows may not set the chat template's own arguments; found "
FAULTS = [
    ([WITHOUT], "must be an object of the chat template's arguments, or JSON text of one; found a list"),
    (True, "must be an object of the chat template's arguments, or JSON text of one; found true or false"),
    ("3", "must be an object of the chat template's arguments, or JSON text of one; found a whole number"),
    ("{enable_thinking: false}", "not JSON; found "),
    (
        {"enable thinking": True},
        "an argument's name has letters, digits and _ only, and no digit first; found 'enable thinking'",
    ),
    ({"a": 1, "": True}, "an argument's name has letters, digits and _ only"),
    ({"1st": True}, "an argument's name has letters, digits and _ only"),
    *(({**WITHOUT, name: True}, OWN + repr(name)) for name in ("messages", "tools", "tokenize")),
    ('{"add_generation_prompt": true}', OWN + "'add_generation_prompt'"),
]


@pytest.mark.parametrize("name", CHATS)
def test_row_and_field_are_named(tmp_path: Path, name: str) -> None:
    problems = []
    for number, (value, reason) in enumerate(FAULTS):
        expected = f"rows.jsonl row 2: field {ARGUMENTS!r}: {reason}"
        with pytest.raises(DataError) as raised:
            normalized(tmp_path / str(number), GOOD[name], row(value, **GOOD[name]), type=kind_of(name))
        if expected not in str(raised.value):
            problems.append(f"{value}\n  expected: {expected}\n  said: {raised.value}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_without_messages_have_no_use_for_them(tmp_path: Path, name: str) -> None:
    found = "token ids" if "pretokenized" in name else "text"
    said = f"row 2: field '{ARGUMENTS}': arguments of the chat template need conversational rows; found {found}; give"
    rows = [row(None, **GOOD[name]), row(WITHOUT, **GOOD[name])]
    with pytest.raises(DataError, match=said):
        normalized(tmp_path, *rows, type=kind_of(name))
    kept = normalized(tmp_path / "kept", *rows, type=kind_of(name), keep_columns=[], deduplicate=False)
    assert [ARGUMENTS in one for one in kept.rows()] == [False, False]


def test_what_rendering_is_given_anyway_is_no_rows_to_set() -> None:
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(inspect.signature(function).parameters) <= OWN_ARGUMENTS
    assert set(build_tokenizer().special_tokens_map) <= OWN_ARGUMENTS


def test_an_argument_that_the_template_does_not_read_is_refused() -> None:
    data = dataset("prompt", [row(WITH, prompt=TALK[:4]), row({"enable_thinkin": True}, prompt=TALK[:4])], True)
    said = rf"row r1: field '{ARGUMENTS}.enable_thinkin': the chat template does not read 'enable_thinkin'"
    with pytest.raises(DataError, match=said):
        tokenize_prompts(data, build_tokenizer(template=THINKING), max_length=None, ledger=RowLedger())


def test_a_value_that_the_template_cannot_take_is_named() -> None:
    template = THINKING + "{{ 'a' * repeat }}"
    data = dataset("prompt", [row({"repeat": "b"}, prompt=TALK[:4])], True)
    with pytest.raises(DataError, match="row r0: the chat template refuses this conversation: can't multiply"):
        tokenize_prompts(data, build_tokenizer(template=template), max_length=None, ledger=RowLedger())


def test_arguments_for_all_rows_give_way_to_a_rows_own(tmp_path: Path) -> None:
    """Of rows that say nothing, of one that says otherwise, of one with another argument, and of one with JSON text."""
    given = [NONE, WITH, {"style": "g"}, json.dumps({"style": "h"})]
    rows = [row(one, prompt=[*TALK[:3], *turns(name)[:1]]) for one, name in zip(given, "abcd", strict=True)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = Normalized(tmp_path / "out", source={"path": str(source)}, chat_template_kwargs=WITHOUT)
    found = [one[ARGUMENTS] for one in made.rows()]
    assert found == [WITHOUT, WITH, {**WITHOUT, "style": "g"}, {**WITHOUT, "style": "h"}]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "ab"}], WITHOUT, "chat_template_kwargs need conversational rows"),
        (
            [{"prompt": TALK[:4]}],
            {"tokenize": False},
            "rows may not set the chat template's own arguments; found 'tokenize'",
        ),
    ],
)
def test_arguments_for_all_rows_that_cannot_be(
    tmp_path: Path, rows: list[dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        Normalized(tmp_path / "out", source={"path": str(source)}, chat_template_kwargs=arguments)
