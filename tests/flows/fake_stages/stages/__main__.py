"""A stage process that does what `config.do` says, and appends the ids of its processes to `config.pids`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

spec = json.loads(Path(sys.argv[1]).read_text())
job, config = Path(spec["job"]), spec["config"]
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def record(pid: int) -> None:
    with open(config["pids"], "a") as file:
        file.write(f"{pid}\n")


def daemon() -> None:
    """A grandchild in a session of its own that ignores SIGTERM, like a stuck worker of torchrun."""
    record(subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True).pid)


def succeed() -> None:
    result = {"outputs": {"model": {"kind": "model", "id": "sha256:" + "0" * 64}}}
    result |= {"metrics": {"loss": 0.5}, "timings": {}, "counts": {"rows": 3}, "resumed_from": None}
    (job / "result.json").write_text(json.dumps(result))


def event(**values: object) -> None:
    with open(job / "events.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def out_of_memory_above(tokens: int) -> None:
    event(kind="micro_batch", tokens=config["micro_batch_tokens"])
    if config["micro_batch_tokens"] > tokens:
        error = {"type": "OutOfMemory", "message": "out of memory", "expected": True}
        error["smaller_micro_batch_tokens"] = config["micro_batch_tokens"] // 2
        (job / "error.json").write_text(json.dumps(error))
        sys.exit(1)
    succeed()


def expected_failure() -> None:
    print("WARNING something odd\nthe stage failed, and this is where:\nTraceback (most recent call last):", flush=True)
    print("artifacts.errors.DataError: pairs.jsonl row 3: no 'rejected'\nERROR failed (exitcode: 1)", flush=True)
    error = {"type": "DataError", "message": "pairs.jsonl row 3: no 'rejected'", "expected": True}
    (job / "error.json").write_text(json.dumps(error))
    sys.exit(1)


def kill_second_rank() -> None:
    if os.environ.get("RANK", "0") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def main(do: str) -> None:
    if do == "ok":
        event(kind="phase", text="loading")
        print("progress 1\rprogress 2\nWARNING something odd", flush=True)
        event(kind="progress", step=2, total=2, unit="step", values={"loss": 0.5})
        succeed()
    elif do == "environment":
        (job / "seen.json").write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ)}))
        succeed()
    elif do == "expected":
        expected_failure()
    elif do == "raise":
        raise ZeroDivisionError("a bug")
    elif do == "no result":
        pass
    elif do == "out of memory above 300 tokens":
        out_of_memory_above(300)
    elif do == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "leave a daemon":
        daemon()
        succeed()
    elif do == "hang":
        record(os.getpid())
        time.sleep(600)
    elif do == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemon()
        record(os.getpid())
        time.sleep(600)
    elif do == "second rank sigkill":
        kill_second_rank()


main(config["do"])
