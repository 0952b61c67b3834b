"""A server that refuses every request with an answer that repeats the request's headers and address, as debugging
pages and careless proxies do: what reaches a log from there must not hold the secrets that were sent."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Refuses(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told = f"refused: {self.path} {dict(self.headers)}"
        server: Any = self.server
        server.told.append(told)
        body = json.dumps({"error": {"message": told}, "detail": told, "messages": [told]}).encode()
        self.send_response(401, "Unauthorized")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def telling_server() -> Iterator[tuple[str, list[str]]]:
    """Its address `127.0.0.1:port`, and what it has told so far."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        told: list[str] = []
        server.told = told  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", told
        finally:
            server.shutdown()
