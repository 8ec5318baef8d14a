"""``strict_types``: can what a node returns be what its consumer asks for? Decided by beartype."""

from __future__ import annotations

from typing import Any

from hypernodes._node import annotation_text
from hypernodes._plan import ExecutionPlan
from hypernodes.errors import DefinitionError, TypeMismatchError


def check_types(plan: ExecutionPlan) -> None:
    """Check each producer's annotation against each consumer's.

    Raises:
        TypeMismatchError: the first pair that does not fit.
        DefinitionError: beartype is not installed.
    """
    try:
        from beartype.door import is_subhint
        from beartype.roar import BeartypeException
    except ImportError as error:
        raise DefinitionError("strict_types=True needs beartype: pip install 'hypernodes[types]'") from error
    for step in plan.steps:
        for name, needed in step.typed_inputs().items():
            producer = plan.producers.get(name)
            if producer is None:
                continue
            made = producer.output_type(name)
            if Any in (made, needed.annotation):
                continue
            try:
                fits = is_subhint(made, needed.annotation)
            except BeartypeException as error:
                raise DefinitionError(
                    f"strict_types cannot compare the annotations of {name!r}, {annotation_text(made)} and "
                    f"{annotation_text(needed.annotation)}: {error}"
                ) from error
            if not fits:
                raise TypeMismatchError(
                    f"{producer.name!r} makes {name!r} as {annotation_text(made)}, "
                    f"but {step.name!r} asks for {annotation_text(needed.annotation)}"
                )
