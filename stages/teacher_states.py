"""A teacher's last hidden states of a dataset's completions, once: for distillation without the teacher, reused by
every student, divergence and epoch.

With the teacher's head, which is kept with them, they give all its logits: exact over the whole vocabulary, in the room
(bfloat16, H values) of H / 4 likely tokens with their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.data.types import SEQUENCE_TYPES
from stages.stage import MODELS, Input, Stage
from stages.training.config import PassConfig
from stages.training.memory import scoring
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.training.memory_shape import ModelShape


def run(context: Context) -> None:
    """Read input `dataset` with input `model`."""
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger, say_dropped
    from stages.data.tokenize import tokenize_sequences
    from stages.data.truncation import RowLimit
    from stages.training.kept_teacher import keep_states, write_kept
    from stages.training.language_modeling import asked_tokens, sequence_group
    from stages.training.processes import prepare_process
    from stages.training.reporting import peak_memory_gb
    from stages.training.start import frozen_scorer, tokenizer_of

    config: PassConfig = context.config
    accelerator = prepare_process(context)
    context.phase("loading the model")
    scorer = frozen_scorer(context, "model", bf16=config.bf16).to(accelerator.device)
    tokenizer = tokenizer_of(context, "model")
    dataset, ledger = read_dataset(context.input("dataset")), RowLedger()
    require_vocabulary(dataset, scorer.vocabulary)
    longest = RowLimit.of(config.max_length, scorer.context_length)
    groups = [sequence_group(row) for row in tokenize_sequences(dataset, tokenizer, max_length=longest, ledger=ledger)]
    say_dropped(context, ledger.states)
    names = keep_states(context, accelerator, scorer, groups, config)
    if context.is_main:
        folder = context.output("states")
        logps = write_kept(context, folder, scorer, groups, names)
        tokenizer.save_pretrained(folder)
        scorer.transformers_model.config.save_pretrained(folder)
        ledger.write(folder)
        context.counts["rows"] = len(groups)
        context.metrics["mean_logprob_per_token"] = sum(logps) / max(1, sum(map(asked_tokens, groups)))
        context.timings["peak_memory_gb"] = peak_memory_gb()


def memory(request: Request) -> list[Phase]:
    """One pass after another."""
    work = request.passes(row=request.longest, rows=request.config.shard_rows)
    return [scoring(request.model, request.setup, work, bf16=request.config.bf16)]


def _shapes(config: Any, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    return {"states": replace(models["model"], adapters=None)}


STAGE = Stage(
    name="teacher_states",
    version=1,
    config=PassConfig,
    inputs={"model": Input(MODELS), "dataset": Input(("dataset",), types=SEQUENCE_TYPES)},
    outputs={"states": "teacher_states"},
    run=run,
    summary="a teacher's hidden states of given completions, for distillation without the teacher",
    main_metric="mean_logprob_per_token",
    memory=memory,
    shapes=_shapes,
)
