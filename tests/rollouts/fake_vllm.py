"""What of vLLM's server is talked to, in a few lines: answers are told beforehand, questions are remembered.

As a program (`python -m tests.rollouts.fake_vllm --uds SOCKET ...`) it behaves as variable FAKE_VLLM says, with a child
process beside it, as vLLM has one.
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

Respond = Callable[[str, dict[str, Any]], Any]
"""(path, body) -> JSON value; bytes to be sent as they are; an int: that status; None: the connection is cut."""


def handler(respond: Respond) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(respond(self.path, {}))

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            self._send(respond(self.path, json.loads(self.rfile.read(length) or b"{}")))

        def _send(self, value: Any) -> None:
            if value is None:
                self.connection.close()
                return
            status = value if isinstance(value, int) else 200
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def address_string(self) -> str:
            return "client"

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """The URL of a server in this process."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler(respond)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def main() -> None:
    behaviour = os.environ["FAKE_VLLM"]
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if behaviour == "dies":
        print("ValueError: this model has 16 heads of nothing", flush=True)
        sys.exit(3)
    if behaviour == "is killed":
        os.kill(os.getpid(), 9)
    if behaviour == "never answers":
        print("loading, loading", flush=True)
        time.sleep(600)
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    models = {"data": [{"id": options["--served-model-name"]}]}
    answer = handler(lambda path, _: {"/health": {}, "/v1/models": models}.get(path, 404))
    socketserver.ThreadingUnixStreamServer(options["--uds"], answer).serve_forever()


if __name__ == "__main__":
    main()
