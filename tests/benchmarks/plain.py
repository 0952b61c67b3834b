"""The plain loop: what a careful person writes on transformers alone.

Rows of like length padded into a batch with its attention mask, every completion with its own copy of the prompt,
all logits, no gradient checkpointing, torch's fused AdamW.

Letters: B rows of a padded batch, T its length, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from tests.benchmarks.cases import TAUGHT, Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import BETA, EPSILON, SETTINGS, load
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import PAD, Row

IGNORED = -100
ROWS_PER_PASS = 8
Sequences = Sequence[tuple[list[int], list[int]]]
"""(prompt, completion) of every padded row."""


@dataclass(frozen=True)
class Padded:
    """Rows as tensors; `targets_BT[b, t]` is the completion token that position t predicts, or IGNORED."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    targets_BT: Tensor

    @property
    def asked_BT(self) -> Tensor:
        """True where a completion token is predicted."""
        return self.targets_BT != IGNORED


def pad(rows: Sequences, device: torch.device) -> Padded:
    """Padding stands on the right."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask, targets = [], [], []
    for prompt, completion in rows:
        length = len(prompt) + len(completion)
        ids.append(prompt + completion + [PAD] * (width - length))
        mask.append([1] * length + [0] * (width - length))
        targets.append([IGNORED] * (len(prompt) - 1) + completion + [IGNORED] * (width - length + 1))
    return Padded(*(torch.tensor(values, device=device) for values in (ids, mask, targets)))


def sequences(rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    """Every completion with its prompt, row by row."""
    return [(row.prompt, completion) for row in rows for completion in row.completions]


def logits(model: Any, padded: Padded) -> Tensor:
    """[B, T, V]."""
    found: Tensor = model(
        input_ids=padded.input_ids_BT, attention_mask=padded.attention_mask_BT, use_cache=False
    ).logits
    return found


def token_logprobs(model: Any, padded: Padded) -> Tensor:
    """[B, T]: of the token that each position predicts, 0 where none is asked for."""
    logs_BTV = logits(model, padded).log_softmax(-1)
    targets_BT1 = padded.targets_BT.clamp(min=0)[..., None]
    return logs_BTV.gather(-1, targets_BT1)[..., 0] * padded.asked_BT


def sum_of_token_losses(model: Any, padded: Padded) -> Tensor:
    """-log p summed over the completions."""
    logits_BTV = logits(model, padded)
    return cross_entropy(logits_BTV.flatten(0, 1), padded.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


class PlainLoop:
    """A model, its optimizer, and the steps of all stages on them."""

    def __init__(self, case: Case, folder: CaseFolder) -> None:
        # weights that are not trained need not be rounded in every pass
        frozen = torch.bfloat16 if case.bf16 else torch.float32
        trained = frozen if case.lora_r or case.stage == "reference" else torch.float32
        self.model = load(folder.model, classifier=case.stage == "reward", dtype=trained).train()
        if case.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.lora_r:
            self.model = with_adapters(self.model, case.lora_r)
        self.device = next(self.model.parameters()).device
        self.teacher = None
        if case.stage in TAUGHT:
            self.teacher = load(folder.teacher, dtype=frozen).eval().requires_grad_(False)
        self.references = folder.references() if case.stage == "dpo" else {}
        self.optimizer = build_optimizer(self.model)

    def update(self, losses: Iterable[Tensor]) -> dict[str, Any]:
        """One optimizer step on the sum of the losses, each computed when the one before has been differentiated."""
        total = torch.zeros((), device=self.device)
        for loss in losses:
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS["max_grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm}

    def sft(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Mean over completion tokens."""
        padded = pad(sequences(rows), self.device)
        return self.update([sum_of_token_losses(self.model, padded) / padded.asked_BT.sum()])

    @torch.no_grad()
    def reference(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Summed log-probabilities, no update."""
        return {"logprobs": token_logprobs(self.model, pad(sequences(rows), self.device)).sum(1).tolist()}

    def dpo(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Mean over pairs."""
        sums_B = token_logprobs(self.model, pad(sequences(rows), self.device)).sum(1)
        given_B = sums_B.new_tensor([value for row in rows for value in self.references[row.row_id]])
        ratios_B = sums_B - given_B
        return self.update([-logsigmoid(BETA * (ratios_B[0::2] - ratios_B[1::2])).mean()])

    def reward(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Bradley-Terry, mean over pairs; the classifier reads the last token that is not padding."""
        padded = pad(sequences(rows), self.device)
        rewards_B = logits(self.model, padded)[:, 0]
        return self.update([-logsigmoid(rewards_B[0::2] - rewards_B[1::2]).mean()])

    def grpo(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Clipped policy gradient, mean over the tokens of the step; rows of like length pass together."""
        weighted = [
            (row.prompt, completion, advantage)
            for row in rows
            for completion, advantage in zip(row.completions, row.advantages, strict=True)
        ]
        weighted.sort(key=lambda one: len(one[0]) + len(one[1]))
        tokens = sum(row.completion_tokens for row in rows)
        parts = [weighted[start : start + ROWS_PER_PASS] for start in range(0, len(weighted), ROWS_PER_PASS)]
        return self.update(self._policy_loss(part) / tokens for part in parts)

    def _policy_loss(self, part: Sequence[tuple[list[int], list[int], float]]) -> Tensor:
        padded = pad([(prompt, completion) for prompt, completion, _ in part], self.device)
        logprobs_BT = token_logprobs(self.model, padded)
        advantages_B1 = logprobs_BT.new_tensor([advantage for *_, advantage in part])[:, None]
        ratios_BT = (logprobs_BT - logprobs_BT.detach()).exp()
        bounded_BT = ratios_BT.clamp(1 - EPSILON, 1 + EPSILON)
        losses_BT = -torch.minimum(ratios_BT * advantages_B1, bounded_BT * advantages_B1)
        return (losses_BT * padded.asked_BT).sum()

    def distill(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Reverse KL to the teacher, mean over completion tokens."""
        padded = pad(sequences(rows), self.device)
        with torch.no_grad():
            teacher_NV = logits(self.teacher, padded)[padded.asked_BT].log_softmax(-1)
        student_NV = logits(self.model, padded)[padded.asked_BT].log_softmax(-1)
        divergence = (student_NV.exp() * (student_NV - teacher_NV)).sum() / len(student_NV)
        return self.update([divergence])


def with_adapters(model: Any, rank: int) -> Any:
    """As stages put them on: every linear layer but the head, alpha 32, in float32."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear"))
    if adapted.get_base_model().supports_gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def build_optimizer(model: Any) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
            {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
        ],
        lr=SETTINGS["learning_rate"],
        betas=SETTINGS["betas"],
        eps=SETTINGS["adam_epsilon"],
        fused=True,
    )


STAGES: dict[str, Callable[[PlainLoop, Sequence[Row]], dict[str, Any]]] = {
    "sft": PlainLoop.sft,
    "reference": PlainLoop.reference,
    "dpo": PlainLoop.dpo,
    "reward": PlainLoop.reward,
    "grpo": PlainLoop.grpo,
    "distill": PlainLoop.distill,
    "distill_kept": PlainLoop.distill,
}


def run(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn."""
    loop = PlainLoop(case, folder)
    stage = STAGES[case.stage]
    recorder.begin()
    for rows in steps:
        with torch.autocast(loop.device.type, torch.bfloat16, enabled=case.bf16):
            recorder.done(stage(loop, rows))


def reference_sums(folder: CaseFolder, rows: Sequence[Row], *, bf16: bool) -> dict[str, list[float]]:
    """Row id -> summed log-probability of every completion, a row at a time."""
    model = load(folder.model, dtype=torch.bfloat16 if bf16 else torch.float32).eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return {row.row_id: token_logprobs(model, pad(sequences([row]), device)).sum(1).tolist() for row in rows}
