"""What a stage prints in pieces: no secret gets out between two flushes, and nothing else is lost."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from artifacts import scrub
from stages.scrubbing import ScrubbedStream

SECRET = "sk-abcabc-4242-abcabc"
LONG = SECRET + "-and-more"
LINES = "first line\nsecond line of a key\nthird"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JUDGE_API_KEY": SECRET, "OTHER_TOKEN": LONG, "PEM_SECRET": LINES}.items():
        monkeypatch.setenv(name, value)


def printed(*pieces: str, flushed: bool = True) -> str:
    """What has come out of a stream in the end."""
    out = io.StringIO()
    stream = ScrubbedStream(out)
    for piece in pieces:
        stream.write(piece)
        if flushed:
            stream.flush()
    stream.finish()
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"key {SECRET} refused\n", "key *** refused\n"),
        (f"{SECRET}{SECRET}", "******"),
        (f"{LONG} or {SECRET}", "*** or ***"),
        (f"{LINES}\n", "***\n"),
    ],
)
def test_it_is_masked_wherever_it_is_cut(text: str, said: str) -> None:
    for cut in range(len(text) + 1):
        assert printed(text[:cut], text[cut:]) == said, cut
    assert printed(*text) == said
    assert printed(*text, flushed=False) == said


@pytest.mark.parametrize(
    ("begin", "rest", "said"),
    [
        ("at https://", "me:password@host/x", "at https://***@host/x"),
        ("Authorization: Bearer", " abcdefgh, refused", "Authorization: Bearer ***, refused"),
        ("get x?X-Amz-Signature=", "abcdef&a=1", "get x?X-Amz-Signature=***&a=1"),
    ],
)
def test_so_is_what_is_passed_as_a_secret(begin: str, rest: str, said: str) -> None:
    for cut in range(len(rest) + 1):
        assert printed(begin + rest[:cut], rest[cut:]) == said, cut


def test_what_is_no_secret_comes_out_when_flushed() -> None:
    out = io.StringIO()
    stream = ScrubbedStream(out)
    stream.write("done: 5 of sk")
    assert out.getvalue() == ""
    stream.flush()
    assert out.getvalue() == "done: 5 of "  # sk may go on as the key does
    stream.write("y\nnext ")
    assert out.getvalue() == "done: 5 of sky\n"
    stream.write("one")
    stream.flush()
    assert out.getvalue() == "done: 5 of sky\nnext one"


def test_the_beginning_of_a_secret_at_the_very_end() -> None:
    assert printed(SECRET[:-1]) == "***"
    assert printed("to sk-ab") == "to sk-ab"
    assert printed("see http://host:8000") == "see http://host:8000"


def test_people_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {
        "GIT_AUTHOR_NAME": "Jane Example Doe",
        "CO_AUTHORS": "Jane Doe, John Doe",
        "CA_AUTHORITY": "Example Ltd, Rome",
    }
    hidden = {
        "HTTP_AUTHORIZATION": "Digest 0123456789",
        "PREFECT_SERVER_API_AUTH_STRING": "me:password!!",
        "AUTHOR_TOKEN": "t-0123456789",
    }
    for name, value in {**shown, **hidden}.items():
        monkeypatch.setenv(name, value)
    assert [scrub(value) for value in shown.values()] == list(shown.values())
    assert [scrub(value) for value in hidden.values()] == ["***"] * len(hidden)


def test_a_package_that_no_stage_needs_is_not_asked_for(tmp_path: Path) -> None:
    """peft imports bitsandbytes, which then wants `kernels` installed for 4 bits on a CPU."""
    from stages.__main__ import _main

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)
    assert _main(tmp_path / "absent.json") == 2
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
