"""Fixtures of the recipe and plan tests."""

from tests.flows.asked_runs import asked  # noqa: F401
from tests.flows.recipe_stages import fake_stages, model_folder, write_recipe  # noqa: F401
