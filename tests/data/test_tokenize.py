"""Token lists and masks written by hand. Notation of masks: `.` not trained, `x` trained."""

import pytest

from artifacts.errors import DataError
from stages.data import RowLedger, tokenize_prompts, tokenize_sequences
from tests.data.characters import answers, build_tokenizer, dataset, ids, turns


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def mask(signs):
    return [sign == "x" for sign in signs]


def sequences(data, tokenizer, max_length=None, **settings):
    ledger = RowLedger()
    found = tokenize_sequences(data, tokenizer, max_length=max_length, ledger=ledger, **settings)
    ledger.check(len(data))
    return found, ledger


def test_text_gets_one_end_token_and_trains_all_but_the_first(tokenizer):
    (one,), ledger = sequences(dataset("language_modeling", [{"text": "abc"}]), tokenizer)
    assert (one.row_id, one.token_ids, one.loss_mask) == ("r0", ids("abc$"), mask(".xxx"))
    assert ledger.to_json()["states"] == {"used": 1}


def test_start_and_end_tokens_are_never_doubled():
    data = dataset("language_modeling", [{"text": "ab"}, {"text": "<bos>ab<eos>"}])
    found, _ = sequences(data, build_tokenizer(start_token=True))
    assert [one.token_ids for one in found] == [ids("^ab$"), ids("^ab$")]


def test_prompt_completion_trains_the_completion_and_its_end(tokenizer):
    data = dataset("prompt_completion", [{"prompt": "ab", "completion": "cd"}])
    (one,), _ = sequences(data, tokenizer)
    assert (one.token_ids, one.loss_mask) == (ids("abcd$"), mask("..xxx"))
    (whole,), _ = sequences(data, tokenizer, completion_only_loss=False)
    assert (whole.token_ids, whole.loss_mask) == (ids("abcd$"), mask(".xxxx"))


def test_conversation_trains_everything_or_the_assistant(tokenizer):
    data = dataset("language_modeling", [{"messages": turns("=h", "ab", "c", "d", "ef")}], True)
    (one,), _ = sequences(data, tokenizer)
    assert (one.token_ids, one.loss_mask) == (ids("=h<ab>c$<d>ef$"), mask(".xxxxxxxxxxxxx"))
    (one,), _ = sequences(data, tokenizer, assistant_only_loss=True)
    assert (one.token_ids, one.loss_mask) == (ids("=h<ab>c$<d>ef$"), mask("......xx...xxx"))


def test_conversational_completion_boundary_is_the_generation_prompt(tokenizer):
    data = dataset("prompt_completion", [{"prompt": turns("a", "b", "c"), "completion": answers("de")}], True)
    (one,), _ = sequences(data, tokenizer)
    assert (one.token_ids, one.loss_mask) == (ids("<a>b$<c>de$"), mask("........xxx"))
    (one,), _ = sequences(data, tokenizer, assistant_only_loss=True)
    assert one.loss_mask == mask("........xxx")
    (one,), _ = sequences(data, tokenizer, assistant_only_loss=True, completion_only_loss=False)
    assert one.loss_mask == mask("...xx...xxx")


def test_assistant_mask_equals_that_of_transformers(tokenizer):
    conversations = [turns("ab", "cd"), turns("=gh", "a", "b", "c", "d"), turns("a b", "c d e", "f", "g")]
    data = dataset("language_modeling", [{"messages": one} for one in conversations], True)
    found, _ = sequences(data, tokenizer, assistant_only_loss=True)
    for messages, one in zip(conversations, found, strict=True):
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert one.token_ids == theirs["input_ids"]
        assert one.loss_mask == [bool(value) for value in theirs["assistant_masks"]]


def test_truncation_is_counted_and_rows_without_a_trained_token_are_dropped(tokenizer):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "abcd", "completion": "e"},
        {"prompt": "a", "completion": "b"},
    ]
    found, ledger = sequences(dataset("prompt_completion", rows), tokenizer, max_length=3)
    # r0: abcd$ loses d and $; r1: only prompt tokens are left; r2: ab$ fits exactly
    assert [(one.row_id, one.token_ids, one.loss_mask) for one in found] == [
        ("r0", ids("abc"), mask("..x")),
        ("r2", ids("ab$"), mask(".xx")),
    ]
    state = ledger.to_json()
    assert state["states"] == {"masked": 1, "truncated": 1, "used": 1}
    assert state["truncated_tokens"] == 2
    assert state["examples"]["masked"] == [{"row": "r1", "detail": "of 6 tokens the first 3 are kept"}]


def test_no_row_left_is_an_error(tokenizer):
    data = dataset("prompt_completion", [{"prompt": "abcd", "completion": "e"}] * 2)
    with pytest.raises(DataError, match=r"none of the 2 rows is left after tokenization \(2 masked\); raise"):
        sequences(data, tokenizer, max_length=3)


def test_unknown_characters_are_counted(tokenizer):
    (one,), ledger = sequences(dataset("language_modeling", [{"text": "aZZ"}]), tokenizer)
    assert one.token_ids == ids("a??$")
    assert ledger.to_json()["changes"] == {"tokens unknown to the tokenizer": 2}


def test_boundary_is_the_common_token_prefix():
    # "ab" is one token here, so the prompt "a" is no token prefix of "ab": the whole of "ab" is completion
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    data = dataset("prompt_completion", [{"prompt": "ca", "completion": "bc"}])
    (one,), ledger = sequences(data, merging)
    assert (one.token_ids, one.loss_mask) == ([4, 5, 4, 1], mask(".xxx"))
    assert ledger.changes == {"prompt tokens that belong to the completion": 1}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            dataset("preference", [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            {},
            "of type preference; this stage takes language_modeling or",
        ),
        (
            dataset("language_modeling", [{"text": "a"}]),
            {"assistant_only_loss": True},
            "needs a conversational dataset",
        ),
        (dataset("language_modeling", [{"text": "a"}]), {"completion_only_loss": True}, "has no prompt"),
    ],
)
def test_settings_that_do_not_fit_the_dataset(tokenizer, data, settings, message):
    with pytest.raises(DataError, match=message):
        sequences(data, tokenizer, **settings)


def test_tokenizers_that_cannot_serve():
    chat = dataset("language_modeling", [{"messages": turns("a", "b")}], True)
    with pytest.raises(DataError, match="conversational and the tokenizer has no chat template"):
        sequences(chat, build_tokenizer(template=None))
    refusing = "{{ raise_exception('system first') }}"
    with pytest.raises(DataError, match="row r0: the chat template refuses this conversation: system first"):
        sequences(chat, build_tokenizer(template=refusing))
    without_end = build_tokenizer()
    without_end.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        sequences(dataset("language_modeling", [{"text": "a"}]), without_end)


def prompts(data, tokenizer, max_length=None):
    ledger = RowLedger()
    found = tokenize_prompts(data, tokenizer, max_length=max_length, ledger=ledger)
    ledger.check(len(data))
    return found, ledger


def test_prompts_end_where_the_model_goes_on(tokenizer):
    (one,), _ = prompts(dataset("prompt", [{"prompt": turns("ab"), "answer": 7}], True), tokenizer)
    assert (one.prompt_ids, one.row["answer"]) == (ids("<ab>"), 7)
    (one,), _ = prompts(dataset("prompt_completion", [{"prompt": "ab", "completion": "c"}]), tokenizer)
    assert one.prompt_ids == ids("ab")
    (one,), _ = prompts(dataset("language_modeling", [{"messages": turns("a", "b", "c", "d")}], True), tokenizer)
    assert (one.prompt_ids, one.row["prompt"]) == (ids("<a>b$<c>"), turns("a", "b", "c"))


def test_prompts_are_dropped_not_cut(tokenizer):
    found, ledger = prompts(dataset("prompt", [{"prompt": "abc"}, {"prompt": "ab"}, {"prompt": ""}]), tokenizer, 2)
    assert [one.row_id for one in found] == ["r1"]
    assert ledger.to_json()["states"] == {
        "filtered: empty prompt": 1,
        "filtered: prompt too long": 1,
        "used": 1,
    }
    with pytest.raises(DataError, match="plain text has no prompts"):
        prompts(dataset("language_modeling", [{"text": "a"}]), tokenizer)
