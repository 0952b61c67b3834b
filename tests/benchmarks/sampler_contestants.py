"""What completes prompts in the sampler's benchmark: each makes a call that returns how many tokens it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.rows import PAD

if TYPE_CHECKING:
    from stages.rollouts.requests import SampleRequest


def ours(folder: CaseFolder, prompts: list[list[int]], lengths: list[list[int]]) -> Callable[[], int]:
    """A call of the embedded sampler on a model as the stages prepare it; returns its tokens."""
    from stages.rollouts.requests import SamplingConfig
    from stages.rollouts.sampler import EmbeddedSampler
    from stages.training.model import Scorer
    from stages.training.probes import settle_layout
    from tests.benchmarks.models import load

    scorer = Scorer(load(folder.model)).eval().requires_grad_(False)
    settle_layout(scorer)
    most = max(max(group) for group in lengths)
    requests = requests_of(prompts, lengths)

    def call() -> int:
        sampler = EmbeddedSampler(scorer.transformers_model, eos_token_ids=(), pad_token_id=PAD)
        found = sampler.sample(requests, SamplingConfig(max_completion_length=most))
        assert sampler.unshared is None
        assert [[len(one.token_ids) for one in group] for group in found] == lengths
        return sum(map(sum, lengths))

    return call


def vllm(folder: CaseFolder, prompts: list[list[int]], lengths: list[list[int]]) -> Callable[[], int]:
    """A call of vLLM in this process on weights that were sent to it; returns its tokens."""
    from stages.rollouts.engine import ServedModel
    from stages.rollouts.engine_settings import EngineConfig
    from stages.rollouts.requests import SamplingConfig
    from stages.rollouts.vllm_engine import VllmEngine
    from stages.training.whole_weights import whole_weights
    from tests.benchmarks.models import load

    model = load(folder.model)
    served = ServedModel(folder.model, folder.model, "float32", model.config.vocab_size, (), seed=0)
    engine = VllmEngine(served, EngineConfig(engine="vllm"))
    engine.load(whole_weights(model))
    most = max(max(group) for group in lengths)
    requests = requests_of(prompts, lengths)

    def call() -> int:
        found = engine.sample(requests, SamplingConfig(max_completion_length=most))
        assert [[len(one.token_ids) for one in group] for group in found] == lengths
        return sum(map(sum, lengths))

    return call


def requests_of(prompts: list[list[int]], lengths: list[list[int]]) -> list[SampleRequest]:
    """What our own samplers are asked for."""
    from stages.rollouts.requests import SampleRequest

    return [
        SampleRequest(prompt, tuple(range(1000 * number, 1000 * number + len(group))), limits=tuple(group))
        for number, (prompt, group) in enumerate(zip(prompts, lengths, strict=True))
    ]


def generate(folder: CaseFolder, prompts: list[list[int]], lengths: list[list[int]]) -> Callable[[], int]:
    """A call of transformers' generate on the rows padded on the left; returns its tokens."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from tests.benchmarks.models import load

    model = load(folder.model).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    limits = torch.tensor([length for group in lengths for length in group], device=model.device)

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] - width >= limits

    def call() -> int:
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=int(limits.max()),
            do_sample=True,
            top_k=0,
            num_return_sequences=len(lengths[0]),
            pad_token_id=PAD,
            stopping_criteria=StoppingCriteriaList([AtLength()]),
        )
        assert found.shape == (len(limits), width + int(limits.max()))
        return sum(map(sum, lengths))

    return call


CONTESTANTS = {"ours": ours, "vllm": vllm, "generate": generate}
LABELS = {"ours": "tokens/s", "vllm": "of vLLM", "generate": "of generate"}
"""Of columns."""
