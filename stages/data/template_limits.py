"""A chat template is a program of whoever made the model: one that fills the memory or never ends is refused unused.

transformers renders templates in Jinja's sandbox, which keeps them from Python's objects, but not from writing a
gigabyte or looping for days. So before its first use a template renders one small exchange in a process of its own,
with bounded memory, time and output.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from typing import Any

from artifacts.errors import DataError

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 10
OUTPUT_CHARACTERS = 4 << 20
"""A template's text of an exchange of a few words; real ones stay below a few thousand."""

_EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_TOO_LONG, _TOO_LARGE = 3, 4


@functools.cache
def check_template(template: str) -> None:
    """Raises DataError for a template that does not render an exchange of two messages within the limits above.

    A template that refuses the exchange is left to the rows, which it may take.
    """
    probe = subprocess.run(
        [sys.executable, "-m", "stages.data.template_limits"],
        input=json.dumps(template).encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60 * CPU_SECONDS,
        check=False,
    )
    reasons = {
        _TOO_LONG: f"it writes more than {OUTPUT_CHARACTERS:,} characters",
        _TOO_LARGE: f"it takes more than {MEMORY_BYTES >> 20} MiB of memory",
    }
    killed = f"it takes more than {CPU_SECONDS} s of processor time" if probe.returncode < 0 else None
    reason = reasons.get(probe.returncode, killed)
    if reason is not None:
        raise DataError(
            f"the chat template is refused: of an exchange of two one-letter messages {reason}; give the model "
            f"another template (tokenizer_config.json or chat_template.jinja of its folder)"
        )


def _render(template: str) -> int:
    """Status of the process: 0, or which limit was met. What else a template does wrong shows where it is used."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} as its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
    try:
        pieces = environment.from_string(template).generate(messages=_EXCHANGE, add_generation_prompt=True)
        length = 0
        for piece in pieces:
            length += len(piece)
            if length > OUTPUT_CHARACTERS:
                return _TOO_LONG
    except MemoryError:
        return _TOO_LARGE
    except Exception:  # the template's own
        return 0
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    sys.exit(_render(json.load(sys.stdin)))
