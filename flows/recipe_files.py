"""Where recipes are: files, and those that come with the package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from artifacts.errors import RequestError
from stages.names import nearest

SHIPPED = Path(__file__).parent / "recipes"


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe. Raises RequestError naming the nearest shipped recipe."""
    text, path, shipped = str(path_or_name), Path(path_or_name).expanduser(), shipped_recipes()
    if path.is_file():
        return path
    if text in shipped:
        return shipped[text]
    known = f"shipped recipes are: {', '.join(shipped) or 'none'}"
    if path.is_dir():
        raise RequestError(f"{text} is a folder; give the recipe's YAML file; {known}")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RequestError(f"no such recipe file: {text}{_meant(path, shipped)}; {known}")
    raise RequestError(f"no recipe {text!r}{_meant(path, shipped)}; give a YAML file; {known}")


def _meant(path: Path, shipped: Iterable[str]) -> str:
    """The file beside it whose name is nearest, or a shipped recipe."""
    beside = [file for ending in ("*.yaml", "*.yml") for file in sorted(path.parent.glob(ending))]
    same = [file for file in beside if file.stem == path.stem]
    close = f"; did you mean {str(same[0])!r}?" if same else nearest(str(path), map(str, beside))
    return close or nearest(path.stem, shipped)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
