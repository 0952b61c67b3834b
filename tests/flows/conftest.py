"""Fixtures that several files of tests share."""

from tests.flows.asked_runs import asked  # noqa: F401
from tests.flows.prefect_server import api, prefect_home, server, world  # noqa: F401
from tests.flows.recipe_stages import fake_stages, model_folder, write_recipe  # noqa: F401
