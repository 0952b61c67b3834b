"""What the sampler's tests ask for."""

from contextlib import contextmanager

import torch

from stages.rollouts.requests import SampleRequest
from stages.rollouts.sampler import EmbeddedSampler

# prompts of unequal and of equal length, in an order that is not the sampler's; one has no keys of its own
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14], [6], [20, 21], [28, 2, 17, 9, 9, 1]]
END = (5, 12)


@contextmanager
def sampler(model, **keywords):
    """Fails where prompts were not shared though they should be."""
    found = EmbeddedSampler(model, **{"eos_token_ids": END, "pad_token_id": 0, **keywords})
    yield found
    assert found.unshared is None, found.unshared


def flat(groups):
    return [completion for group in groups for completion in group]


def requests(completions=1, prompts=PROMPTS, limits=None):
    return [
        SampleRequest(prompt, tuple(1000 * number + index for index in range(completions)), f"row-{number}", limits)
        for number, prompt in enumerate(prompts)
    ]


def teacher_forced(model, prompt, tokens, temperature=1.0, top_k=0):
    """Log-probability of each token, in one pass over prompt and completion without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
