"""A flow of its own that takes part in a race: `python racing_flow.py FOLDER RUN TTL [OVERRIDE ...]`.

It is the run that Prefect's flow drives, without Prefect, whose server eight times over would take minutes.
"""

import json
import sys
from functools import partial
from pathlib import Path

from flows.run import Run
from tests.flows.pipeline_stages import World, install

folder, run_id, ttl_seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
install()
world = World(folder)
world.store.lease = partial(world.store.lease, ttl_seconds=ttl_seconds)  # type: ignore[method-assign]
run = Run(world.plan(*sys.argv[4:]), run_id=run_id)
(folder / "ready").mkdir(exist_ok=True)
(folder / "ready" / run_id).touch()
for name in run.pending():
    run.execute(name)
payload = run.finish()
print(json.dumps({name: [entry["state"], entry["outputs"]] for name, entry in payload["stages"].items()}))
