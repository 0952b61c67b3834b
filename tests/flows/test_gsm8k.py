"""The recipe on GSM8K's published files: what its parameters mean, and its pairs by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import flows
from flows.recipe import Recipe
from tests.in_process import run_here

RECIPES = Path(flows.__file__).parent / "recipes"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def solutions(question: str, *answers: tuple[str, bool]) -> dict[str, object]:
    """A row of example_model_solutions.jsonl."""
    given = {
        model: {"solution": text, "is_correct": right} for model, (text, right) in zip(MODELS, answers, strict=True)
    }
    return {"question": question, "ground_truth": "1", **given}


def test_pairs_are_every_right_one_against_every_wrong_one() -> None:
    pairs = runpy.run_path(str(RECIPES / "gsm8k_rows.py"))["pairs"]
    made = pairs(solutions("q", ("a", True), ("b", False), ("a", True), ("c", False)))
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in made] == [("a", "b"), ("a", "c")]
    assert pairs(solutions("q", *[(text, True) for text in "abcd"])) == []


def test_rows_that_are_held_out_are_among_those_that_were_asked_for(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    problems = [{"question": f"{number} and 1?", "answer": f"#### {number + 1}"} for number in range(40)]
    judged = [solutions(row["question"], *[(text, text < "c") for text in "abcd"]) for row in problems]
    for name, rows in (("train", problems), ("test", problems[:4]), ("example_model_solutions", judged)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data={data}", "rows=30", "held_out=10", "pair_rows=20"]
    assert set(Recipe.load("gsm8k", settings).stages) >= {"sft", "dpo", "grpo", "eval_reward_pairs"}
    run = run_here(RECIPES / "gsm8k.yaml", tmp_path / "store", settings, only=("solutions", "test", "pairs"))
    metrics = {name: run["stages"][name]["metrics"] for name in ("solutions", "test", "pairs")}
    assert (metrics["solutions"]["rows"], metrics["solutions"]["test_rows"]) == (20, 10)
    assert metrics["test"]["rows"] == 4
    # 40 problems have 4 pairs each, of which 20 are drawn; a quarter of them, in whole problems, is held out
    assert metrics["pairs"]["rows"] + metrics["pairs"]["test_rows"] == 20
    assert 0 < metrics["pairs"]["test_rows"] <= 5
