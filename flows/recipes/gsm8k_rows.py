"""GSM8K's published files as rows (Cobbe et al., arXiv:2110.14168)."""

from itertools import product
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one problem's published model solutions, every right one against every wrong one."""
    solutions = [row[model] for model in MODELS]
    right = [entry["solution"] for entry in solutions if entry["is_correct"]]
    wrong = [entry["solution"] for entry in solutions if not entry["is_correct"]]
    return [
        {
            "question": row["question"],
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for chosen, rejected in product(dict.fromkeys(right), dict.fromkeys(wrong))
    ]
