"""One of the processes that train the tiny model together, and may be killed on the way.

`accelerate launch ... training_process.py SETTINGS.json` with `spec` (of the run), `kill_before` (a step, -1: never),
`kill_rank` and `model_type`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from artifacts import open_store
from stages.context import Context
from stages.leaving import leave
from stages.spec import Spec
from stages.training.export import export
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.probes import settle_layout
from stages.training.processes import prepare_process
from stages.training.router_balance import balance_of
from stages.training.windows import DatasetWindows
from tests.training.conftest import tiny_model
from tests.training.experts import EXPERTS
from tests.training.test_loop import sequences


class Stop(Exception):
    """Stands for a kill, where a test is to survive it."""


class Deadly(DatasetWindows):
    """Kills the process in place of giving one step's window."""

    kill_before, kill = -1, staticmethod(lambda: None)

    def window(self, step: int) -> Any:
        if step == self.kill_before:
            self.kill()
        return super().window(step)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_me() -> None:
    raise Stop


def train(context: Context, kill_before: int, kill: Any, model_type: str = "llama") -> None:
    """To the end, with the model as output."""

    def build() -> Scorer:
        return Scorer(tiny_model(model_type, **EXPERTS.get(model_type, {})))

    scorer = build()
    settle_layout(scorer)
    balance = balance_of(context, scorer, context.config.router_aux_loss_coef)
    trainer = Trainer(context, context.config, prepare_process(context), scorer, TokenLoss(), build, balance)
    windows = Deadly(sequences(), context.config)
    windows.kill_before, windows.kill = kill_before, kill
    export(context, trainer.run(windows), {})


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    spec, rank = Spec(**settings["spec"]), int(os.environ["RANK"])
    kill_before = settings["kill_before"] if rank == settings["kill_rank"] else -1
    train(Context(spec, open_store(spec.store), rank=rank), kill_before, kill_me, settings["model_type"])


if __name__ == "__main__":
    main()
    leave(0)
