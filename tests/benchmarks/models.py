"""Random weights saved once for a case, so that every contestant loads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import TAUGHT, Architecture, Case, teacher_of
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.rows import BOS, EOS, PAD

LONGEST_ROW = 8192
INITIAL_DEVIATION = 0.06
"""Of every matrix. The library's 0.02 gives nearly uniform distributions, on which every loss is log V."""

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
}
"""Of AdamW and the step, under the names that posttrain and transformers share."""

BETA = 0.1
"""Of DPO."""
EPSILON = 0.2
"""Of the clipped policy gradient."""


def save_models(case: Case, folder: CaseFolder) -> None:
    """The models that the case needs, each with a tokenizer of as many words as the vocabulary has tokens."""
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification

    torch.manual_seed(case.seed)
    kind: Any = Qwen3ForSequenceClassification if case.stage == "reward" else Qwen3ForCausalLM
    _save(kind, case.architecture, folder.model, case)
    if case.stage in TAUGHT:
        _save(Qwen3ForCausalLM, teacher_of(case.architecture), folder.teacher, case)


def qwen3_config(architecture: Architecture, vocabulary: int) -> Any:
    """The transformers configuration of an architecture; as a classifier, with one output."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=LONGEST_ROW,
        initializer_range=INITIAL_DEVIATION,
        tie_word_embeddings=architecture.tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        num_labels=1,  # type: ignore[call-arg]  # passed on to the base class
    )


def _save(kind: Any, architecture: Architecture, folder: Path, case: Case) -> None:
    """Large ones are drawn where that is quick, and take half the room."""
    with torch.device("cuda" if case.bf16 and torch.cuda.is_available() else "cpu"):
        model = kind(qwen3_config(architecture, case.vocabulary))
    (model.bfloat16() if case.bf16 else model).save_pretrained(folder)
    _tokenizer(case.vocabulary).save_pretrained(folder)


def _tokenizer(vocabulary: int) -> Any:
    """A word a token; the rows are token ids already, but trainers want a tokenizer beside the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {word_of(token): token for token in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=word_of(EOS)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=word_of(PAD),
        bos_token=word_of(BOS),
        eos_token=word_of(EOS),
        unk_token=word_of(EOS),
        padding_side="right",
    )


def word_of(token: int) -> str:
    """A token's word. Special ones are found inside others, so no other word has one of theirs in it."""
    return f"<{token}>" if token in (PAD, BOS, EOS) else f"w{token}"


def load(folder: Path, *, classifier: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The saved model with torch's attention, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
