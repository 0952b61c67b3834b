"""Tiny random Llamas on a character tokenizer, datasets, and one way to run a stage on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stages.context import Context, local_context
from stages.data.dataset import read_dataset, write_dataset
from stages.data.ledger import RowLedger
from tests.data.characters import IDS, build_tokenizer, ids

EOS = IDS["<eos>"]


def save_model(folder: Path, seed: int, *, reward: bool = False) -> Any:
    """A model whose next token depends on the prompt, saved with its tokenizer."""
    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if reward else LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        bos_token_id=IDS["<bos>"],
        eos_token_id=EOS,
        pad_token_id=None,
        initializer_range=0.6,
        num_labels=1,
    )
    model = kind(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def save_dataset(folder: Path, kind: str, rows: Sequence[Mapping[str, Any]], *, conversational: bool = False) -> Path:
    """Rows r0, r1, ... as a dataset artifact's folder."""
    folder.mkdir(parents=True)
    ledger = RowLedger()
    ledger.use(len(rows))
    named = [{"row_id": f"r{index}", **row} for index, row in enumerate(rows)]
    write_dataset(folder, named, type=kind, conversational=conversational, ledger=ledger, source={})
    return folder


def save_completions(folder: Path, **sets: Sequence[tuple[str, str]]) -> dict[str, Path]:
    """Inputs of a stage: a model, and datasets of these prompts and completions."""
    save_model(folder / "model", seed=1)
    found = {"model": folder / "model"}
    for name, rows in sets.items():
        completed = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
        found[name] = save_dataset(folder / name, "prompt_completion", completed)
    return found


def run_stage(stage: str, folder: Path, inputs: dict[str, Path], **config: Any) -> Context:
    """Run it in this process; every `folder` has a store of its own."""
    context = local_context(stage, config, folder=folder, inputs=dict(inputs))
    context.stage.run(context)
    return context


def output(context: Context, name: str) -> Path:
    return Path(context.spec.job) / "out" / name


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_dataset(folder))


def states(folder: Path) -> dict[str, int]:
    """The ledger's states, after checking that they sum to the input."""
    ledger = read_json(folder / "ledger.json")
    assert sum(ledger["states"].values()) == ledger["input"]
    return ledger["states"]


def logged(job: Path) -> list[str]:
    """The lines for people of a stage that ran in that folder."""
    path = job / "events.jsonl"
    return [event["text"] for event in read_lines(path) if event["kind"] == "log"] if path.exists() else []


def greedy(model: Any, prompt_ids: list[int], length: int) -> list[int]:
    """transformers' own greedy completion."""
    made = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=length, pad_token_id=0)
    return made[0, len(prompt_ids) :].tolist()


def labels_loss(model: torch.nn.Module, prompt: str, completion: str) -> tuple[float, int]:
    """transformers' own loss of the completion and its end token: (sum, tokens)."""
    token_ids = torch.tensor([[*ids(prompt), *ids(completion), EOS]])
    labels = token_ids.clone()
    labels[0, : len(prompt)] = -100
    tokens = len(completion) + 1
    with torch.no_grad():
        return float(model(input_ids=token_ids, labels=labels).loss) * tokens, tokens


def mean_labels_loss(model: torch.nn.Module, rows: Sequence[tuple[str, str]]) -> float:
    """The same a token of several rows."""
    losses = [labels_loss(model, *row) for row in rows]
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def reward_of(model: torch.nn.Module, token_ids: list[int]) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([token_ids])).logits[0, 0])


def record_samples(monkeypatch: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of what stages sample from now on, as token ids."""
    from stages.training.generation import Sampling

    original, found = Sampling.__call__, []

    def sample(self: Sampling, prompts: Any, seeds: Any) -> Any:
        made = original(self, prompts, seeds)
        for prompt, completions in zip(prompts, made, strict=True):
            found.extend((list(prompt.prompt_ids), list(one.token_ids)) for one in completions)
        return made

    monkeypatch.setattr(Sampling, "__call__", sample)
    return found


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward: how many different characters a completion has."""
    return [float(len(set(completion))) for completion in completions]


def count_saves(monkeypatch: Any) -> list[str]:
    """Names of the shards saved from now on."""
    from artifacts import Shards

    original, names = Shards.save, []

    def save(self: Shards, name: str, data: bytes) -> None:
        names.append(name)
        original(self, name, data)

    monkeypatch.setattr(Shards, "save", save)
    return names
