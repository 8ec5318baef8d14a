"""A pipeline as a small HTML table, for notebooks. Every name is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from hypernodes._node import annotation_text
from hypernodes._plan import CallStep, PlanStep, Step

if TYPE_CHECKING:
    from hypernodes._definition import PipelineDefinition

_CELL = 'style="text-align:left"'


def pipeline_table(pipeline: PipelineDefinition) -> str:
    """Return the steps of a pipeline, in the order in which they run, as an HTML table."""
    inputs = ", ".join(map(repr, pipeline.inputs.values()))
    rows = "".join(_row(step) for step in pipeline.plan.steps)
    head = "".join(f"<th {_CELL}>{title}</th>" for title in ("step", "kind", "needs", "makes"))
    return (
        f"<table><caption {_CELL}><b>{escape(pipeline.plan.name)}</b>({escape(inputs)})</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(step: Step) -> str:
    makes = ", ".join(f"{name}: {_text(step.output_type(name))}" for name in step.outputs)
    cells = (step.name, _kind(step), ", ".join(step.inputs), makes)
    return "<tr>" + "".join(f"<td {_CELL}>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _kind(step: Step) -> str:
    match step:
        case CallStep():
            return step.node.kind.replace("_", " ")
        case PlanStep(map=None):
            return f"pipeline of {len(step.plan.steps)} nodes"
        case PlanStep():
            assert step.map is not None
            return f"pipeline of {len(step.plan.steps)} nodes, mapped over {', '.join(step.map.over)}"


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else annotation_text(annotation)
