"""A process of its own that runs the tests' recipe: `python pipeline_process.py FOLDER [OVERRIDE ...]`."""

import json
import signal
import sys
from pathlib import Path

from flows.pipeline import run_pipeline
from flows.terminal import Terminal
from tests.flows.pipeline_stages import World, install

# as a terminal starts it: background jobs of a shell, and what they start, ignore this signal
signal.signal(signal.SIGINT, signal.default_int_handler)
install()
with Terminal(json=True) as terminal:
    payload = run_pipeline(World(Path(sys.argv[1])).plan(*sys.argv[2:]), terminal)
print(json.dumps(payload))
