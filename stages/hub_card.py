"""The page of a Hub repository (`README.md`) that a push writes where nobody wrote one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from stages.hub_parts import MODEL, Part

README = "README.md"

_SPLIT = r"  - split: \w+\n    path: data/\w+-\*\n"
_GENERATED = re.compile(
    r"---\n(library_name: \w+\n)?tags:\n- posttrain\n"
    rf"(configs:\n- config_name: default\n  data_files:\n({_SPLIT})+)?---\n\n"
    r"# [\w.-]+\n(\nMade by posttrain: \w+ `[^`\n]+`(, split \w+)?\.\n)+",
    re.ASCII,
)


def card(repo: str, part: Part, others: Mapping[str, str]) -> bytes:
    """The page of a repository that has this part and, of a dataset, `others`: split -> digest of its artifact."""
    name = repo.partition("/")[2]
    if part.kind == "model":
        library = "peft" if part.is_adapter else "transformers"
        header, made = f"library_name: {library}\ntags:\n- posttrain\n", _made("model", part.digest)
    else:
        splits = dict(sorted({**others, part.name: part.digest}.items()))
        header = "tags:\n- posttrain\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: data/{split}-*\n" for split in splits
        )
        made = "".join(_made("dataset", digest, split) for split, digest in splits.items())
    return f"---\n{header}---\n\n# {name}\n{made}".encode()


def is_generated(content: bytes) -> bool:
    """Whether a page is one that a push made and nobody edited."""
    try:
        return _GENERATED.fullmatch(content.decode()) is not None
    except UnicodeDecodeError:
        return False


def _made(kind: str, digest: str, split: str = MODEL) -> str:
    return f"\nMade by posttrain: {kind} `{digest}`{'' if split == MODEL else f', split {split}'}.\n"
