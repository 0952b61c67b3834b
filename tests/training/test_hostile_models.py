"""Model folders made to do harm: refused with the file named, before a loader sees them, and nothing of theirs runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.errors import DataError, PosttrainError, StageError
from stages.data.chat import Encoder
from stages.training.model import load_causal_lm, load_tokenizer
from tests.data.characters import build_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], None]


class Payload:
    """Whoever unpickles it makes a folder `ran` in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def _change(name: str, **values: Any) -> Damage:
    """A JSON file of the folder with other values."""

    def change(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | values))

    return change


def _write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The weights' file under a changed header; the bytes behind it stay."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def _raw_header(text: bytes, length: int | None = None) -> Damage:
    return _write(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text)


def _index(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return min((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def a_linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def a_linked_config(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


DEEP = b"[" * 200_000
WITH_CODE = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Config"}}
FOLDERS: dict[str, tuple[Damage, str]] = {
    "pickles instead of weights": (only_pickles, r"no weights .*found: .*pytorch_model\.bin"),
    "a pickle named safetensors": (_write(WEIGHTS, pickle.dumps(Payload())), r"is no safetensors file"),
    "a pipe": (a_pipe, r"pipe is no regular file"),
    "a linked folder": (a_linked_folder, r"more is a link"),
    "a linked configuration": (a_linked_config, r"config\.json is a link"),
    "code for the configuration": (_change("config.json", **WITH_CODE), r"config\.json asks to run code of its own"),
    "code for the tokenizer": (_change("tokenizer_config.json", **WITH_CODE), r"tokenizer_config\.json asks to run"),
    "code for generation": (_change("generation_config.json", **WITH_CODE), r"generation_config\.json asks to run"),
    "an index that leads outside": (_index({"a": "../outside.safetensors"}), r"names '\.\./outside\.safetensors'"),
    "an index that leads to the root": (_index({"a": "/etc/passwd"}), r"names '/etc/passwd', which is no file"),
    "an index that names no file": (_index({"a": "absent.safetensors"}), r"names 'absent\.safetensors'"),
    "an index that is a list": (_index(["model.safetensors"]), r"has no weight_map"),
    "an index of nothing": (_index({}), r"has no weight_map"),
    "an index that is no JSON": (_write(INDEX, b"{"), r"model\.safetensors\.index\.json of the model is not JSON"),
    "an index without end": (_write(INDEX, DEEP), r"index\.json of the model is not JSON"),
    "a missing weight": (_tensors(lambda tensors: tensors.pop("model.norm.weight")), r"lacks weights .*model\.norm"),
    "an extra weight": (_tensors(lambda tensors: tensors.update(more=torch.ones(2))), r"has extra weights .*more"),
    "NaN": (_tensors(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))), r"norm\.weight are not finite"),
    "infinity": (_tensors(lambda tensors: tensors["model.norm.weight"].fill_(float("inf"))), r"are not finite"),
    "another shape": (
        _tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})), r"model\.norm\.weight"),
    "a header of a terabyte": (_raw_header(b"{}", 1 << 40), r"is no safetensors file, or is cut off"),
    "a negative header": (_raw_header(b"{}", (1 << 64) - 1), r"is no safetensors file, or is cut off"),
    "a header that is no JSON": (_raw_header(b"{]"), r"safetensors header is not JSON"),
    "a header without end": (_raw_header(DEEP), r"safetensors header is not JSON"),
    "a header that is a list": (_raw_header(b"[]"), r"safetensors header is no JSON object"),
    "a tensor twice": (_raw_header(b'{"a": {}, "a": {}}'), r"a key occurs twice"),
    "a tensor that is a number": (_raw_header(b'{"a": 3}'), r"tensor 'a' is described by 3"),
    "an unknown type": (_header(lambda header: _first(header).update(dtype="F128")), r"no dtype, shape and offsets"),
    "a negative offset": (_header(lambda header: _first(header).update(data_offsets=[-8, 8])), r"no dtype, shape and"),
    "a shape beyond its bytes": (_header(lambda header: _first(header).update(shape=[1 << 40])), r"of shape .* bytes"),
    "overlapping tensors": (
        _header(lambda header: {**header, "more": _first(header)}), r"its tensors overlap or leave a gap at byte"),
    "bytes behind the tensors": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x") and None,
        r"bytes of weights where its header says"),
    "a configuration that is a list": (_write("config.json", b"[]"), r"config\.json of the model is no JSON object"),
    "a configuration without end": (_write("config.json", DEEP), r"config\.json of the model is not JSON"),
    "an architecture that is none": (_change("config.json", model_type="nothing"), r"cannot be loaded: ValueError"),
    "layers that are text": (_change("config.json", num_hidden_layers="many"), r"cannot be loaded"),
    "heads that do not divide": (_change("config.json", num_attention_heads=0), r"cannot be loaded"),
}  # fmt: skip


@pytest.fixture
def hostile(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder to be damaged, with a module beside its files that must never be imported."""
    build_tokenizer().save_pretrained(model_folder)
    (model_folder / "evil.py").write_text("import os\nos.mkdir('ran')\nclass Tokenizer: ...\nclass Config: ...\n")
    monkeypatch.chdir(tmp_path)
    return model_folder


def assert_nothing_ran(tmp_path: Path) -> None:
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder(hostile: Path, tmp_path: Path, name: str) -> None:
    damage, message = FOLDERS[name]
    damage(hostile)
    with pytest.raises(StageError, match=message):
        load_causal_lm(hostile)
    assert_nothing_ran(tmp_path)


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "no JSON": (_write("tokenizer.json", b"{]"), r"has no usable tokenizer"),
    "another JSON": (_write("tokenizer.json", b'{"model": 3}'), r"has no usable tokenizer"),
    "without end": (_write("tokenizer.json", DEEP), r"has no usable tokenizer"),
    "a class that is none": (_change("tokenizer_config.json", tokenizer_class=3), r"has no usable tokenizer"),
    "code of its own": (_change("tokenizer_config.json", **WITH_CODE), r"asks to run code of its own"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer(hostile: Path, tmp_path: Path, name: str) -> None:
    damage, message = TOKENIZERS[name]
    damage(hostile)
    with pytest.raises(StageError, match=message):
        load_tokenizer(hostile)
    assert_nothing_ran(tmp_path)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
TEMPLATES = {
    "a gigabyte at once": ("{{ 'x' * 1073741824 }}", r"it takes more than 512 MiB of memory"),
    "a gigabyte piece by piece": (LOOPS.replace("BODY", "xxxxxxxx"), r"it writes more than 4,194,304 characters"),
    "days of nothing": (LOOPS.replace("BODY", ""), r"it takes more than \d+ s of processor time"),
    "a gigabyte of blanks": ("{{ 'x'.ljust(1073741824) }}", r"it takes more than 512 MiB of memory"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fills_memory_or_never_ends(hostile: Path, name: str) -> None:
    template, message = TEMPLATES[name]
    (hostile / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(hostile)
    with pytest.raises(DataError, match=rf"the chat template is refused: .*{message}"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{{ raise_exception.__globals__['os'].mkdir('ran') }}",
        "{{ 1 / 0 }}",
        "{{ range(100001) | list }}",
        "{% include 'tokenizer.json' %}",
    ],
)
def test_a_template_that_reaches_for_python(hostile: Path, tmp_path: Path, template: str) -> None:
    (hostile / "chat_template.jinja").write_text(template)
    encoder = Encoder(load_tokenizer(hostile))
    with pytest.raises(PosttrainError, match="row r1: the chat template refuses this conversation"):
        encoder.conversations([[{"role": "user", "content": "a"}]], ["r1"])
    assert_nothing_ran(tmp_path)
