"""Where completions end: each is the beginning of the one that the same seed gives without that end."""

import pytest

from artifacts.errors import StageError
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.rollouts.stopping import completes, text_before
from tests.rollouts.sampling import flat, requests, sampler


def text(token_ids):
    """A letter a token, but token 0 says nothing and token 1 says two."""
    return "".join({0: "", 1: "ab"}.get(token, chr(97 + token % 26)) for token in token_ids)


def free_and(tiny_model, ends=(), limits=None, **keywords):
    """(completions without any end, with these) for the same seeds."""
    model, settings = tiny_model(), SamplingConfig(max_completion_length=25)
    with sampler(model, eos_token_ids=()) as ours:
        free = flat(ours.sample(requests(6), settings))
    with sampler(model, eos_token_ids=ends, decode=text) as ours:
        found = flat(ours.sample(requests(6, limits=limits), settings.model_copy(update=keywords)))
    return list(zip(free, found, strict=True))


def cut(completion, length, finished):
    return Completion(
        completion.token_ids[:length], completion.logprobs[:length], finished, completion.model_logprobs[:length]
    )


def test_end_tokens_of_model_and_settings(tiny_model):
    pairs = free_and(tiny_model, ends=(5, 12), stop_token_ids=(12, 20))
    for free, found in pairs:
        places = [index for index, token in enumerate(free.token_ids) if token in (5, 12, 20)]
        assert found == (cut(free, places[0] + 1, True) if places else free)
    assert {found.token_ids[-1] for _, found in pairs if found.finished} == {5, 12, 20}


def test_stop_strings_end_with_the_token_that_completes_them(tiny_model):
    every = free_and(tiny_model)
    # texts that do occur: two letters at the tenth token of one completion, one at the third of another
    stops = (text(every[3][0].token_ids[9:11]), text(every[7][0].token_ids[2:5]))
    ended = 0
    for free, found in free_and(tiny_model, stop_strings=stops):
        lengths = [n for n in range(1, 26) if any(stop in text(free.token_ids[:n]) for stop in stops)]
        assert found == (cut(free, lengths[0], True) if lengths else free)
        ended += bool(lengths)
    assert 2 <= ended < 30


def test_stop_strings_need_text(tiny_model):
    with sampler(tiny_model()) as ours, pytest.raises(StageError, match="stop_strings need the tokenizer"):
        ours.sample(requests(), SamplingConfig(stop_strings=("a",), max_completion_length=2))


def test_limits_of_single_completions(tiny_model):
    for index, (free, found) in enumerate(free_and(tiny_model, limits=(0, 1, 7, 25, 0, 3))):
        assert found == cut(free, (0, 1, 7, 25, 0, 3)[index % 6], False)


def test_limits_that_do_not_fit_are_refused(tiny_model):
    settings = SamplingConfig(max_completion_length=4)
    with sampler(tiny_model()) as ours:
        with pytest.raises(StageError, match=r"prompt 0 \(row r\) has 1 limits for 2 seeds"):
            ours.sample([SampleRequest([1], (1, 2), "r", limits=(1,))], settings)
        with pytest.raises(StageError, match=r"has limits \[1, 5\]; they are from 0 to max_completion_length, 4"):
            ours.sample([SampleRequest([1], (1, 2), "r", limits=(1, 5))], settings)


def test_a_window_of_the_text_is_enough_and_the_whole_text_decides():
    # 40 silent tokens within the stop string: the window has to grow
    assert completes([2, *[0] * 40, 3], ["cd"], text)
    assert not completes([2, *[0] * 40, 4], ["cd"], text)
    assert completes([9] * 100 + [2, 3], ["cd"], text)
    assert not completes([9] * 100 + [3, 2], ["cd"], text)

    # the first token of a window loses its leading space in some decoders: only the whole text counts
    def stripped(token_ids):
        return text(token_ids) if len(token_ids) > 20 else "cd"

    assert not completes([9] * 30, ["cd"], stripped)


def test_text_before_the_first_stop_string():
    assert text_before("one. two; three", ("; ", ".")) == "one"
    assert text_before("one", ("x",)) == "one"
    assert text_before("one", ()) == "one"
