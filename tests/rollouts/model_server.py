"""A server that answers as vLLM's does, with a model of transformers behind it, token by token: an independent sampler
of the weights that it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from threading import Condition
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from tests.rollouts.fake_vllm import serving


class ModelServer:
    """What `serving` asks; `loads` counts the weights that it was sent."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.loads, self.version, self.asked = 0, "none", 0
        self.adapter: Any = None
        """The model with the adapter that it was sent, under that one's name."""
        self.adapter_name = ""
        self.before_token: Callable[[int, int, int], None] = lambda *_: None
        """Called with the numbers of a question of /inference/v1/generate, of its completion and of the next token."""
        self._between, self._is_paused, self._generated = Condition(), False, 0
        self._prompts: dict[Any, Any] = {}
        """Caches of prompts, under the salts that they were asked with."""

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        settings = {"model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}}
        answers = {
            "/health": lambda: {},
            "/v1/models": lambda: {"data": [{"id": "m"}, *({"id": one, "parent": "m"} for one in self._adapters())]},
            "/v1/load_lora_adapter": lambda: self._load_adapter(body["lora_name"], Path(body["lora_path"])),
            "/v1/unload_lora_adapter": lambda: self._unload_adapter(body["lora_name"]),
            "/server_info?config_format=json": lambda: {"vllm_config": settings},
            "/weight_info": lambda: {"weight_version": self.version},
            "/update_weight_version": lambda: self._name(body["new_version"]),
            "/collective_rpc": lambda: self._load(Path(body["kwargs"]["weights_path"])),
            "/reset_prefix_cache": lambda: {"success": True},
            "/pause?mode=keep&clear_cache=false": lambda: self._pause(True),
            "/is_paused": lambda: {"is_paused": self._is_paused},
            "/resume": lambda: self._pause(False),
            "/inference/v1/generate": lambda: {"model": body["model"], "choices": self._generate(body)},
            "/v1/completions": lambda: {"model": body["model"], "choices": self._complete(body)},
        }
        return answers[path]()

    def _name(self, version: str) -> dict[str, Any]:
        self.version = version
        return {}

    def _load(self, folder: Path) -> dict[str, Any]:
        weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        self.model.load_state_dict(weights)
        self.loads += 1
        return {}

    def _adapters(self) -> list[str]:
        return [self.adapter_name] if self.adapter is not None else []

    def _load_adapter(self, name: str, folder: Path) -> Any:
        if self._adapters():
            return 400  # as vLLM does, unless it is told to replace it
        self.adapter = PeftModel.from_pretrained(deepcopy(self.model), str(folder)).eval()
        self.adapter_name = name
        self.loads += 1
        return b"Success: it was added"

    def _unload_adapter(self, name: str) -> Any:
        if name not in self._adapters():
            return 404
        self.adapter = None
        return b"Success: it was removed"

    def _model_of(self, body: dict[str, Any]) -> Any:
        return self.model if body["model"] == "m" else self.adapter

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.asked += 1
        return [{"index": index, **self._one(body, body.get("seed", 0) + index)} for index in range(body.get("n", 1))]

    def _one(self, body: dict[str, Any], seed: int) -> dict[str, Any]:
        model = self._model_of(body)
        prompt, made, values = list(body["prompt"]), [], []
        chance, temperature = torch.Generator().manual_seed(seed), body["temperature"]
        while len(made) < body["max_tokens"] and (not made or made[-1] not in body.get("stop_token_ids", ())):
            logits_V = model(torch.tensor([prompt + made])).logits[0, -1] / (temperature or 1.0)
            if temperature:
                made.append(int(torch.multinomial(logits_V.softmax(-1), 1, generator=chance)))
            else:
                made.append(int(logits_V.argmax()))
            values.append(float(logits_V.log_softmax(-1)[made[-1]]))
        ended = made[-1] in body.get("stop_token_ids", ())
        answer = {
            "token_ids": made,
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"token_logprobs": values},
        }
        if body.get("prompt_logprobs") is not None:
            logprobs_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            answer["prompt_logprobs"] = self._of_prompt(logprobs_TV, prompt, body["prompt_logprobs"])
            named = body.get("logprob_token_ids") or logprobs_TV[-1].topk(body["logprobs"]).indices.tolist()
            answer["logprobs"]["top_logprobs"] = [
                {f"token_id:{one}": float(logprobs_TV[-1, one]) for one in [made[0], *named]}
            ]
        return answer

    def _pause(self, is_paused: bool) -> dict[str, Any]:
        with self._between:
            self._is_paused = is_paused
            self._between.notify_all()
        return {}

    def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        number, self._generated = self._generated, self._generated + 1
        return [{"index": index, **self._grown(body, number, index)} for index in range(body["sampling_params"]["n"])]

    @torch.no_grad()
    def _grown(self, body: dict[str, Any], number: int, index: int) -> dict[str, Any]:
        """Token by token over a cache that stays as it is when other weights come."""
        asked, prompt = body["sampling_params"], tuple(body["token_ids"])
        chance = torch.Generator().manual_seed(asked["seed"] + index)
        made: list[int] = []
        values, names, cache = [], [], DynamicCache()
        while len(made) < asked["max_tokens"] and (not made or made[-1] not in asked["stop_token_ids"]):
            self.before_token(number, index, len(made))
            with self._between:
                self._between.wait_for(lambda: not self._is_paused)
                if made:
                    logits_V = self.model(torch.tensor([made[-1:]]), past_key_values=cache).logits[0, -1]
                else:
                    cache, logits_V = self._read(prompt, body.get("cache_salt"))
                logits_V = logits_V / asked["temperature"]
                made.append(int(torch.multinomial(logits_V.softmax(-1), 1, generator=chance)))
                values.append({"logprob": float(logits_V.log_softmax(-1)[made[-1]])})
                names.append(self.version)
        return {
            "token_ids": made,
            "finish_reason": "stop" if made[-1] in asked["stop_token_ids"] else "length",
            "logprobs": {"content": values},
            "weight_versions": spans(names),
        }

    def _read(self, prompt: tuple[int, ...], salt: str | None) -> Any:
        """(cache, logits of the next token) by the weights of the first time that it was asked with this salt: all but
        the last token, as vLLM computes that one anew."""
        if (salt, prompt) not in self._prompts:
            cache = DynamicCache()
            if prompt[:-1]:
                self.model(torch.tensor([prompt[:-1]]), past_key_values=cache)
            self._prompts[salt, prompt] = cache
        cache = deepcopy(self._prompts[salt, prompt])
        return cache, self.model(torch.tensor([prompt[-1:]]), past_key_values=cache).logits[0, -1]

    def _of_prompt(self, logprobs_TV: torch.Tensor, prompt: list[int], most: int) -> list[Any]:
        """Of every token but the first: its own and those of the `most` likeliest, as vLLM gives them."""
        places: list[Any] = [None]
        for logprobs_V, token in zip(logprobs_TV[:-1], prompt[1:], strict=True):
            likeliest = logprobs_V.topk(most).indices.tolist()
            places.append({str(one): {"logprob": float(logprobs_V[one])} for one in [token, *likeliest]})
        return places


def spans(names: list[str]) -> list[dict[str, Any]]:
    """As vLLM says by which weights each token was made."""
    found, start = [], 0
    for name, same in groupby(names):
        end = start + len(list(same))
        found.append({"version": name, "start": start, "end": end})
        start = end
    return found


@contextmanager
def model_server(folder: Path) -> Iterator[tuple[ModelServer, dict[str, Any]]]:
    """(the server, what `rollouts` says for it); weights go through a folder beside that of its first model."""
    server, shared = ModelServer(folder), folder.parent / "shared-weights"
    shared.mkdir(exist_ok=True)
    with serving(server) as url:
        yield server, {"engine": "vllm_server", "urls": [url], "weights_folder": str(shared)}
