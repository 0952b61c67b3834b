"""Python files that a recipe names: what counts as their source, and that each is run with its own neighbours."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import RequestError, StageError
from stages.external import code_identity, load_code, load_named
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


IMPORTS = {
    "a module of a package": "from helpers.score import V",
    "a module as a name": "from helpers import score",
    "a module by its path": "import helpers.score",
    "under another name": "import helpers.score as s",
    "all of a package": "from helpers import *",
    "through the package": "from helpers import V",
    "relative": "from .helpers.score import V",
    "relative, as a name": "from .helpers import score",
    "two steps away": "import first",
    "in a folder without __init__.py": "from plain.deep.score import V",
    "by name": "import importlib\nimportlib.import_module('.helpers.score', __package__)",
}
FILES = {
    "helpers/__init__.py": "from .score import V\n",
    "helpers/score.py": "V = 1.0\n",
    "first.py": "def later():\n    from helpers import second\n",
    "helpers/second.py": "from . import score\nimport first\n",  # in a circle
    "plain/deep/score.py": "from helpers.score import V\n",
}


@pytest.mark.parametrize("within", ["the file", "a function"])
@pytest.mark.parametrize("how", IMPORTS)
def test_what_it_imports_counts(tmp_path: Path, how: str, within: str) -> None:
    lines = IMPORTS[how].replace("*", "score") if within == "a function" else IMPORTS[how]
    body = lines if within == "the file" else "def late():\n" + "\n".join(f"    {line}" for line in lines.split("\n"))
    source = write(tmp_path, {**FILES, "reward.py": f"{body}\ndef reward(completions):\n    return []\n"}) / "reward.py"
    before = code_identity(f"{source}:reward")
    (tmp_path / "other.py").write_text("not = imported")
    assert code_identity(f"{source}:reward") == before
    write(tmp_path, {"helpers/score.py": "V = 0.0\n"})  # of the same size
    changed = code_identity(f"{source}:reward")
    assert changed != before
    write(tmp_path, {"helpers/__init__.py": "from .score import V \n"})
    assert code_identity(f"{source}:reward") != changed
    load_code(f"{source}:reward")


def test_packages_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `package.module:name`, nothing is run to find out."""
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, {f"mine/{name}": text for name, text in FILES.items()})
    write(
        tmp_path,
        {
            "mine/__init__.py": "raise SystemExit\n",
            "mine/a.py": "from . import helpers\n",
            "mine/b.py": "def f():\n    from mine.helpers.score import V\n",
            "mine/c/__init__.py": "",
            "mine/c/d.py": "from ..helpers import score\n",
            "beside.py": "",
            "mine/e.py": "import beside\nimport json\n",
        },
    )
    names = ["mine.a:f", "mine.b:f", "mine.c.d:f", "mine.e:f"]
    before = [code_identity(name) for name in names]
    write(tmp_path, {"mine/helpers/score.py": "V = 0.0\n"})
    assert [code_identity(name) != old for name, old in zip(names, before, strict=True)] == [True, True, True, False]
    write(tmp_path, {"beside.py": "V = 1\n"})
    assert code_identity("mine.e:f") != before[3]
    before = [code_identity(name) for name in names]
    write(tmp_path, {"mine/__init__.py": "raise SystemExit(1)\n"})
    assert not {str(code_identity(name)) for name in names} & set(map(str, before))
    assert "mine" not in sys.modules
    with pytest.raises(RequestError, match=r"no module named 'mine\.nothing'"):
        code_identity("mine.nothing:f")


def test_where_it_lies_is_no_part_of_it(tmp_path: Path) -> None:
    text = "import first\nfrom helpers.score import V\ndef reward(completions):\n    return [V] * len(completions)\n"
    here = write(tmp_path / "here", {**FILES, "reward.py": text})
    there = Path(shutil.copytree(here, tmp_path / "else" / "where"))
    assert code_identity(f"{here}/reward.py:reward") == code_identity(f"{there}/reward.py:reward")
    # the same contents under each other's names are other code
    (there / "helpers" / "score.py").write_text(FILES["helpers/second.py"])
    (there / "helpers" / "second.py").write_text(FILES["helpers/score.py"])
    assert code_identity(f"{here}/reward.py:reward") != code_identity(f"{there}/reward.py:reward")


def test_a_file_alone_keeps_the_identity_it_always_had(tmp_path: Path) -> None:
    """Caches of earlier versions stay: one of the file's name and digest, and those of modules beside it."""
    write(tmp_path, {"reward.py": "import beside\n", "beside.py": "import json\n"})
    lines = [f"{name}:{sha256_file(tmp_path / name)}\n" for name in ("beside.py", "reward.py")]
    digest = sha256_bytes("".join(lines).encode())
    assert code_identity(f"{tmp_path}/reward.py:f")["sha256"] == digest


def test_what_is_not_python_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"reward.py": "import beside\n", "beside.py": "V = 1\nV = = 2\n"})
    with pytest.raises(RequestError, match=r"beside\.py:2: not valid Python: invalid syntax"):
        code_identity(f"{tmp_path}/reward.py:f")


REWARD = """
from __future__ import annotations
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from helper import V
@dataclass
class Score:
    value: float
def one(completion):
    from late import W
    return Score(V + W)
def reward(completions):
    return [one(text).value for text in completions]
async def slow(completions):
    from late import W
    return [V + W for _ in completions]
def spread(context):
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return [score.value for score in pool.map(one, ["a", "b"])]
"""


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Files of one name in two folders, whose neighbours have one name as well."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        write(
            tmp_path / name, {"r.py": REWARD, "helper.py": f"V = {value}\n", "late.py": "import helper\nW = helper.V\n"}
        )
    return [f"{tmp_path}/a/r.py", f"{tmp_path}/b/r.py"]


def test_each_has_its_own_neighbours(two: list[str]) -> None:
    before = set(sys.modules), list(sys.path)
    one, other = (load_code(f"{path}:reward") for path in two)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda reward: reward(["x"]), [one, other, one])) == [[2.0], [4.0], [2.0]]
    asyncs = [load_code(f"{path}:slow") for path in two]

    async def together() -> Any:
        return await asyncio.gather(*(slow(["x"]) for slow in asyncs))

    assert asyncio.run(together()) == [[2.0], [4.0]]
    rewards = RewardSet([f"{two[0]}:reward", f"{two[1]}:slow"])
    assert score(rewards, prompts("x"), [["y"]]).totals == [[6.0]]
    assert list(sys.path) == before[1] and not {"helper", "late", "r"} & (set(sys.modules) - before[0])
    assert not list(Path(two[0]).parent.rglob("__pycache__"))


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_other_processes_have_them_too(two: list[str], how: str) -> None:
    for path, value in zip(two, (2.0, 4.0), strict=True):
        assert load_code(f"{path}:spread")(get_context(how)) == [value, value]
        made = load_code(f"{path}:one")("x")
        assert pickle.loads(pickle.dumps(made)) == made
        with ProcessPoolExecutor(1, mp_context=get_context(how)) as pool:
            assert pool.submit(load_code(f"{path}:reward"), ["x"]).result() == [value]


def test_what_was_edited_is_loaded_anew(two: list[str]) -> None:
    old = load_code(f"{two[0]}:reward")
    assert load_code(f"{two[0]}:reward") is old
    Path(two[0]).with_name("helper.py").write_text("V = 5.0\n")  # within the same second, of the same size
    assert load_code(f"{two[0]}:reward")(["x"]) == [10.0]


def test_names_that_mean_something_else(tmp_path: Path) -> None:
    """The standard library stays itself, a folder of data gives way to a library, and a file of its name as well."""
    write(
        tmp_path,
        {
            "json.py": "dumps = None\n",
            "datasets/rows.jsonl": "{}\n",
            "math.py": "import math\ndef f():\n    return math.pi > 3\n",
            "yaml.py": "import yaml\ndef f():\n    return yaml.safe_load('1')\n",
            "both.py": "from both_too import V\ndef f():\n    return V\n",
            "both/__init__.py": "",
            "both_too.py": "V = 7\n",
            "r.py": "import json, datasets\ndef f():\n    return json.dumps(1), datasets.__file__ is not None\n",
            "dotted.name-1.py": "import both_too\ndef f():\n    return both_too.V\n",
        },
    )
    found = {name: load_code(f"{tmp_path}/{name}.py:f")() for name in ("math", "yaml", "both", "r", "dotted.name-1")}
    assert found == {"math": True, "yaml": 1, "both": 7, "r": ("1", True), "dotted.name-1": 7}


def test_errors_name_the_line_and_the_way_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "helper.py": "",
            "named.py": "import importlib\nimportlib.import_module('helper')\n",
            "beyond.py": "from .. import sources\n",
            "wrong.py": "import helper\n1 / 0\n",
        },
    )
    for name, said in {
        "named": r"helper lies in .* use an import statement, or .*\(\"\.helper\", __package__\) \(named\.py:2\)",
        "beyond": r"beyond the folder of the file that the recipe names \(beyond\.py:1\)",
        "wrong": r"division by zero \(wrong\.py:2\)",
    }.items():
        with pytest.raises(StageError, match=said):
            load_named("reward", f"{tmp_path}/{name}.py:f")
