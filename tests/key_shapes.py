"""Texts that look like somebody's key, whoever planted it: well-known shapes, each by its own marks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

SHAPES = {
    "AWS access key": rb"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{82})\b",
    "GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20}\b",
    "Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z]{34}\b",
    "OpenAI key": rb"\bsk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20,}",
    "Anthropic key": rb"\bsk-ant-[a-z0-9]+-[A-Za-z0-9_-]{80,}",
    "Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "Slack webhook": rb"hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9+/]{40,}",
    "Google API key": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "Google client secret": rb"\bGOCSPX-[A-Za-z0-9_-]{28}\b",
    "Stripe key": rb"\b[rs]k_(?:live|test|prod)_[A-Za-z0-9]{10,99}\b",
    "npm token": rb"\bnpm_[A-Za-z0-9]{36}\b",
    "PyPI token": rb"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}",
    "Prefect key": rb"\bpn[ub]_[A-Za-z0-9]{36}\b",
    "private key": rb"-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----",
    "JSON web token": rb"\bey[A-Za-z0-9]{17,}\.ey[A-Za-z0-9/_-]{17,}\.[A-Za-z0-9/_-]{10,}",
    "Azure storage key": rb"AccountKey=[A-Za-z0-9+/]{86}==",
    "signed URL": rb"[?&]X-Amz-(?:Signature|Credential|Security-Token)=[A-Za-z0-9%/+]{16,}",
    "password in a URL": rb"[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"<>{}*]{1,100}:[^\s/:@'\"<>{}*]{3,100}@[^\s/:@'\"<>]{1,255}",
    "authorization": rb"(?i)\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)\s+[A-Za-z0-9._~+/=-]{12,}",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in SHAPES.items()}


def key_shapes(content: bytes) -> Iterator[str]:
    """`GitHub token: ghp_abc...` for each that is found."""
    for name, pattern in _COMPILED.items():
        for found in pattern.finditer(content):
            yield f"{name}: {found[0][:24].decode(errors='replace')}..."


def key_shapes_below(folder: Path) -> list[str]:
    """`file: kind: beginning` of all that looks like a key in the files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [f"{path.relative_to(folder)}: {found}" for path in sorted(files) for found in key_shapes(path.read_bytes())]
