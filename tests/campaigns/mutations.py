"""Spoiled recipes, rows, manifests, records, weights' headers, model folders, tokenizers and chat templates.

Whatever they hold, they are taken or refused with an error of ours: no other traceback, nothing slower than
`SLOWEST_SECONDS` of processor time, no memory blow-up (trust.md G8). A line of the campaign's seed and number brings a
case back: `python -m tests.campaigns mutations --mutations 1 --seed N`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from artifacts.errors import PosttrainError
from artifacts.index import Record
from artifacts.manifest import FileEntry, Manifest
from artifacts.sealed import SEAL, seal
from flows.recipe import Recipe
from stages.context import local_context
from stages.data.chat import Encoder
from stages.training.model import load_tokenizer
from stages.training.model_check import check_model_folder
from tests.bad_input.corpus import RECIPES
from tests.campaigns.mutators import spoil
from tests.campaigns.outcome import Outcome
from tests.data.characters import build_tokenizer

SLOWEST_SECONDS = 5.0
"""Of processor time; what the slowest sound case takes is a hundredth of it."""
MEMORY_BYTES = 1 << 30
"""What a case may ask for beyond what the process has."""


@dataclass(frozen=True)
class Subject:
    """Something that reads a text: `read(text, folder)`, the folder being empty and its own."""

    name: str
    texts: tuple[bytes, ...]
    read: Callable[[bytes, Path], Any]


class _TooSlow(BaseException):
    pass


def read_recipe(text: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(text)
    for name in ("rows.jsonl", "pairs.jsonl", "rewards.py"):
        shutil.copyfile(RECIPES / name, folder / name)
    Recipe.load(folder / "recipe.yaml")


def read_rows(name: str) -> Callable[[bytes, Path], None]:
    def read(text: bytes, folder: Path) -> None:
        (folder / name).write_bytes(text)
        context = local_context("normalize", {"source": {"path": str(folder / name)}}, folder=folder / "job")
        context.stage.run(context)

    return read


def read_manifest(text: bytes, folder: Path) -> None:
    Manifest.from_bytes(_sealed_again(text), MANIFEST.artifact, "manifest")


def read_record(text: bytes, folder: Path) -> None:
    Record.from_bytes(_sealed_again(text), "record")


def _sealed_again(text: bytes) -> bytes:
    """What someone wrote who knows how to seal, where the text still is an object; else the text."""
    try:
        value = json.loads(text)
        return seal({key: entry for key, entry in value.items() if key != SEAL})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text


def read_header(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    check_model_folder(folder)


def read_folder_file(name: str) -> Callable[[bytes, Path], None]:
    def read(text: bytes, folder: Path) -> None:
        shutil.copyfile(_model_folder() / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(text)
        check_model_folder(folder)

    return read


def read_tokenizer(text: bytes, folder: Path) -> None:
    shutil.copytree(_model_folder(), folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_bytes(text)
    load_tokenizer(folder)


def read_template(text: bytes, folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = text.decode("utf-8", "replace")
    conversation = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    with mock.patch("stages.data.chat_template.check_template"):  # a process each would take all the time
        Encoder(tokenizer).conversations([conversation], ["r1"])


MANIFEST = Manifest(
    kind="dataset",
    files=(FileEntry("rows-0.parquet", 10, "0" * 64), FileEntry("dataset.json", 2, "1" * 64)),
    producer={"stage": "normalize", "version": 3, "config": {"seed": 0}, "inputs": {}},
    metrics={"rows": 2},
    counts={"used": 2},
    versions={"torch": "2.13.0"},
)
RECORD = Record(
    stage="normalize",
    fingerprint="2" * 64,
    identity={"stage": "normalize", "version": 3, "config": {"seed": 0}, "inputs": {}},
    outputs={"train": MANIFEST.artifact},
    metrics={"rows": 2},
    counts={"used": 2},
    timings={"seconds": 1.5},
    provenance={"run": "a", "finished_at": 1.0, "versions": {"torch": "2.13.0"}},
)


@functools.cache
def _tokenizer() -> Any:
    return build_tokenizer()


@functools.cache
def _model_folder() -> Path:
    """A sound folder with a tokenizer and one tensor, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    _tokenizer().save_pretrained(folder)
    save_file({"a": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


def subjects() -> list[Subject]:
    shipped = Path(__file__).parents[2] / "flows" / "recipes"
    recipes = tuple(path.read_bytes() for path in (*sorted(shipped.glob("*.yaml")), *sorted(RECIPES.glob("*.yaml"))))
    rows = (
        b'{"prompt": "a\\u00e9", "completion": "b", "score": 1.5}\n{"prompt": "c", "completion": "d", "score": 2}\n',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[]"}\n',
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}\n',
        b'{"prompt": "a", "completions": ["b", "c"], "labels": [true, false]}\n',
        b'{"input_ids": [3, 4], "labels": [-100, 4]}\n',
    )
    header = b'{"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}'
    index = b'{"metadata": {"total_size": 64}, "weight_map": {"a": "model.safetensors"}}'
    templates = (
        b"{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<e>{% endfor %}",
        b"{% set n = namespace(x=0) %}{% for m in messages if m.role != 'system' %}{% if loop.first %}{{ bos_token }}"
        b"{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% set n.x = n.x + 1 %}{% endfor %}",
    )
    folder = _model_folder()
    return [
        Subject("recipe", recipes, read_recipe),
        Subject("JSONL rows", rows, read_rows("rows.jsonl")),
        Subject("CSV rows", (b'prompt,completion\na,b\n"c, d","e\nf"\n',), read_rows("rows.csv")),
        Subject("manifest", (MANIFEST.to_bytes(),), read_manifest),
        Subject("record", (RECORD.to_bytes(),), read_record),
        Subject("safetensors header", (header,), read_header),
        Subject("weights' index", (index,), read_folder_file("model.safetensors.index.json")),
        Subject("tokenizer", ((folder / "tokenizer.json").read_bytes(),), read_tokenizer),
        Subject("chat template", templates, read_template),
    ]


def campaign(count: int, seed: int) -> Outcome:
    """`count` mutations, dealt to the subjects in turn."""
    outcome = Outcome(seed)
    every = subjects()
    for number in range(count):
        draws = np.random.default_rng([seed, number])
        subject = every[number % len(every)]
        text = spoil(subject.texts[int(draws.integers(len(subject.texts)))], draws)
        _limit_memory()
        if (anomaly := _try(subject, text)) is not None:
            outcome.anomalies.append(f"{subject.name}, mutation {number}: {anomaly}; text {text[:200]!r}")
        outcome.counts[f"spoiled: {subject.name}"] += 1
    return outcome


def _try(subject: Subject, text: bytes) -> str | None:
    with tempfile.TemporaryDirectory() as folder, _quietly(), _bounded_time():
        try:
            subject.read(text, Path(folder))
        except PosttrainError as error:
            return None if str(error).strip() else "an error without a message"
        except _TooSlow:
            return f"more than {SLOWEST_SECONDS} s"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:300]
    return None


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SLOWEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _limit_memory() -> None:
    """For the next case, beyond what the process has by now: libraries keep what they compiled."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
