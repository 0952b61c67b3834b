"""Losses of a step as plain transformers gives them, from what a model sees of the rows; $ is the end token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.training.classifiers import load_reward_model, load_step_judge
from tests.data.characters import ids

BETA, SEED = 0.4, 3


@dataclass(frozen=True)
class Models:
    """Folders, and the same two models as transformers loads them."""

    model: Path
    reference: Path
    policy: Any
    fixed: Any


def logprob(model: Any, prompt: str, completion: str) -> float:
    """Of the completion's tokens after the prompt's, from full logits."""
    tokens = ids(prompt + completion)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(len(prompt), len(tokens)))


def log_sigmoid(value: float) -> float:
    return float(torch.nn.functional.logsigmoid(torch.tensor(value, dtype=torch.float64)))


def of_marked(models: Models, seen: list[str]) -> float:
    """Cross-entropy of what stands between « and »."""
    total, count = 0.0, 0
    for text in seen:
        before = ""
        for piece in text.split("»"):
            given, _, trained = piece.partition("«")
            before += given
            total -= logprob(models.policy, before, trained) if trained else 0.0
            before, count = before + trained, count + len(trained)
    return total / count


def of_pairs(models: Models, seen: list[tuple[str, str, str]]) -> float:
    """DPO against the other model."""
    losses = []
    for prompt, *completions in seen:
        chosen, rejected = (
            logprob(models.policy, prompt, text) - logprob(models.fixed, prompt, text) for text in completions
        )
        losses.append(-log_sigmoid(BETA * (chosen - rejected)))
    return sum(losses) / len(losses)


def divergences(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """[N] beta 0: KL(teacher || student), 1: KL(student || teacher), else the generalized Jensen-Shannon."""
    student, teacher = student_NV.softmax(-1), teacher_NV.softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    middle = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def of_privileged(
    student: Any,
    teacher: Any,
    sampled: list[tuple[str, str, list[int]]],
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> float:
    """Mean divergence over the completions' tokens; (prompt, what the teacher sees instead, completion)."""
    values = []
    for prompt, seen, completion in sampled:
        logits = []
        for model, text in ((student, prompt), (teacher, seen)):
            before = ids(text)
            with torch.no_grad():
                whole = model(input_ids=torch.tensor([before + completion])).logits[0].double()
            logits.append(whole[len(before) - 1 : -1] / temperature)
        values.append(divergences(*logits, beta))
    return float(torch.cat(values).mean())


def of_scores(models: Models, seen: list[tuple[str, str, str]]) -> float:
    """Bradley-Terry on the last token's score under a fresh head."""
    judge = load_reward_model(models.model, new_head_seed=SEED).eval()
    losses = []
    for prompt, *completions in seen:
        with torch.no_grad():
            chosen, rejected = (
                float(judge(input_ids=torch.tensor([ids(prompt + text)])).logits[0, 0]) for text in completions
            )
        losses.append(-log_sigmoid(chosen - rejected))
    return sum(losses) / len(losses)


def of_triples(models: Models, seen: list[tuple[str, str, str, str]]) -> float:
    """TPO: without a reference, and the mean log-probability of the gold completion's tokens."""
    losses = []
    for prompt, chosen, rejected, gold in seen:
        ratio = logprob(models.policy, prompt, chosen) - logprob(models.policy, prompt, rejected)
        losses.append(-log_sigmoid(BETA * ratio) - logprob(models.policy, prompt, gold) / len(gold))
    return sum(losses) / len(losses)


def of_judged(models: Models, seen: list[tuple[str, str, bool]]) -> float:
    """APO-zero: 1 - sigmoid of the reward of desirable completions, the sigmoid itself of the others."""
    losses = []
    for prompt, text, desirable in seen:
        reward = BETA * (logprob(models.policy, prompt, text) - logprob(models.fixed, prompt, text))
        losses.append(1 / (1 + torch.tensor(reward if desirable else -reward).exp().item()))
    return sum(losses) / len(losses)


def of_steps(models: Models, seen: list[tuple[str, list[str], list[bool]]]) -> float:
    """Cross-entropy of the labels at every separator, h."""
    judge = load_step_judge(models.model, new_head_seed=SEED).eval()
    losses: list[float] = []
    for prompt, steps, labels in seen:
        with torch.no_grad():
            logits = judge(input_ids=torch.tensor([ids(prompt + "".join(step + "h" for step in steps))])).logits[0]
        end = len(prompt) - 1
        for step, label in zip(steps, labels, strict=True):
            end += len(step) + 1
            losses.append(-float(logits[end].log_softmax(-1)[int(label)]))
    return sum(losses) / len(losses)
