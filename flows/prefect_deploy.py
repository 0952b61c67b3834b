"""A recipe as a Prefect deployment: on a schedule, and with a form in the UI from which its values can be changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from artifacts.errors import Problem, RequestError
from flows.overrides import apply_overrides, places_of_parameters
from flows.prefect_flow import posttrain
from flows.recipe import Recipe
from flows.recipe_files import find_recipe
from flows.run_form import GIVEN, Use, run_form
from flows.yaml_lines import read_document
from stages.names import nearest

ENTRYPOINT = "flows.prefect_flow.posttrain"
"""The flow of every deployment; the worker imports it."""

CRON = (
    'expected minute, hour, day of the month, month and weekday, for example --cron "0 3 * * *": every night at 3:00; '
    '"30 6 * * 1": on Mondays at 6:30'
)

LEAST_INTERVAL_SECONDS = 10.0
"""A worker asks for runs every few seconds, and each takes seconds to start."""


@dataclass(frozen=True)
class When:
    """When runs start by themselves; neither: only when asked to."""

    cron: str | None = None
    interval_seconds: float | None = None
    timezone: str = "UTC"

    def schedules(self) -> list[DeploymentScheduleCreate]:
        """For Prefect. Raises RequestError for what is no schedule, or one that no worker keeps up with."""
        if self.interval_seconds is not None and 0 < self.interval_seconds < LEAST_INTERVAL_SECONDS:
            less = f"shorter than {LEAST_INTERVAL_SECONDS:g} s: runs would be made faster than a worker takes them up"
            raise RequestError([Problem(f"--interval {self.interval_seconds:g}", less)])
        try:
            if self.cron is not None:
                return [DeploymentScheduleCreate(schedule=CronSchedule(cron=self.cron, timezone=self.timezone))]
            if self.interval_seconds is not None:
                interval = timedelta(seconds=self.interval_seconds)
                return [DeploymentScheduleCreate(schedule=IntervalSchedule(interval=interval, timezone=self.timezone))]
        except ValidationError as error:
            reason = "; ".join(found["msg"].removeprefix("Value error, ") for found in error.errors())
            if any(found["loc"] == ("cron",) for found in error.errors()):
                reason += f"; {CRON}"
            given = f"--cron {self.cron!r}" if self.cron is not None else f"--interval {self.interval_seconds}"
            raise RequestError([Problem(f"{given} --timezone {self.timezone}", reason)]) from error
        return []


@dataclass(frozen=True)
class Deployable:
    """A recipe that was read and found right, with the settings that its runs begin with."""

    recipe: Recipe
    source: str
    """Its file, or the name of a shipped one: each run reads it afresh."""
    parameters: Mapping[str, Any]
    settings: Sequence[str]
    """What `--set` changes besides parameters."""
    replaced: Mapping[str, Any]
    """The recipe's own values of the parameters that `--set` changes."""
    overrides: Sequence[str]
    """All that `--set` changes."""
    uses: Sequence[Use]
    """Of parameters."""

    @classmethod
    def read(cls, path_or_name: str, overrides: Sequence[str]) -> Deployable:
        """Raises RequestError with every mistake found."""
        recipe = Recipe.load(path_or_name, overrides)
        document = read_document(find_recipe(path_or_name))
        parameters = document.data.get("parameters") or {}
        of_parameters = [text for text in overrides if _head(text) in parameters]
        changed, _ = apply_overrides(document, of_parameters)
        is_file = Path(path_or_name).expanduser().is_file()
        source = str(Path(path_or_name).expanduser().absolute()) if is_file else path_or_name
        settings = [text for text in overrides if text not in of_parameters]
        replaced = {_head(text): parameters[_head(text)] for text in of_parameters}
        uses = [Use(*found) for found in places_of_parameters(document)]
        return cls(recipe, source, changed.data.get("parameters") or {}, settings, replaced, overrides, uses)

    def values(self, store: str) -> dict[str, Any]:
        """The parameters of the flow that runs begin with."""
        selection: dict[str, list[str]] = {name: [] for name in ("only", "start", "until", "force")}
        values = {"recipe": self.source, "parameters": dict(self.parameters), "set": list(self.settings)}
        return {**values, **selection, "store": store}

    def schema(self, store: str) -> dict[str, Any]:
        """The JSON schema of the run form, against which the server checks every run's values."""
        return run_form(self.recipe.stages, self.values(store), self.uses, self.replaced)


def given(deployment: DeploymentResponse) -> list[str]:
    """The parameters that `--set` gave when it was deployed, as `name=value`."""
    schema: Any = deployment.parameter_openapi_schema or {}
    form = schema.get("properties", {}).get("parameters", {}).get("properties", {})
    values = deployment.parameters.get("parameters") or {}
    return [
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
        if GIVEN in form.get(name, {})
    ]


def deploy(
    client: SyncPrefectClient, what: Deployable, name: str, when: When, *, pool: str, store: str
) -> DeploymentResponse:
    """Make or replace the deployment `posttrain/<name>`; one that is paused stays so.

    Raises RequestError where a name is taken by another recipe, or there is no such work pool.
    """
    schedules = when.schedules()
    require_place(client, what, name, pool)
    made = client.create_deployment(
        flow_id=client.create_flow(posttrain),
        name=name,
        schedules=schedules,
        # both would want the same stages, and runs that waited for longer ones would be more and more
        concurrency_limit=1,
        concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        parameters=what.values(store),
        description=f"The recipe {what.source}, stages {', '.join(what.recipe.stages)}.",
        work_pool_name=pool,
        tags=["posttrain"],
        entrypoint=ENTRYPOINT,
        parameter_openapi_schema=what.schema(store),
        enforce_parameter_schema=True,
    )
    return client.read_deployment(made)


def find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """The deployment of that name, if there is one."""
    try:
        return client.read_deployment_by_name(f"{posttrain.name}/{name}")
    except ObjectNotFound:
        return None


def require_place(client: SyncPrefectClient, what: Deployable, name: str, pool: str) -> None:
    """Raises RequestError where a name is taken by another recipe, or there is no such work pool."""
    _require_pool(client, pool)
    before = find(client, name)
    if before is not None and before.parameters.get("recipe") != what.source:
        raise RequestError(
            f"the deployment {name!r} is of another recipe, {before.parameters.get('recipe')}; give this one another "
            f"--name, or remove that one: posttrain schedule remove {name}"
        )


def _require_pool(client: SyncPrefectClient, pool: str) -> None:
    """Raises RequestError where there is no such work pool."""
    known = [found.name for found in client.read_work_pools()]
    if pool not in known:
        raise RequestError(
            f"there is no work pool {pool!r}{nearest(pool, known)}; there are: {', '.join(known) or 'none'}. Make it "
            f"with `prefect work-pool create {pool} --type process` and give it a worker, or start `posttrain ui`"
        )


def _head(override: str) -> str:
    return override.partition("=")[0].strip().partition(".")[0]
