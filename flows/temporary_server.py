"""A Prefect API server that ends with whoever started it: `python temporary_server.py`, stdin a pipe.

Prefect's own temporary server outlives a killed flow. This one takes a free port of the loopback address,
prints it as its first line, serves until its stdin is closed, and is gone GRACE_SECONDS later at most.
Settings come from the environment. Started by its path: it imports nothing of ours.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

GRACE_SECONDS = 1.0


def main() -> None:
    """Serve Prefect's API until stdin is closed."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed from now on is log
    parent_is_gone = threading.Event()
    threading.Thread(target=_watch, args=(parent_is_gone,), daemon=True).start()

    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        parent_is_gone.wait()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    server.run(sockets=[listener])


def _watch(parent_is_gone: threading.Event) -> None:
    sys.stdin.buffer.read()
    parent_is_gone.set()
    # uvicorn may wait for a client that never hangs up; SQLite's log makes an abrupt end safe
    threading.Event().wait(GRACE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
