"""Chat templates of multimodal models: some read a message's content as a list of parts, and write nothing of a text.

Rows here hold texts. Such a template gets a beginning that makes one part of each, so that no text is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stages.data.template_limits import check_template

_READS_TYPES = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b""")
_BEGINNING = (
    "{%- set in_parts = namespace(messages=[]) %}"
    "{%- for message in messages %}{%- if message['content'] is string %}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message['content']}]) %}{%- endif %}"
    "{%- set in_parts.messages = in_parts.messages + [message] %}{%- endfor %}"
    "{%- set messages = in_parts.messages %}{{- '' }}"  # an expression: what follows a block loses its line's end
)
_TEXT = "what was said"


def of_texts(template: str, special_tokens: Mapping[str, Any]) -> str:
    """The template, for messages whose content is a text: with a beginning where it would not show the text itself and
    shows it in a part. Raises DataError for one that never ends or fills the memory."""
    if not _READS_TYPES.search(template):
        return template
    check_template(template)
    if _shows(template, special_tokens) or not _shows(_BEGINNING + template, special_tokens):
        return template
    return _BEGINNING + template


def _shows(template: str, special_tokens: Mapping[str, Any]) -> bool:
    from transformers.utils.chat_template_utils import render_jinja_template

    message = {"role": "user", "content": _TEXT}
    try:
        rendered: Any = render_jinja_template(conversations=[[message]], chat_template=template, **special_tokens)
    except Exception:  # the template is a program of somebody else
        return False
    return _TEXT in rendered[0][0]
