"""Whether an environment holds a token for the Hub: asked when a stage that writes there is planned, since the push
comes after all the training. The token itself is looked at for its characters alone, and never said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_EXCHANGED = "HF_OIDC_RESOURCE"
"""Where it is set, the client gets itself a token of short life (Trusted Publishers)."""


def lacking_token(environment: Mapping[str, str]) -> str | None:
    """What is wrong; None: the client will find a token there, in its order (`huggingface_hub.get_token`)."""
    if environment.get(_EXCHANGED):
        return None
    for name in _VARIABLES:
        if token := environment.get(name, "").strip():
            usable = token.isascii() and token.isprintable() and " " not in token
            return None if usable else f"{name} holds characters that no token has; set it again"
    path = _token_file(environment)
    try:
        if path.read_text(encoding="utf-8").strip():
            return None
    except (OSError, UnicodeDecodeError):
        pass  # none, or none that this user may read
    return (
        "needs a token that may write to the Hub, and there is none where this stage will run: HF_TOKEN is not set, "
        f"and {path} holds none; set HF_TOKEN, or `hf auth login`"
    )


def _token_file(environment: Mapping[str, str]) -> Path:
    """Where `hf auth login` puts it (`huggingface_hub.constants.HF_TOKEN_PATH`)."""
    if path := environment.get("HF_TOKEN_PATH"):
        return _place(path)
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return _place(environment.get("HF_HOME") or os.path.join(caches, "huggingface")) / "token"


def _place(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))
