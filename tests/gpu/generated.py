"""transformers' own answers, for a model on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.rollouts.sampling import END


@torch.no_grad()
def generated_on_the_gpu(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    """(greedy completion, the log-probability of each of its tokens in one pass without a cache)."""
    ids = torch.tensor([prompt], device="cuda")
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=list(END))
    tokens = made[0, len(prompt) :]
    logits = model(made, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return tokens.tolist(), logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
