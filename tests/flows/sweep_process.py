"""A process of its own that runs the command line with the tests' stage: `python sweep_process.py ARGUMENT ...`."""

import signal
import sys

from flows import cli
from tests.flows.pipeline_stages import install

# as a terminal starts it: background jobs of a shell, and what they start, ignore this signal
signal.signal(signal.SIGINT, signal.default_int_handler)
install()
sys.exit(cli.main(sys.argv[1:]))
