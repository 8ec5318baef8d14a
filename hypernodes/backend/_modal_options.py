"""What a ModalBackend may be given: checked here, since Modal's client drops some of what it does not understand."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from hypernodes._node import checked_count
from hypernodes.backend._sizes import mebibytes
from hypernodes.errors import DefinitionError, quoted

_MOST_SECONDS = 86_400
_MOST_IDLE_S = 3_600
_GPU = re.compile(r"[A-Za-z][\w-]*!?(:[1-9]\d*)?")
_OF_THE_APP = ("gpu", "cpu", "memory", "timeout", "secrets", "min_containers", "scaledown_window")
_DEFAULTS = {"timeout": 3600}


def function_options(
    modal: Any,
    *,
    gpu: str | list[str] | None,
    cpu: float | None,
    memory: int | str | None,
    timeout: float,
    secrets: Collection[Any] | None,
    max_containers: int | None,
    keep_warm: int | None,
    scaledown_window: float | None,
) -> dict[str, Any]:
    """Return the options of an app's function, as Modal's client takes them.

    Raises:
        DefinitionError: one is not what it must be.
    """
    most = checked_count(max_containers, "max_containers", "ModalBackend")
    warm = checked_count(keep_warm, "keep_warm", "ModalBackend")
    if most is not None and warm is not None and warm > most:
        raise DefinitionError(f"keep_warm={warm} of ModalBackend is more than its max_containers={most}")
    return {
        "gpu": _checked_gpu(gpu),
        "cpu": _checked_cpu(cpu),
        "memory": None if memory is None else mebibytes(memory, "memory"),
        "timeout": _checked_timeout(timeout),
        "secrets": [checked(each, modal.Secret, "secrets", "modal.Secret.from_name(...)") for each in secrets or ()],
        "max_containers": most,
        "min_containers": warm,
        "scaledown_window": _checked_window(scaledown_window),
    }


def refuse_beside_deployed(deployed: Any, image: Any, options: Mapping[str, Any]) -> None:
    """Raise an error for a name of a deployed app that is none, or for options given that such an app has already."""
    if not isinstance(deployed, str) or not deployed:
        raise DefinitionError(f"deployed of ModalBackend is the name of an app, not {deployed!r}")
    said = ["image"] if image is not None else []
    said += [name for name in _OF_THE_APP if options[name] and options[name] != _DEFAULTS.get(name)]
    if said:
        raise DefinitionError(
            f"a deployed app has its own {quoted(said)}: give them to the ModalBackend that deploys it, and only "
            f"its name here"
        )


def checked(value: Any, kind: type, option: str, example: str) -> Any:
    """Return one of Modal's objects, when it is of that kind."""
    if isinstance(value, kind):
        return value
    raise DefinitionError(f"{option} of ModalBackend takes a modal.{kind.__name__}, such as {example}, not {value!r}")


def checked_name(value: Any, option: str) -> str:
    """Return the name of something on Modal."""
    if isinstance(value, str) and value:
        return value
    raise DefinitionError(f"{option} of ModalBackend is a name, not {value!r}")


def checked_volumes(volumes: Any, modal: Any) -> dict[str, Any]:
    """Return the volumes by the absolute paths where they are mounted."""
    if not isinstance(volumes, Mapping):
        raise DefinitionError(f"volumes of ModalBackend is a dict of paths and modal.Volume, not {volumes!r}")
    for path, volume in volumes.items():
        if not isinstance(path, str) or not PurePosixPath(path).is_absolute():
            raise DefinitionError(f"volumes of ModalBackend: {path!r} is not an absolute path in the container")
        if not PurePosixPath(path).name:
            raise DefinitionError("volumes of ModalBackend: nothing can be mounted at the root; take a path below it")
        checked(volume, modal.Volume, f"volumes[{path!r}]", "modal.Volume.from_name(...)")
    return dict(volumes)


def _checked_gpu(gpu: Any) -> Any:
    several = list(gpu) if isinstance(gpu, list | tuple) else [gpu]
    if gpu is None or (several and all(isinstance(each, str) and _GPU.fullmatch(each) for each in several)):
        return gpu if gpu is None or isinstance(gpu, str) else several
    raise DefinitionError(f'gpu of ModalBackend is a type such as "A100" or "H100:2", or a list of them, not {gpu!r}')


def _checked_cpu(cpu: Any) -> float | None:
    if cpu is None or (isinstance(cpu, int | float) and not isinstance(cpu, bool) and 0 < cpu < math.inf):
        return cpu
    raise DefinitionError(f"cpu of ModalBackend is a number of cores above 0, not {cpu!r}")


def _checked_timeout(timeout: Any) -> int:
    if isinstance(timeout, int | float) and not isinstance(timeout, bool) and 1 <= timeout <= _MOST_SECONDS:
        return math.ceil(timeout)
    raise DefinitionError(f"timeout of ModalBackend is 1 to {_MOST_SECONDS:,} seconds (a day), not {timeout!r}")


def _checked_window(seconds: Any) -> int | None:
    if seconds is None:
        return None
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 2 <= seconds <= _MOST_IDLE_S:
        return math.ceil(seconds)
    raise DefinitionError(f"scaledown_window of ModalBackend is 2 to {_MOST_IDLE_S:,} seconds, not {seconds!r}")
