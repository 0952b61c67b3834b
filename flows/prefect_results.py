"""What a run as a whole shows in Prefect: the plan with its reasons, results, samples, lineage, the report, folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.settings import PREFECT_API_URL

from artifacts.sealed import scrub
from flows.attempts import state_in_words
from flows.closing import main_metric, short_id
from flows.holder import holder
from flows.prefect_shown import cell, only_shown, show_link, show_table, show_text
from flows.report import write_report
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import clipped, number, plain
from flows.server import REPORTS, prefect_home
from flows.sweep_report import write_sweep_report

if TYPE_CHECKING:
    from artifacts import Store
    from flows.run import Run

SAMPLES = 8
"""Rows of an evaluation that are shown; the report has more."""
SAMPLE_CHARACTERS = 600
_SAMPLE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "answer", "correct", "reward")


def publish_plan(run: Run) -> None:
    """The decision and the reasons for every stage, as a page of the flow run."""
    rows = [
        f"| {name} | {decision.state_in_words} | {cell('; '.join(decision.reasons))} |"
        for name, decision in run.plan.decisions.items()
    ]
    show_text(
        ["| stage | decision | why |", "|---|---|---|", *rows], "plan", run.recipe.name, title=f"plan of run {run.id}"
    )


def publish_results(run: Run, payload: Mapping[str, Any]) -> None:
    """The table of metrics, and where each artifact came from and is."""
    rows = [
        {
            "stage": name,
            "state": state_in_words(entry),
            "seconds": entry["seconds"],
            "main metric": main_metric(entry),
            "artifact": ", ".join(short_id(found["id"]) for found in entry["outputs"].values()),
        }
        for name, entry in payload["stages"].items()
    ]
    show_table(rows, "results", run.recipe.name, title=f"run {run.id}")
    show_text(list(_lineage(run, payload)), "lineage", run.recipe.name, title=f"run {run.id}")


def publish_stage(run: Run, name: str) -> None:
    """A stage's metrics, and the first samples of an evaluation."""
    entry = run.entries[name]
    if entry["metrics"]:
        rows = [{"metric": metric, "value": number(value)} for metric, value in entry["metrics"].items()]
        show_table(rows, "metrics", name, title=f"{name}: {main_metric(entry)}")
    with only_shown():
        for output in entry["outputs"].values():
            if output["kind"] == "evaluation" and (samples := _samples(run, name, output)):
                show_table(samples, "samples", name, title=f"{name}: the first samples")


def publish_report(run: Run) -> None:
    """The run as one page: a link where a `posttrain ui` of this machine gives it out, else how to get it."""
    _publish_page(
        f"report of run {run.id}: graph, curves, samples, lineage",
        f"posttrain report {run.id} --store {run.store.url}",
        f"{run.id}.html",
        lambda page: write_report(run.store, run.id, page),
        ("report", run.recipe.name),
    )


def publish_sweep_report(store: Store, sweep: str, first: str) -> None:
    """The same of a sweep; `first` is the run that leads its standings, with which its page is cleared away."""
    _publish_page(
        f"report of sweep {sweep}: standings, settings, curves",
        f"posttrain report {sweep} --store {store.url}",
        f"{first}.sweep.html",
        lambda page: write_sweep_report(store, sweep, page),
        ("sweep-report", sweep),
    )


def _publish_page(text: str, command: str, name: str, write: Callable[[Path], None], shown_as: tuple[str, ...]) -> None:
    title = text.partition(":")[0]
    place = holder(prefect_home())
    if place is None or place.url != PREFECT_API_URL.value():
        show_text([f"`{command}`"], *shown_as, title=title)
        return
    with only_shown():
        write(prefect_home() / REPORTS / name)
        show_link(f"{place.address}/reports/{name}", text, *shown_as, title=f"`{command}`")


def _samples(run: Run, name: str, output: Mapping[str, Any]) -> list[dict[str, str]]:
    lines = Reader(run.store).lines(artifact_of(output), "samples.jsonl", name, SAMPLES)
    return [
        {column: clipped(scrub(plain(line[column])), SAMPLE_CHARACTERS) for column in _SAMPLE_COLUMNS if column in line}
        for line in lines
    ]


def _lineage(run: Run, payload: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in payload["stages"].items():
        for output, found in entry["outputs"].items():
            yield f"- **{name}.{output}** `{short_id(found['id'])}` ({found['kind']}) by `{entry['uses']}`"
            yield f"    - in `{run.store.url}/{artifact_of(found).key}`; `posttrain path {short_id(found['id'])}`"
            for given, references in entry["inputs"].items():
                names = ", ".join(f"`{_short(reference)}`" for reference in references)
                yield f"    - {given}: {names}"


def _short(reference: str) -> str:
    return short_id(reference) if reference.startswith("sha256:") else reference
