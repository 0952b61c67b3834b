"""A process of its own that runs one stage, standing for the flow: `python flow_process.py SPEC.json`."""

import json
import sys
from pathlib import Path

from flows.launch import run_stage_process
from flows.launch_settings import Launch

given = json.loads(Path(sys.argv[1]).read_text())
run_stage_process(given["spec"], Launch(**given["launch"]), lambda event: None)
