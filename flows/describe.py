"""A stage as `posttrain stages NAME` describes it: fields, inputs, outputs, as JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from flows.fields import field_rows
from stages.stage import Stage


def describe_stage(stage: Stage) -> dict[str, Any]:
    """What a recipe may say of this stage, and what it writes."""
    return {
        "name": stage.name,
        "version": stage.version,
        "summary": stage.summary,
        "fields": [dataclasses.asdict(row) for row in field_rows(stage.config)],
        "inputs": {
            name: {"kinds": list(declared.kinds), "required": declared.required, "many": declared.many}
            for name, declared in stage.inputs.items()
        },
        "outputs": dict(stage.outputs),
        "main_metric": stage.main_metric,
    }
