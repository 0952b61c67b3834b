"""Prefect's API for the commands: `with api(url) as client`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import prefect.settings
from prefect.client.orchestration import SyncPrefectClient, get_client

from artifacts.errors import RequestError


@contextlib.contextmanager
def api(url: str) -> Iterator[SyncPrefectClient]:
    """A client of the API at `url`. Raises RequestError for what the API refuses or does not answer."""
    with prefect.settings.temporary_settings({prefect.settings.PREFECT_API_URL: url}):
        try:
            with get_client(sync_client=True) as client:
                yield client
        except httpx.HTTPStatusError as error:
            said = error.response.text[:500]
            raise RequestError(f"Prefect's API at {url} refused: HTTP {error.response.status_code}: {said}") from error
        except httpx.HTTPError as error:
            raise RequestError(f"Prefect's API at {url} failed: {type(error).__name__}: {error}") from error
