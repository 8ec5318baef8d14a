"""``@node``: a plain function, with the names of what it needs and makes."""

from __future__ import annotations

import functools
import inspect
import keyword
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

from hypernodes._retry import RetryPolicy
from hypernodes.errors import DefinitionError, quoted

P = ParamSpec("P")
R = TypeVar("R")

RunIn = Literal["auto", "loop", "thread", "process"]
Kind = Literal["sync", "async", "generator", "async_generator"]
_RUN_IN = typing.get_args(RunIn)
_OPTIONS = ("run_in", "max_concurrency", "limit", "timeout", "retry", "cache", "keep", "version", "depends_on")

REQUIRED: Any = inspect.Parameter.empty
_KIND_BY_FLAGS: dict[int, Kind] = {
    inspect.CO_ASYNC_GENERATOR: "async_generator",
    inspect.CO_GENERATOR: "generator",
    inspect.CO_COROUTINE: "async",
}


@dataclass(frozen=True, slots=True)
class Input:
    """One input by name: its annotation (``Any`` when there is none) and its default, if it is optional."""

    name: str
    annotation: Any = Any
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return self.default is REQUIRED

    def __repr__(self) -> str:
        default = "" if self.required else f" = {self.default!r}"
        return f"{self.name}: {annotation_text(self.annotation)}{default}"


class Node(Generic[P, R]):
    """A function on single items with the names of its inputs and outputs; made by :func:`node`.

    Still callable as the plain function. Immutable; safe to use in many pipelines at once.
    """

    def __init__(
        self,
        func: Callable[P, R],
        output_name: str | tuple[str, ...],
        *,
        run_in: RunIn = "auto",
        max_concurrency: int | None = None,
        limit: str | None = None,
        timeout: float | None = None,
        retry: int | RetryPolicy | None = None,
        cache: bool = True,
        keep: Literal["process"] | None = None,
        version: Any = None,
        depends_on: Iterable[Any] = (),
    ) -> None:
        if isinstance(func, Node):
            func = func.func
        if not callable(func):
            raise DefinitionError(f"@node decorates a function; {func!r} is not callable")
        name = function_name(func)
        signature = _signature(func, name)
        kind = _kind(func)
        outputs = _output_names(output_name, name)
        self.__dict__.update(
            func=func,
            __doc__=func.__doc__,
            name=name,
            output_name=output_name,
            outputs=outputs,
            _signature=signature,
            kind=kind,
            run_in=_checked_run_in(run_in, kind, name),
            max_concurrency=checked_count(max_concurrency, "max_concurrency", name),
            limit=_checked_limit(limit, name),
            timeout=checked_seconds(timeout, name),
            retry=RetryPolicy.of(retry, name),
            cache=_checked_cache(cache, name),
            keep=_checked_keep(keep, name),
            version=version,
            depends_on=_checked_depends_on(depends_on, name),
        )
        clash = signature.parameters.keys() & outputs
        if clash:
            raise DefinitionError(
                f"node {name!r} both needs and makes {quoted(sorted(clash))}: give its output another name"
            )

    func: Callable[P, R]
    name: str
    output_name: str | tuple[str, ...]
    outputs: tuple[str, ...]
    kind: Kind
    run_in: RunIn
    max_concurrency: int | None
    limit: str | None
    timeout: float | None
    retry: RetryPolicy | None
    cache: bool
    keep: Literal["process"] | None
    version: Any
    depends_on: tuple[Any, ...]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function, as if it had never been decorated."""
        return self.func(*args, **kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"node {self.name!r} is immutable: decorate the function again to change {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"node {self.name!r} is immutable")

    def __get__(self, instance: object, owner: type | None = None) -> Node[..., R]:
        """Bind to an instance when a node is defined in a class body, as a function would."""
        if instance is None or not isinstance(self.func, types.FunctionType):
            return self
        return Node(self.func.__get__(instance, owner), self.output_name, **self._options())

    def _options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _OPTIONS}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.func, self.output_name, self._options())

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What it needs, by name, with annotations resolved."""
        hints = _annotations(self.func)
        return types.MappingProxyType(
            {name: Input(name, hints.get(name, Any), each.default) for name, each in self.parameters.items()}
        )

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The function's parameters, in order."""
        return self._signature.parameters  # type: ignore[attr-defined,no-any-return]

    @property
    def returns(self) -> Any:
        """The return annotation, resolved; ``Any`` when there is none."""
        return _annotations(self.func).get("return", Any)

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __wrapped__(self) -> Callable[P, R]:
        return self.func

    def __repr__(self) -> str:
        kind = "" if self.kind == "sync" else f"{self.kind.replace('_', ' ')} "
        return f"<{kind}node {self.name}({', '.join(self.parameters)}) -> {', '.join(self.outputs)}>"


def _rebuild(func: Callable[..., Any], output_name: str | tuple[str, ...], options: dict[str, Any]) -> Node[..., Any]:
    return Node(func, output_name, **options)


class _Decorator:
    """What ``node("output")`` gives: applied to a function it makes the node."""

    __slots__ = ("_options", "_output_name")

    def __init__(self, output_name: str | tuple[str, ...], options: dict[str, Any]) -> None:
        self._output_name = output_name
        self._options = options

    def __call__(self, func: Callable[P, R]) -> Node[P, R]:
        return Node(func, self._output_name, **self._options)


@overload
def node(
    output_name: str | tuple[str, ...],
    *,
    run_in: RunIn = ...,
    max_concurrency: int | None = ...,
    limit: str | None = ...,
    timeout: float | None = ...,
    retry: int | RetryPolicy | None = ...,
    cache: bool = ...,
    keep: Literal["process"] | None = ...,
    version: Any = ...,
    depends_on: Iterable[Any] = ...,
) -> _Decorator: ...
@overload
def node(output_name: Callable[..., Any]) -> typing.NoReturn: ...
def node(output_name: Any, **options: Any) -> Any:  # noqa: D417 - the options are those of the overload
    """Turn a function into a node whose parameters are inputs, by name.

    Args:
        output_name: the name of what it returns, or a tuple of names for a function that returns a tuple
            of that length.
        run_in: where a sync function runs: ``"loop"``, ``"thread"``, ``"process"``, or ``"auto"``: in a
            worker thread until it has proved cheap (under 100 microseconds), then on the event loop, and
            back in a thread as soon as it is slow.
        max_concurrency: how many calls of this node may run at once within one run, over all items.
        limit: the name of a bound shared with other nodes, set by ``Pipeline(limits={name: count})``.
        timeout: seconds that one attempt may take; then :class:`~hypernodes.NodeTimeoutError`. A function
            in a thread cannot be stopped by Python: it runs on, unheard; one in a process is killed.
        retry: attempts in all (an int), or a :class:`~hypernodes.RetryPolicy`.
        cache: False for a function that must run each time, where the pipeline has a cache.
        keep: ``"process"`` for an object that is dear to make and no data, such as a model, an index or a client: it is
            made once in a process, or in a warm container, for each version of the function and each of its inputs,
            and handed to every run that needs it. It is never written to a cache, and what is made with it is found
            there by this function and its inputs. It must bear being used by several runs at once.
        version: part of its signature in a cache, such as the version of a model that it calls.
        depends_on: what else its result depends on: paths of files or folders (by what is in them), functions,
            values.

    The function may be ``def``, ``async def``, a generator or an async generator (its output is the list
    of what it yields), a ``functools.partial``, a bound method or a callable object.

    Raises:
        DefinitionError: for ``*args``, ``**kwargs``, positional-only parameters or a bad option.

    >>> @node("cleaned")
    ... def clean(text: str) -> str:
    ...     return text.strip().lower()
    >>> clean("  Shalom ")
    'shalom'
    >>> clean
    <node clean(text) -> cleaned>
    """
    if callable(output_name):
        raise DefinitionError(
            f'@node needs the name of the output: write @node("name") above {function_name(output_name)!r}'
        )
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise TypeError(f"node() got an unexpected keyword argument {min(unknown)!r}")
    _output_names(output_name, None)
    return _Decorator(output_name, options)


def function_name(func: Any) -> str:
    """Return the name of a function, of the function inside a partial, or of a callable object's class."""
    while isinstance(func, functools.partial):
        func = func.func
    name = getattr(func, "__name__", None)
    return name if isinstance(name, str) else type(func).__name__


def annotation_text(annotation: Any) -> str:
    """Return an annotation as a person would write it."""
    if annotation is Any:
        return "Any"
    return annotation.__qualname__ if type(annotation) is type else inspect.formatannotation(annotation)


def checked_count(value: int | None, option: str, name: str | None) -> int | None:
    """Return a whole number of at least 1, or None."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise DefinitionError(f"{option} of {name!r} must be a whole number of at least 1 or None, not {value!r}")


def checked_seconds(value: float | None, name: str | None) -> float | None:
    """Return a positive number of seconds, or None."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        return value
    raise DefinitionError(f"timeout of {name!r} must be a number of seconds above 0 or None, not {value!r}")


def _checked_run_in(run_in: RunIn, kind: Kind, name: str) -> RunIn:
    if run_in not in _RUN_IN:
        raise DefinitionError(f"run_in of {name!r} must be one of {quoted(_RUN_IN)}, not {run_in!r}")
    if kind in ("async", "async_generator") and run_in in ("thread", "process"):
        raise DefinitionError(
            f"{name!r} is async, so it runs on the event loop: run_in={run_in!r} is for sync functions"
        )
    return run_in


def _checked_limit(limit: str | None, name: str) -> str | None:
    if limit is None or (isinstance(limit, str) and limit):
        return limit
    raise DefinitionError(f"limit of {name!r} is the name of a shared bound, a str, not {limit!r}")


def _checked_keep(keep: Any, name: str) -> Literal["process"] | None:
    if keep in ("process", None):
        return keep  # type: ignore[no-any-return]
    raise DefinitionError(f"keep of {name!r} must be 'process' or None, not {keep!r}")


def _checked_cache(cache: bool, name: str) -> bool:
    if isinstance(cache, bool):
        return cache
    raise DefinitionError(
        f"cache of node {name!r} is True or False, not {cache!r}: where to keep results is said by Pipeline(cache=...)"
    )


def _checked_depends_on(depends_on: Any, name: str) -> tuple[Any, ...]:
    if isinstance(depends_on, str | bytes) or not isinstance(depends_on, Iterable):
        raise DefinitionError(f"depends_on of node {name!r} is a list: write [{depends_on!r}]")
    return tuple(depends_on)


def _output_names(output_name: Any, name: str | None) -> tuple[str, ...]:
    owner = f"node {name!r}" if name else "@node"
    names = output_name if isinstance(output_name, tuple) else (output_name,)
    if not names:
        raise DefinitionError(f"{owner} names no output: give a str or a tuple of str")
    for each in names:
        if not isinstance(each, str) or not each.isidentifier():
            raise DefinitionError(f"{owner}: an output name must be a valid Python identifier, not {each!r}")
        if keyword.iskeyword(each):
            raise DefinitionError(
                f"{owner}: {each!r} is a Python keyword, which no parameter can be called: name it {each + '_'!r}"
            )
    if len(set(names)) < len(names):
        raise DefinitionError(f"{owner} names the same output twice: {quoted(names)}")
    return names


def _kind(func: Callable[..., Any]) -> Kind:
    if type(func) is types.FunctionType and not func.__dict__:
        # What `inspect` finds out, for the most common case at a tenth of the time.
        flags = func.__code__.co_flags & (inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR | inspect.CO_COROUTINE)
        return _KIND_BY_FLAGS.get(flags, "sync")
    while isinstance(func, functools.partial):
        func = func.func
    target = func if inspect.isroutine(func) or isinstance(func, type) else getattr(func, "__call__", func)  # noqa: B004 - the bound method is what is inspected
    if inspect.isasyncgenfunction(target):
        return "async_generator"
    if inspect.isgeneratorfunction(target):
        return "generator"
    # The object itself may say so too: a mock of an async function, or one marked as such.
    return "async" if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(func) else "sync"


def _signature(func: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        signature = inspect.signature(func)
    except (ValueError, TypeError) as error:
        raise DefinitionError(
            f"{name!r} has no signature that Python can read ({error}): wrap it in a function with named parameters"
        ) from error
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise DefinitionError(
                f"node {name!r} takes {parameter}: inputs are matched by name, so every parameter must be "
                f"named; list them, or take one dict or list as an input"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise DefinitionError(
                f"node {name!r} has the positional-only parameter {parameter.name!r}: inputs are matched by "
                f"name; remove the '/' or wrap it in a function with named parameters"
            )
    return signature


def _annotations(func: Callable[..., Any]) -> dict[str, Any]:
    """Return the resolved annotations."""
    while isinstance(func, functools.partial):
        func = func.func
    target: Any = func
    if isinstance(func, type):
        target = func.__init__  # type: ignore[misc]  # only its annotations are read
    elif not inspect.isroutine(func):
        target = type(func).__call__
    try:
        return typing.get_type_hints(target)
    except Exception:  # noqa: BLE001 - annotations are the user's own code and may raise anything
        written = getattr(target, "__annotations__", {})
        return {name: _resolved(target, name, each) for name, each in written.items()}


def _resolved(target: Any, name: str, annotation: Any) -> Any:
    """Return one annotation resolved; Any when it names nothing at run time, as under TYPE_CHECKING."""
    alone = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        return typing.get_type_hints(alone, getattr(target, "__globals__", {}))[name]
    except Exception:  # noqa: BLE001 - as above
        return Any
