"""``strict_types``: can what a node returns be what its consumer asks for? Decided by beartype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from hypernodes._node import annotation_text
from hypernodes._plan import ExecutionPlan, PlanStep
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
            made, asked = producer.output_type(name), needed.annotation
            if isinstance(step, PlanStep) and step.map is not None and name in step.map.over:
                # A map takes whatever gives items, not only the list that `inputs` shows.
                asked = Iterable[get_args(asked)[0]]  # type: ignore[misc]
            if Any in (made, asked):
                continue
            try:
                # beartype knows no relation between tuple[T, ...] and Sequence[T].
                fits = is_subhint(made, asked) or is_subhint(_as_sequence(made), asked)
            except BeartypeException as error:
                raise DefinitionError(
                    f"strict_types cannot compare the annotations of {name!r}, {annotation_text(made)} and "
                    f"{annotation_text(asked)}: {error}"
                ) from error
            if not fits:
                raise TypeMismatchError(
                    f"{producer.name!r} makes {name!r} as {annotation_text(made)}, "
                    f"but {step.name!r} asks for {annotation_text(asked)}"
                )


def _as_sequence(hint: Any) -> Any:
    args = get_args(hint)
    uniform = get_origin(hint) is tuple and len(args) == 2 and args[1] is ...
    return Sequence[args[0]] if uniform else hint  # type: ignore[valid-type]
