"""What of vLLM's server is talked to, in a few lines: answers are told beforehand, or a `Model`'s.

As a program (`python -m tests.rollouts.fake_vllm --uds SOCKET ...`) it behaves as variable FAKE_VLLM says, with a child
process beside it, as vLLM has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
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
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


END = 2
"""The token that ends a completion."""


def digest(folder: Path) -> str:
    """Of the weights in its files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))).hexdigest()


def continuation(weights: str, prompt: Sequence[int], seed: int, limit: int) -> list[int]:
    """A completion of tokens 2 to 9 that follows from these alone, as a model's does."""
    drawn = hashlib.sha256(f"{weights} {list(prompt)} {seed}".encode()).digest()
    tokens: list[int] = []
    while len(tokens) < limit and tokens[-1:] != [END]:
        tokens.append(END + drawn[len(tokens)] % 8)
    return tokens


class Model:
    """Serves completions of its weights, which are "initial" until others are loaded."""

    def __init__(self, name: str, **settings: str) -> None:
        self.name, self.weights, self.version, self.answered = name, "initial", "default", 0
        self.adapter, self.paused = "an adapter", False
        self.settings = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", **settings}
        self.form_reader = "auto"

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            self.weights = digest(Path(body["kwargs"]["weights_path"]))
        if path == "/v1/load_lora_adapter":
            self.adapter, self.weights = body["lora_name"], digest(Path(body["lora_path"]))
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path in ("/pause?mode=keep&clear_cache=false", "/resume"):
            self.paused = path != "/resume"
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/inference/v1/generate":
            return self._generate(body)
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": self.name}, {"id": self.adapter, "parent": self.name}]},
            "/v1/load_lora_adapter": b"Success",
            "/v1/unload_lora_adapter": b"Success",
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
            "/update_weight_version": {"success": True},
            "/pause?mode=keep&clear_cache=false": {"status": "paused"},
            "/resume": {"status": "resumed"},
            "/is_paused": {"is_paused": self.paused},
            "/weight_info": {"weight_version": self.version},
            "/server_info?config_format=json": {
                "vllm_config": {
                    "model_config": self.settings,
                    "structured_outputs_config": {"backend": self.form_reader},
                }
            },
        }.get(path, 404)

    def _complete(self, body: dict[str, Any]) -> Any:
        choices = []
        for index in range(body["n"]):
            tokens = continuation(self.weights, body["prompt"], body["seed"] + index, body["max_tokens"])
            choices.append(
                {
                    "index": index,
                    "token_ids": tokens,
                    "finish_reason": "stop" if tokens[-1] == END else "length",
                    "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
                }
            )
        self.answered += len(choices)
        return {"model": body["model"] if body["model"] == self.adapter else self.name, "choices": choices}

    def _generate(self, body: dict[str, Any]) -> Any:
        """The same, in the words of that interface."""
        answer = self._complete({"model": body["model"], "prompt": body["token_ids"], **body["sampling_params"]})
        for choice in answer["choices"]:
            values = choice["logprobs"]["token_logprobs"]
            choice["logprobs"] = {"content": [{"logprob": value} for value in values]}
            choice["weight_versions"] = [{"version": self.version, "start": 0, "end": len(values)}]
        return answer


def killed_by_7(model: Respond, once: bool) -> Respond:
    """Kills its process when it is to complete a prompt that begins with token 7."""
    done = Path("killed")

    def respond(path: str, body: dict[str, Any]) -> Any:
        prompt = body.get("prompt") or body.get("token_ids")
        if prompt and prompt[0] == 7 and not (once and done.exists()):
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return model(path, body)

    return respond


def unwell_at_7(model: Respond) -> Respond:
    """From such a prompt on it answers nothing but errors, until it is started again."""
    done, ill = Path("ill"), []

    def respond(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and body["prompt"][0] == 7 and not done.exists():
            done.touch()
            ill.append(True)
        return 503 if ill else model(path, body)

    return respond


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
    model: Respond = Model(options["--served-model-name"])
    if behaviour.startswith("killed by 7"):
        model = killed_by_7(model, once=behaviour.endswith("once"))
    if behaviour == "unwell at 7":
        model = unwell_at_7(model)
    if behaviour == "second dies" and options["--uds"].endswith("/1/unready"):
        print("ValueError: no memory for a cache", flush=True)
        sys.exit(3)
    socketserver.ThreadingUnixStreamServer.request_queue_size = 128
    socketserver.ThreadingUnixStreamServer(options["--uds"], handler(model)).serve_forever()


if __name__ == "__main__":
    main()
