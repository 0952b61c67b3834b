"""What Prefect's scheduler has read by the time that a deployment is paused, or deployed anew, does not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.prefect_homes import NewHome

SCHEDULER = """
import asyncio, json
from datetime import timedelta
from prefect.server import schemas
from prefect.server.database import provide_database_interface
from prefect.server.models import deployments, flows
from prefect.server.schemas.actions import DeploymentScheduleCreate
from prefect.server.schemas.schedules import IntervalSchedule
from flows.server_process import plan_as_it_is_by_then

HOUR = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(hours=1)), active=True)


async def main():
    db = provide_database_interface()
    plan_as_it_is_by_then()

    async def planned(between):
        async with db.session_context(begin_transaction=True) as session:
            flow = await flows.create_flow(session=session, flow=schemas.core.Flow(name="posttrain"))
            made = schemas.core.Deployment(name=between.__name__, flow_id=flow.id, paused=False)
            id = (await deployments.create_deployment(session=session, deployment=made)).id
            await deployments.delete_schedules_for_deployment(session=session, deployment_id=id)
            await deployments.create_deployment_schedules(session=session, deployment_id=id, schedules=[HOUR])
        async with db.session_context() as session:
            runs = await deployments._generate_scheduled_flow_runs(
                db, session=session, deployment_id=id, start_time=schemas.core.now("UTC"),
                end_time=schemas.core.now("UTC") + timedelta(days=1), min_time=timedelta(0), min_runs=3, max_runs=3)
        async with db.session_context(begin_transaction=True) as session:
            await between(session, id)
        async with db.session_context(begin_transaction=True) as session:
            await deployments._insert_scheduled_flow_runs(session=session, runs=runs)
        async with db.session_context(begin_transaction=True) as session:
            found = await db_runs(session, id)
            await deployments._delete_scheduled_runs(session=session, deployment_id=id, auto_scheduled_only=True)
        return found

    async def db_runs(session, id):
        from prefect.server.models.flow_runs import read_flow_runs
        found = await read_flow_runs(session=session)
        return len([run for run in found if run.deployment_id == id])

    async def nothing(session, id): ...
    async def pause(session, id):
        (await deployments.read_deployment(session=session, deployment_id=id)).paused = True
    async def again(session, id):
        await deployments.delete_schedules_for_deployment(session=session, deployment_id=id)
        await deployments.create_deployment_schedules(session=session, deployment_id=id, schedules=[HOUR])

    print(json.dumps([await planned(between) for between in (nothing, pause, again)]))


asyncio.run(main())
"""


def test_runs_of_what_was_paused_or_deployed_anew_meanwhile_are_not_planned(
    tmp_path: Path, new_prefect_home: NewHome
) -> None:
    """Between the scheduler's two transactions: nothing, a pause, another `deploy`."""
    home = new_prefect_home(tmp_path / "prefect")
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", SCHEDULER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [3, 0, 0]
