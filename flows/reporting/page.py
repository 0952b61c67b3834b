"""A page: one self-contained HTML file that needs no network and no server.

Its Content-Security-Policy allows nothing but the page's own style and script, which are named by hash; whatever
comes from data or models is text (Jinja2 escapes it).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from artifacts import RequestError, scrub
from artifacts.sealed import SHORTEST_SECRET
from flows.reporting import text
from stages.visible import visible


def render(template: str, **values: Any) -> str:
    """The page that a template of `report_assets` makes of the values."""
    style, script = _asset("style.css"), _asset("script.js")
    page = environment().get_template(template)
    return page.render(**values, style=style, script=script, policy=_policy(style, script))


def write(page: str, output: Path) -> None:
    """Writes it whole or not at all. Raises RequestError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(temporary, 0o644)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RequestError(f"the report cannot be written to {output}: {error.strerror}") from error


@cache
def environment() -> Environment:
    """In which templates become pages: every text in it is shown as text, without secrets."""
    made = Environment(
        loader=PackageLoader("flows", "report_assets"),
        autoescape=True,
        finalize=_as_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(number=text.number, duration=text.duration, short=text.short, moment=text.moment)
    return made


def _as_shown(value: Any) -> Any:
    """Every text that the page shows, before it is escaped; Markup is what templates made of such texts.

    Shorter ones hold neither a secret nor a URL with a password.
    """
    if type(value) is not str:
        return value
    return visible(scrub(value) if len(value) >= SHORTEST_SECRET else value)


def _asset(name: str) -> str:
    return resources.files("flows").joinpath("report_assets", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Only this style and this script; no connection, image, frame, form or base address."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
