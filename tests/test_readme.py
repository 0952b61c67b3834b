"""What README and docs say of losses, against the losses; and their worked example, worked; and where links lead."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from stages.losses.advantages import ADVANTAGES
from stages.losses.policy import POLICY_LOSSES
from stages.losses.preference import PREFERENCE_LOSSES
from stages.losses.registry import Loss
from stages.losses.sampled_distillation import SAMPLED_LOSSES
from stages.losses.supervised import SUPERVISED_LOSSES
from stages.losses.unpaired import UNPAIRED_LOSSES
from stages.preference import Config, check
from stages.rl import Config as RlConfig
from stages.rollouts.reward_spec import REWARDS, unknown_rewards

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def table_rows(heading: str) -> list[str]:
    """The rows of the table under a heading, without its head."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


TABLES: list[tuple[str, Mapping[str, Loss], str]] = [
    ("sft", SUPERVISED_LOSSES, "`language_modeling`, `prompt_completion`, `pretokenized`"),
    ("preference", PREFERENCE_LOSSES, "`preference`"),
    ("unpaired_preference", UNPAIRED_LOSSES, "`unpaired_preference`, `preference`"),
    ("rl", POLICY_LOSSES, "any with prompts"),
]
REWARD_ROW = (
    "| reward model (Bradley-Terry), with margins and centering | `reward_model` | | 2307.09288, 2312.09244 "
    "| `preference` | no |"
)
STEP_ROW = "| process reward model | `process_reward_model` | | 2211.14275 | `stepwise_supervision` | no |"

GKD_ROW = (
    "| distillation (GKD) on the student's completions, given ones, or both | `distill` | | 2306.13649 "
    "| any with prompts; given: those of `sft` | a teacher |"
)
CROSS_ROW = (
    "| distillation between tokenizers (ULD, GOLD's hybrid), with cross_tokenizer | `distill` | | 2402.12030 "
    "| any with prompts; given: `prompt_completion`, plain `language_modeling` | a teacher |"
)
SDFT_ROW = (
    "| self-distillation with privileged context (SDFT) | `distill` | | 2601.19897 | `privileged_context` | yes |"
)

ONLINE_ROWS = (
    "| PPO with a value head, or a value model of its own (GAE) | `ppo` | | 1707.06347, 1506.02438 | any with prompts "
    "| yes |",
    "| on-line DPO, with any loss of single pairs | `online_dpo` | `sigmoid` | 2402.04792 | any with prompts | yes |",
    "| XPO: on-line DPO with xpo_alpha | `online_dpo` | `sigmoid` | 2405.21046 | any with prompts | yes |",
    "| Nash-MD | `nash_md` | | 2312.00886 | any with prompts | yes |",
    "| A*-PO | `a2po` | | 2505.20686 | any with prompts | yes |",
    "| SDPO: self-distillation from one's own successes, or from feedback | `sdpo` | | 2601.20802 | any with prompts "
    "| no |",
)


def table() -> list[str]:
    """The rows that docs/training.md must have."""
    rows = [
        f"| {loss.title} | `{stage}` | `{loss.name}` | {loss.paper} | {'`triple_preference`' if loss.gold else kinds} "
        f"| {'yes' if loss.reference else 'no'} |"
        for stage, losses, kinds in TABLES
        for loss in losses.values()
    ]
    sampled = [
        f"| {loss.title} | `distill` | `{loss.name}` | {loss.paper} | any with prompts | a teacher |"
        for loss in SAMPLED_LOSSES.values()
    ]
    return [*rows, REWARD_ROW, STEP_ROW, GKD_ROW, CROSS_ROW, SDFT_ROW, *sampled, *ONLINE_ROWS]


def test_every_objective_is_in_the_table() -> None:
    assert table_rows("Objectives") == table()


def test_every_reward_is_in_the_table() -> None:
    def parameter(name: str, info: FieldInfo) -> str:
        if info.is_required():
            return f"`{name}` (needed)"
        default = json.dumps(info.get_default(call_default_factory=True, validated_data={}), ensure_ascii=False)
        return f"`{name}: {default}`" if len(default) <= 20 else f"`{name}`"

    assert table_rows("Rewards") == [
        f"| `{name}` | {(reward.__doc__ or '').splitlines()[0]} "
        f"| {', '.join(parameter(*field) for field in reward.model_fields.items())} |"
        for name, reward in REWARDS.items()
    ]


def test_the_rewards_shown_are_taken() -> None:
    shown = yaml.safe_load(TEXT.split("## Rewards\n")[1].split("```yaml\n")[1].split("```")[0])
    assert unknown_rewards(RlConfig.model_validate(shown).rewards) == []


def test_every_advantage_is_named() -> None:
    text = TEXT.split("## Objectives\n")[1].split("\n## ")[0]
    assert all(f"`{name}`" in text or f"`advantage_estimator: {name}`" in text for name in ADVANTAGES)


def test_what_it_says_below_the_table() -> None:
    """Which losses take a divergence, LD-DPO, a moving reference and WPO."""
    text = " ".join(TEXT.split("## Objectives\n")[1].split("\n## ")[0].split())
    assert "Losses of the margin (the first seven of `preference`) also take `f_divergence_type`" in text
    assert [loss.f_divergence for loss in PREFERENCE_LOSSES.values()] == [True] * 7 + [False] * (
        len(PREFERENCE_LOSSES) - 7
    )
    assert "Those with a reference take `ld_alpha`" in text and "all that look at one pair at a time take" in text
    for name, loss in PREFERENCE_LOSSES.items():
        taken: list[dict[str, Any]] = [{"ld_alpha": 0.5}, {"sync_ref_model": True}] if loss.reference else []
        taken += [] if loss.couples_rows else [{"use_weighting": True}]
        refused: list[dict[str, Any]] = [] if loss.reference else [{"ld_alpha": 0.5}, {"sync_ref_model": True}]
        refused += [{"use_weighting": True}] if loss.couples_rows else []
        needed = dict.fromkeys(loss.needs, 0.1)
        for settings, fits in [*((one, True) for one in taken), *((one, False) for one in refused)]:
            assert (check(Config(loss_type=name, **needed, **settings), frozenset()) == []) == fits, (name, settings)


LOSSES = [loss for _, losses, _ in TABLES for loss in losses.values()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss_names_its_paper(loss: Loss) -> None:
    """Its docstring cites what the table cites."""
    text = " ".join((loss.function.__doc__ or "").split())
    for number in re.findall(r"\d{4}\.\d{5}", loss.paper):
        assert number in text, f"{loss.name} does not cite {number}"


WORKED = """
from torch import Tensor
import torch
from stages.losses import preference
from stages.losses.preference import *
{function}
preference.PREFERENCE_LOSSES.update(MARGIN)
from tests.losses import test_preference as tests
tests.LOSSES["hinge_squared"] = hinge_squared
VALUES = []
{row}
(row,) = VALUES
tests.test_values(*row)
tests.test_gradients(*row)
tests.test_pairs_do_not_see_each_other(*row)
from stages.preference import Config, check
from stages.rl import Config as RlConfig
from stages.rollouts.reward_spec import REWARDS, unknown_rewards
config = Config(loss_type="hinge_squared", f_divergence_type="js_divergence")
assert check(config, frozenset()) == [] and config.needs_reference
try:
    Config(loss_type="hinge_squird")
except ValueError as error:
    assert "hinge_squared" in str(error)
else:
    raise AssertionError("an unknown loss was taken")
"""


def test_the_worked_example() -> None:
    """The function as docs/extending.md prints it, and its row of numbers, in a process of their own."""
    section = TEXT.split("**A preference loss**")[1].split("**A reward**")[0]
    function, row = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    program = WORKED.format(function=function, row=row)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_index() -> None:
    assert all(f"(docs/{page.name})" in PAGES[0].read_text(encoding="utf-8") for page in PAGES[1:])
