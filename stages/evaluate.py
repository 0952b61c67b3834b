"""Evaluation: loss, accuracy by generation, preference accuracy, reward-model score; each with an interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from artifacts.errors import StageError
from stages.evaluation.config import AnswerConfig, answer_problems
from stages.evaluation.memory import answering_phases
from stages.evaluation.seen import tokenized
from stages.evaluation.tasks import Task, holds_reward_model, permitted_tasks
from stages.stage import MODELS, Input, Stage
from stages.training.length_settings import one_reference
from stages.training.memory import scoring
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.types import Dataset
    from stages.evaluation.intervals import Estimate
    from stages.evaluation.measuring import Measured, Subject

FIRST_METRICS = ("accuracy", "preference/accuracy", "loss", "reward")
"""The first of these that was measured is the main metric."""

_ROWS_AT_ONCE = 256
"""Rows that are scored before they are saved."""


class Config(AnswerConfig):
    """Settings of an evaluation."""

    tasks: tuple[Task, ...] = ()
    """loss: held-out loss and perplexity; accuracy: completions judged by `rewards`, each one's mean, and of several
    completions pass@k; preference_accuracy: chosen against rejected; reward: scores of completions by input
    reward_model. Empty: all that dataset and inputs permit."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 takes the likeliest token."""
    threshold: float = 1.0
    """A completion is right when the weighted sum of its rewards is at least this."""
    completion_only_loss: bool | None = None
    """Loss of the completion only; null: yes where the rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Loss of what the assistant says only: found by the chat template's generation markers, or else by how it renders
    other texts."""
    beta: float = Field(0.1, gt=0)
    """Scale of the implicit reward, where a reference is wired in."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = answer_problems(config, len(config.rewards))
    tasks = set(config.tasks)
    if "accuracy" in tasks and not config.rewards:
        problems.append("task accuracy needs rewards: [...] that judge a completion")
    if "reward" in tasks and "reward_model" not in wired:
        problems.append("task reward needs input reward_model")
    if tasks and config.rewards and "accuracy" not in tasks:
        problems.append("rewards are given, but tasks has no accuracy, so they would not be used")
    if tasks and "reward_model" in wired and "reward" not in tasks:
        problems.append("input reward_model is wired in, but tasks has no reward, so it would not be used")
    if tasks and config.rollouts.is_apart and not tasks & {"accuracy", "reward"}:
        problems.append(
            f"rollouts.engine is {config.rollouts.engine}, but tasks has neither accuracy nor reward, so nothing is "
            "sampled"
        )
    if tasks and config.structured is not None and not tasks & {"accuracy", "reward"}:
        problems.append("structured is given, but tasks has neither accuracy nor reward, so nothing is sampled")
    references = {"reference_logprobs", "reference"} & wired
    problems += one_reference(wired)
    if tasks and references and "preference_accuracy" not in tasks:
        problems.append(
            f"input {min(references)} is wired in, but tasks has no preference_accuracy, so it would not be used"
        )
    return problems


def run(context: Context) -> None:
    """Measure input `model` on input `dataset`."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import say_dropped
    from stages.evaluation.measuring import measure_answers, measure_loss, measure_pairs
    from stages.evaluation.rows import TaskLedger, draw_rows, joint_ledger
    from stages.training.processes import prepare_process
    from stages.training.reporting import peak_memory_gb

    config: Config = context.config
    accelerator = prepare_process(context)
    dataset, left_out = draw_rows(read_dataset(context.input("dataset")), config.limit, config.seed)
    is_reward_model = holds_reward_model(context.input("model"))
    tasks = permitted_tasks(context, dataset, is_reward_model)
    subject = _subject(context, accelerator, dataset, is_reward_model)
    measures = {"accuracy": measure_answers, "preference_accuracy": measure_pairs, "loss": measure_loss}
    # accuracy and reward judge the same completions
    first_tasks = dict.fromkeys("accuracy" if task == "reward" else task for task in tasks)
    ledgers: dict[str, TaskLedger] = {task: TaskLedger() for task in first_tasks}
    measured = [measures[task](subject, tasks, ledgers[task]) for task in first_tasks]
    context.counts["rows"] = len(dataset)
    estimates = {name: found for part in measured for name, found in part.estimates.items()}
    names = [*(name for name in FIRST_METRICS if name in estimates)]
    names += [name for name in estimates if name not in names]
    for name in names:
        found = estimates[name]
        context.metrics |= {name: found.value, f"{name}/low": found.low, f"{name}/high": found.high}
    if context.is_main:
        ledger = joint_ledger(ledgers, left_out)
        say_dropped(context, ledger.states)
        _write(context, {name: estimates[name] for name in names}, _records(dataset, measured), ledger.to_json())
    context.timings["peak_memory_gb"] = peak_memory_gb()


def _subject(context: Context, accelerator: Any, dataset: Dataset, is_reward_model: bool) -> Subject:
    from stages.data.given_tokens import require_vocabulary
    from stages.evaluation.measuring import Subject
    from stages.training.classifiers import load_reward_model
    from stages.training.model import Scorer
    from stages.training.start import freeze, frozen_scorer, tokenizer_of

    context.phase("loading the model")
    if is_reward_model:
        for name in ("reference_logprobs", "reference"):
            if context.has(name):
                raise StageError(f"input {name} is wired in, but the model is a reward model, which needs none")
        scorer = freeze(context, Scorer(load_reward_model(context.input("model"))), context.config.bf16)
    else:
        scorer = frozen_scorer(context, "model", bf16=context.config.bf16)
    scorer.to(accelerator.device)
    require_vocabulary(dataset, scorer.vocabulary)
    return Subject(context, accelerator, scorer, tokenizer_of(context, "model"), dataset, is_reward_model)


def _records(dataset: Dataset, measured: list[Measured]) -> list[dict[str, Any]]:
    """One record an answer, or one a row that was not answered, with all that was measured of the row."""
    from stages.data.types import ROW_ID

    records = []
    for row in dataset:
        found = [part.records[row[ROW_ID]] for part in measured if row[ROW_ID] in part.records]
        for index in range(max(map(len, found), default=0)):
            record = {ROW_ID: row[ROW_ID], **_shown(dataset, row)}
            for fields in reversed(found):  # a completion's own verdict wins over its row's
                record |= fields[index if len(fields) > 1 else 0]
            records.append(record)
    return records


def _shown(dataset: Dataset, row: dict[str, Any]) -> dict[str, Any]:
    """The prompt, what the dataset holds beside it, and the dataset's own completion as `reference`."""
    from stages.evaluation.rows import extra_columns

    shown: dict[str, Any] = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
    if "messages" in row and dataset.type == "language_modeling":
        shown |= {"prompt": row["messages"][:-1], "reference": row["messages"][-1:]}
    if dataset.type in ("prompt_completion", "unpaired_preference"):
        shown["reference"] = row["completion"]
    return shown | extra_columns(dataset, row)


def _write(
    context: Context, estimates: dict[str, Estimate], records: list[dict[str, Any]], ledger: dict[str, Any]
) -> None:
    import json
    from dataclasses import asdict

    from stages.training.export import write_jsonl

    folder = context.output("evaluation")
    results = {name: asdict(found) for name, found in estimates.items()}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    write_jsonl(folder / "samples.jsonl", records)


def memory(request: Request) -> list[Phase]:
    """Answers where they are asked for; else the pass over the rows' own text, of the reference too."""
    config = request.config
    answers = {"accuracy", "reward"} & set(config.tasks) or (not config.tasks and config.rewards)
    weights = {"weights": request.frozen(request.model)}
    work = request.passes(row=2 * request.longest, rows=_ROWS_AT_ONCE)
    phases = [scoring(request.model, request.setup, work, bf16=config.bf16)]
    if (reference := request.models.get("reference")) is not None:
        phases.append(scoring(reference, request.setup, work, resident=weights, own="reference", bf16=config.bf16))
    return answering_phases(request, phases) if answers and not request.model.classifier else phases


STAGE = Stage(
    name="evaluate",
    version=5,
    config=Config,
    inputs={
        "model": Input((*MODELS, "reward_model")),
        "dataset": Input(("dataset",)),
        "reward_model": Input(("reward_model",), required=False),
        "reference_logprobs": Input(("logprobs",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"evaluation": "evaluation"},
    run=run,
    summary="loss, accuracy, preference accuracy or reward, with intervals and per-sample records",
    check=check,
    main_metric="accuracy",
    memory=memory,
    tokenized=tokenized,
)
