"""A process of its own that runs the command line with the tests' stage: `python sweep_process.py ARGUMENT ...`."""

import sys

from flows import cli
from tests.flows.pipeline_stages import install

install()
sys.exit(cli.main(sys.argv[1:]))
