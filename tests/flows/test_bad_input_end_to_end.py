"""Bad input through whole runs: the message where the user sees it, and nothing half-written in the store.

What is bad -> the tests. CASES are those of bad_stages.py, run below; [c] is test_bad_input_command.py.

unknown stage                    flows/test_recipe_mistakes: test_unknown_stage; test_cli: test_wrong_requests_have_..
misspelt or foreign key          flows/test_recipe_mistakes: test_misspelt_and_foreign_keys; all of test_recipe_typos
wrong type or range              flows/test_recipe_mistakes: test_wrong_types_and_ranges
missing input                    flows/test_recipe_mistakes: test_missing_fields_and_inputs
cycle                            flows/test_recipe_mistakes: test_a_cycle_is_named_in_the_direction_of_the_data
output of the wrong kind         flows/test_recipe_mistakes: test_an_output_of_the_wrong_kind
several mistakes at once         flows/test_recipe_mistakes: test_several_mistakes_are_listed_at_once;
                                 [c] test_requests_are_refused_together
missing file                     flows/test_recipe_mistakes: test_missing_files_and_functions;
                                 stages/test_normalize_bad_input: test_missing_files_name_what_is_there
missing column                   stages/test_normalize_bad_input: test_columns_that_are_not_there; CASES "no column"
a row that is not JSON           stages/test_normalize_bad_input: test_malformed_jsonl;
                                 [c] test_in_the_terminal_..
empty dataset                    stages/test_normalize_bad_input: test_malformed_jsonl; CASES "empty"
preference without `rejected`    stages/test_normalize_bad_input: test_malformed_jsonl; CASES "no rejected"
conversation's end               stages/test_normalize_bad_input: test_malformed_conversations; CASES "no answer"
prompt longer than the maximum   data/test_tokenize: test_prompts_are_dropped_not_cut; CASES "all too long *";
                                 test_dropped_rows_are_counted
chosen equal to rejected         data/test_pairs: test_every_way_of_losing_a_row; CASES "all equal *";
                                 test_dropped_rows_are_counted
tokenizer without chat template  data/test_tokenize: test_tokenizers_that_cannot_serve; CASES "no template *"
model folder without weights     training/test_model: test_wrong_folders_are_refused_..; CASES "no weights"
weights with NaN                 training/test_model: test_wrong_weights_are_refused; CASES "NaN weights *"
loss that becomes NaN            training/test_loop: test_nan_stops_..; CASES "diverges *";
                                 [c] test_in_the_terminal_..
reward raises, length, None,     rollouts/test_rewards: test_faults_are_named; CASES "reward *";
NaN, shape, slow                 rollouts/test_reward_limits;
                                 [c] test_in_the_terminal_..
not enough disk                  artifacts/test_local: test_a_full_disk_..; [c] test_a_full_disk
store that does not answer       artifacts/test_faults: test_a_store_that_..; [c] test_a_store_that_does_not_answer
a port in use                    flows/test_pipeline: test_an_api_that_does_not_answer;
                                 [c] test_a_port_of_another_program;
                                 our own servers and torchrun take free ports
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.bad_stages import CASES, CODE, SOUND, TRAINING
from tests.in_process import Payload, assert_nothing_half_written, failures, run_here
from tests.stages.small_models import logged
from tests.tiny_recipe import artifact_folder, metrics_of, write_recipe


@dataclass(frozen=True)
class Ended:
    """The run with all of them in it."""

    store: Path
    payload: Payload


def named(what: str) -> str:
    return what.replace(" ", "_")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("bad")
    before = run_here(write_recipe(folder / "recipe", {}), folder / "store")
    (folder / "recipe" / "bad.py").write_text(CODE)
    base = artifact_folder(folder / "store", before["stages"]["base"]["outputs"]["model"]["id"])
    for name in ("plain", "empty", "nan"):
        shutil.copytree(base, folder / "recipe" / name, copy_function=shutil.copyfile)
    (folder / "recipe/plain/chat_template.jinja").unlink()
    (folder / "recipe/empty/model.safetensors").unlink()
    weights = load_file(folder / "recipe/nan/model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][0] = float("nan")
    save_file(weights, folder / "recipe/nan/model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(folder / "recipe", {**SOUND, **{named(what): case for what, (case, _) in CASES.items()}})
    return Ended(folder / "store", run_here(recipe, folder / "store"))


@pytest.mark.parametrize("what", CASES)
def test_the_stage_fails_with_one_clear_message(ended: Ended, what: str) -> None:
    message = failures(ended.payload)[named(what)]
    assert re.search(CASES[what][1], message), message
    assert "Traceback" not in message and "\n" not in message
    (log,) = ended.store.glob(f"scratch/*/{named(what)}/error.json")
    assert json.loads(log.read_text())["expected"] is True


def test_nothing_else_fails_and_nothing_is_half_written(ended: Ended) -> None:
    assert set(failures(ended.payload)) == set(map(named, CASES))
    assert_nothing_half_written(ended.store, ended.payload)


def test_dropped_rows_are_counted(ended: Ended) -> None:
    stages = ended.payload["stages"]
    assert stages["equal"]["counts"]["filtered: chosen equals rejected"] == 1

    def ledger(name: str) -> dict[str, int]:
        folder = artifact_folder(ended.store, stages[name]["outputs"]["model"]["id"])
        found: dict[str, int] = json.loads((folder / "ledger.json").read_text())["states"]
        return found

    assert ledger("some_long") == {"used": 1, "filtered: prompt too long": 1}

    def told(name: str) -> list[str]:
        (job,) = ended.store.glob(f"scratch/*/{name}")
        return [line for line in logged(job) if "dropped" in line]

    assert told("some_long") == ["2 rows: 1 used; 1 dropped: filtered: prompt too long"]
    assert told("some_equal") == ["2 rows: 1 used; 1 dropped: filtered: chosen equals rejected"]
    assert ledger("some_equal") == {"used": 1, "filtered: chosen equals rejected": 1}
    assert len(metrics_of(ended.store, stages["some_equal"])) == TRAINING["max_steps"]
