"""Multimodal checkpoints trained on text alone: loaded whole by their own class, so that they are written whole again.

The language model and its head are trained; what sees or hears gets no gradient and stays as it is, bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifacts.errors import StageError
from stages.training.trunk import is_multimodal, paths_of_text, text_parameters, trunk_of

_REMEDY = "take a checkpoint of a language model of text alone"


class LanguageModels:
    """Loads a folder by the class of its language model, as an Auto class of transformers would."""

    @staticmethod
    def from_pretrained(folder: Path, **settings: Any) -> Any:
        """What the class's own gives. Raises StageError where there is no class for text."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return _library_of(config).from_pretrained(folder, **settings)


class Classifiers:
    """The same for models with a small head in place of the vocabulary, by one Auto class."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def from_pretrained(self, folder: Path, **settings: Any) -> Any:
        """What the class's own gives. Raises StageError where transformers has no such class."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) not in self._library._model_mapping:
            raise StageError(
                f"model folder {folder.name}: {_named(config)} has no class of {self._library.__name__} in "
                f"transformers, which has the head that is trained here; {_REMEDY}"
            )
        return self._library.from_pretrained(folder, **settings)


def template_of_processor(folder: Path) -> str | None:
    """The chat template of a multimodal checkpoint whose tokenizer has none; None: there is no such file."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StageError(
            f"model folder {folder.name}: chat_template.json is no object with a text chat_template: {error!r}; mend "
            "it, or put the template into chat_template.jinja"
        ) from error


def _library_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    nested = is_multimodal(config)
    if nested and config.is_encoder_decoder:
        raise StageError(f"{_named(config)} is an encoder and a decoder, which is not supported; {_REMEDY}")
    # the causal class of a multimodal configuration would leave its other weights out
    libraries = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    for library in reversed(libraries) if nested else libraries:
        if type(config) in library._model_mapping:
            return library
    raise StageError(f"{_named(config)} is no language model that transformers has a class for; {_REMEDY}")


def _named(config: Any) -> str:
    classes = ", ".join(config.architectures or ())
    return f"architecture {config.model_type!r}" + (f" ({classes})" if classes else "")


def freeze_beside_text(model: Any) -> None:
    """Let nothing of a multimodal model be trained but its language model and head; others stay as they are.

    Raises StageError where they cannot be told.
    """
    if not is_multimodal(model.config):
        return
    if getattr(model.config.get_text_config(), "cross_attention_layers", None):
        raise StageError(
            f"{type(model).__name__} has layers inside its language model that text leaves out (cross-attention to "
            f"images), so it cannot be trained on text alone; {_REMEDY}"
        )
    trunk, embedding = trunk_of(model), model.get_input_embeddings()
    if not any(module is embedding for module in trunk.modules()) or len(paths_of_text(model)) < 2:
        raise StageError(
            f"{type(model).__name__} is multimodal, and does not say which of its parts are its language model and "
            f"head, so it cannot be trained on text alone; {_REMEDY}"
        )
    of_text = {id(parameter) for parameter in text_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in of_text:
            parameter.requires_grad_(False)
