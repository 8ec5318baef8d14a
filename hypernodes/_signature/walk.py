"""The walk from a function through all that its result depends on."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from hypernodes._node import Node, node
from hypernodes._signature.captured import MUTATING_METHODS, Chain, Import, names_in
from hypernodes._signature.captures import Captures, joined
from hypernodes._signature.code import code_of
from hypernodes._signature.dependencies import hash_dependencies
from hypernodes._signature.foreign import (
    held_by_compiled,
    held_in_closure,
    held_in_object,
    home_of,
    is_foreign,
)
from hypernodes._signature.members import (
    ABSENT,
    data_of,
    functions_of,
    is_generated,
    is_own,
    makes_classes,
)
from hypernodes._signature.origin import class_module, foreign_class, foreign_parts, module_name
from hypernodes._signature.scope import asked_for, builtins_of, cells_of, content_of, import_for, module_of, resolve
from hypernodes._signature.values import hash_value

_BUILTINS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
_C_ATTRIBUTES = (types.GetSetDescriptorType, types.MemberDescriptorType)
_DESCRIBING = frozenset(
    [
        "__annotations__",
        "__doc__",
        "get_annotations",
        "get_type_hints",
        "getdoc",
        "getfullargspec",
        "model_json_schema",
        "signature",
    ]
)
"""What code names that reads docstrings and annotations, so that these are more than comments."""


class Walk(Captures):
    """Follows code breadth first, in an order that depends on nothing but the code."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[tuple[object, ...], str] = {}
        self._taken: defaultdict[str, int] = defaultdict(int)
        self._waiting: deque[tuple[str, Callable[[str], None]]] = deque()
        self._kept: list[Any] = []  # what the walk itself made: an address names it only while it lives
        self._bound: set[tuple[object, ...]] = set()
        self._code: dict[str, list[FunctionType | type]] = defaultdict(list)  # that has been followed, by part
        self._told: set[int] = set()  # functions held as data, whose docstrings may be sent to a model

    def enter(self, func: Any) -> str:
        """Start from a function; return what it is called."""
        name = self._reference(func)
        if name is None:
            self._state.mentioned.add("__call__")
            name = f"object of {self._class(type(func))}"
            self._capture(name, func)
        return name

    def finish(self) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """Follow everything; return the digest of every part, and what counts by its class."""
        done = -1
        while done < len(self._captured) or self._waiting:
            while self._waiting:
                part, follow = self._waiting.popleft()
                with self._whatever_it_is(part):
                    follow(part)
            done = len(self._captured)
            for each in self._captured[:]:
                self._weigh(each)
        pieces = {name: found[:] for name, found in self._pieces.items()}
        for each in self._captured:
            if not self._is_state(each):
                digest = joined(each.label.encode(), each.digest) if each.label else each.digest
                pieces.setdefault(each.part, []).append(digest)
        everything = not _DESCRIBING.isdisjoint(self._state.mentioned | self._state.names)
        for part, found in self._code.items():
            if told := [_description(each) for each in found if everything or id(each) in self._told]:
                pieces[f"docstring and annotations of {part}"] = told
        return {name: joined(*found) for name, found in pieces.items()}, tuple(sorted(self._opaque))

    def tell(self, value: Any) -> None:
        """A function that is held as data, such as a tool of a model, may be told by what it says of itself."""
        while isinstance(value, functools.partial | Node | staticmethod | classmethod | types.MethodType):
            value = value.func if isinstance(value, functools.partial | Node) else value.__func__
        self._told.add(id(value))

    # ---- code that is referred to

    def _reference(self, value: Any) -> str | None:
        """Return the name of code, which is followed from now on; None if the value is not code."""
        while isinstance(value, Node | staticmethod | classmethod):
            if isinstance(value, Node) and _is_salted(value):
                return self._node(value)
            value = value.func if isinstance(value, Node) else value.__func__
        match value:
            case FunctionType():
                return self._function(value)
            case type():
                return self._class(value)
            case ModuleType():
                return self._module(value)
            case functools.partial():
                return self._partial(value)
            case types.MethodType():
                return self._method(value)
        if isinstance(value, _BUILTINS):
            return self._builtin(value)
        kind = type(value)
        made_in = class_module(kind)
        if made_in.startswith("hypernodes.") and (plan := getattr(value, "plan", None)) is not None:
            return self._pipeline(value, plan)
        if not callable(value) or foreign_class(kind) is None:
            return None
        own = getattr(value, "__dict__", {})
        if "__wrapped__" in own:
            return self._wrapper(value, made_in, kind.__qualname__)
        if isinstance(kind.__dict__.get("__name__"), _C_ATTRIBUTES):  # such as numpy.sin
            return self._compiled(value, kind)
        self._hold(value, kind)  # what an object says of its own name is not where its code is
        return None

    def _entity(self, key: tuple[object, ...], name: str, follow: Callable[[str], None] | None = None) -> str:
        """Return the name of a thing, with a number if another thing of that name came before."""
        known = self._names.get(key)
        if known is None:
            self._taken[name] += 1
            number = self._taken[name]
            known = self._names[key] = name if number == 1 else f"{name} #{number}"
            if follow is not None:
                self._waiting.append((known, follow))
        return known

    def _foreign(self, module: str, name: str) -> str:
        for part, digest in (foreign_parts(module) or {}).items():
            self._pieces[part] = [digest]
        return f"{module}.{name}"

    def _function(self, func: FunctionType) -> str:
        if is_foreign(func):
            module, kind = func.__globals__.get("__name__") or func.__module__, func.__code__.co_qualname
            if "__wrapped__" in func.__dict__:
                return self._wrapper(func, module, kind)
            name = self._foreign(module, kind)
            if func.__closure__ and any(held_in_closure(func)):
                return self._entity((id(func),), name, lambda part: self._follow_closure(func, part))
            return name
        name = f"function {func.__code__.co_qualname!r} (module {module_name(func.__globals__)!r})"
        return self._entity((id(func),), name, lambda part: self._follow_function(func, part))

    def _follow_function(self, func: FunctionType, part: str) -> None:
        self._code[part].append(func)
        self._pieces[part].append(code_of(func).digest)
        owner = repr(func.__code__.co_qualname) + part.rpartition(")")[2]  # with its number
        self._uses(func, owner)
        for name, value in _defaults(func):
            if not self._state.is_memory(func, name, value):
                self._capture(f"default of {name!r} of {owner}", value)
        wrapped = func.__dict__.get("__wrapped__")
        if wrapped is not None and all(wrapped is not content_of(each) for each in func.__closure__ or ()):
            self._bind(f"wrapped by {owner}", (id(func), "__wrapped__"), wrapped)

    def _wrapper(self, wrapper: Any, module: str, kind: str) -> str:
        """Somebody else's decorator: its version, how it was applied, and what is inside."""
        return self._entity(
            (id(wrapper),),
            f"{self._foreign(module, kind)} around {_inner_name(wrapper)}",
            lambda part: self._follow_wrapper(wrapper, part),
        )

    def _follow_wrapper(self, wrapper: Any, part: str) -> None:
        inner = wrapper.__wrapped__
        self._bind(part, (id(wrapper), "__wrapped__"), inner)
        if "registry" in wrapper.__dict__:  # functools.singledispatch
            registry = {kind: self._reference(each) or each for kind, each in wrapper.registry.items()}
            self._capture(f"registry of {_inner_name(wrapper)}", registry)
        elif isinstance(wrapper, FunctionType):
            self._follow_closure(wrapper, part, inner)
        while not isinstance(inner, FunctionType) and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        while isinstance(inner, FunctionType) and "__wrapped__" in inner.__dict__:
            inner = inner.__dict__["__wrapped__"]
        if isinstance(inner, FunctionType):
            written = code_of(inner)
            decorators = [digest for chain, digest in written.decorators if chain and resolve(inner, chain) is not node]
            self._pieces[f"decorators of {_inner_name(wrapper)}"] = [*decorators, written.annotations]

    def _follow_closure(self, func: FunctionType, part: str, known: Any = None) -> None:
        """What somebody else's function was made with, such as the functions that it calls."""
        for name, cell, value in held_in_closure(func):
            if value is not known:
                self._bind(f"closure variable {name!r} of {part}", ("cell", id(cell)), value)

    def _compiled(self, value: Any, kind: type) -> str:
        """A function of an extension module, such as numpy.sin, or one that was made around another function."""
        name = str(getattr(value, "__qualname__", None) or value.__name__)
        if home := home_of(value, name):
            return self._foreign(home, name)

        def follow(part: str) -> None:
            held = held_by_compiled(value)
            for number, each in enumerate(held):
                self._bind(part, (id(value), number), each)
            if not held:
                self._opaque.add(part)

        return self._entity((id(value),), f"{self._foreign(kind.__module__, kind.__qualname__)} {name!r}", follow)

    def _hold(self, value: Any, kind: type) -> None:
        """A callable object of somebody else's class, which counts by value: it calls what it holds, in private too."""
        for name, each in held_in_object(value):
            self._bind(f"{name!r} of {kind.__module__}.{kind.__qualname__}", (id(value), name), each)

    def _module(self, module: ModuleType) -> str:
        if foreign_parts(module.__name__) is not None:
            self._foreign(module.__name__, "")
            return f"module {module.__name__!r}"
        return f"module {module_name(vars(module))!r}"

    def _node(self, value: Node[..., Any]) -> str:
        """A node that is called by another counts with what it was told to depend on."""
        self._kept.append(value)
        return self._entity((id(value),), f"node {value.name!r}", lambda part: self._follow_node(value, part))

    def _follow_node(self, value: Node[..., Any], part: str) -> None:
        self._bind(part, (id(value), "func"), value.func)
        self._salt(value, part)

    def _salt(self, value: Node[..., Any], part: str) -> None:
        if value.version is not None:
            self._pieces[f"version of {part}"] = [hash_value(value.version, f"version of {part}")]
        for name, digest in hash_dependencies(value.depends_on).items():
            self._pieces[f"{name} of {part}"] = [digest]

    def _partial(self, value: functools.partial[Any]) -> str:
        return self._entity(
            (id(value),), f"partial of {_inner_name(value)}", lambda part: self._follow_partial(value, part)
        )

    def _follow_partial(self, value: functools.partial[Any], part: str) -> None:
        self._bind(part, (id(value), "func"), value.func)
        for number, each in enumerate(value.args, start=1):
            self._capture(f"argument {number} of {part}", each)
        for name, each in value.keywords.items():
            self._capture(f"argument {name!r} of {part}", each)

    def _method(self, method: types.MethodType) -> str:
        func, instance = method.__func__, method.__self__
        self._kept.append(method)
        name = f"method {getattr(func, '__qualname__', type(func).__qualname__)!r}"
        return self._entity((id(instance), id(func)), name, lambda part: self._follow_method(func, instance, part))

    def _follow_method(self, func: Any, instance: Any, part: str) -> None:
        owner = instance if isinstance(instance, type) else type(instance)
        self._state.mentioned.add(getattr(func, "__name__", ""))
        self._bind(part, (id(instance), id(func)), owner)
        if not any(is_own(func, each) for each in owner.__mro__):
            self._bind(part, (id(instance), id(func), "function"), func)
        if not isinstance(instance, type):
            self._capture(f"self of {part}", instance, is_self=True)

    def _builtin(self, value: Any) -> str:
        instance = getattr(value, "__self__", None)
        qualname = value.__qualname__
        if instance is None or isinstance(instance, ModuleType | type):
            module = getattr(value, "__module__", None) or getattr(instance, "__module__", None) or "builtins"
            return self._foreign(module, qualname)
        self._kept.append(value)

        def follow(part: str) -> None:
            if value.__name__ not in MUTATING_METHODS:
                self._capture(f"self of {part}", instance)

        return self._entity((id(instance), value.__name__), f"method {qualname!r}", follow)

    def _pipeline(self, pipeline: Any, plan: Any) -> str:
        return self._entity((id(plan),), f"pipeline {plan.name!r}", lambda part: self._follow_plan(plan, part))

    def _follow_plan(self, plan: Any, part: str) -> None:
        """Names, order, maps and functions; how a pipeline runs does not change what it makes."""
        for step in plan.steps:
            self._pieces[part].append(repr((tuple(step.inputs), step.outputs)).encode())
            if (call := getattr(step, "node", None)) is not None:
                self._bind(part, (id(step),), call)
                continue
            mapped = step.map and (step.map.over, step.map.mode, step.map.on_error)
            names = sorted(step.outer_to_inner.items()), sorted(step.inner_to_outer.items()), mapped
            self._pieces[part].append(repr(names).encode())
            self._pieces[part].append(self._pipeline(step, step.plan).encode())
        for name, value in plan.constants.items():
            self._capture(f"input {name!r} bound in {part}", value)

    # ---- what code reads and writes

    def _uses(self, func: FunctionType, owner: str, *, when_made: bool = False) -> None:
        code = code_of(func)
        self._followed.add((func.__globals__.get("__name__"), func.__code__.co_qualname))
        with self._whatever_it_is(owner):
            self._state.note(func, when_made=when_made)
        imports: defaultdict[str, list[Import]] = defaultdict(list)
        for each in code.uses.imports:
            imports[each.name].append(each)
        for each in imports.pop("", []):
            import_for(func, each)
        cells = cells_of(func)
        for chain in code.reads:
            name = chain[0]
            if name in imports:
                for each in sorted(imports[name], key=repr):
                    self._read_import(func, each, chain, owner)
            elif name in cells:
                if name != "__class__":
                    cell = cells[name]
                    value = content_of(cell)
                    part = f"closure variable {name!r} of {owner}"
                    with self._whatever_it_is(part, value):
                        self._bind(part, ("cell", id(cell)), value, chain=chain)
            else:
                self._read_name(func.__globals__, chain)

    def _read_name(self, names: dict[str, Any], chain: Chain) -> None:
        """A global variable, or an attribute of a module of the project, which is one of its global variables."""
        name = chain[0]
        if name not in names:
            if name in builtins_of(names):
                return
            if (value := asked_for(names, name)) is ABSENT:
                self._pieces[f"global {name!r} (module {module_name(names)!r})"] = [b"absent"]
                return
        else:
            value = names[name]
        with self._whatever_it_is(f"global {name!r} (module {module_name(names)!r})", value):
            self._read_value(names, chain, value)

    def _read_value(self, names: dict[str, Any], chain: Chain, value: Any) -> None:
        name, module = chain[0], module_name(names)
        if isinstance(value, ModuleType) and len(chain) > 1 and foreign_parts(value.__name__) is None:
            self._bind(f"global {name!r} (module {module!r})", (id(names), name), value, f"module {name!r}")
            self._read_name(vars(value), chain[1:])
            return
        own = f"{'class' if isinstance(value, type) else 'function'} {name!r} (module {module!r})"
        self._bind(f"global {name!r} (module {module!r})", (id(names), name), value, own, chain)

    def _read_import(self, func: FunctionType, what: Import, chain: Chain, owner: str) -> None:
        module = module_of(func, what)
        if module and foreign_parts(module) is not None:
            self._pieces[f"import of {what.name!r} in {owner}"].append(
                self._foreign(module, what.attribute or "").encode()
            )
            return
        loaded = import_for(func, what)
        if loaded is None:
            self._pieces[f"import of {what.name!r} in {owner}"].append(b"absent")
        elif what.attribute:
            self._read_name(vars(loaded), (what.attribute, *chain[1:]))
        elif len(chain) > 1:
            self._read_name(vars(loaded), chain[1:])
        else:
            self._bind(f"import of {what.name!r} in {owner}", (id(func), what), loaded)

    def _bind(self, part: str, variable: tuple[object, ...], value: Any, own: str = "", chain: Chain = ()) -> None:
        """A name stands for code or a value; for code of that very name (`own`) there is nothing to say."""
        if (part, *variable) not in self._bound:
            self._bound.add((part, *variable))
            name = self._reference(value) if value is not ABSENT else "nothing yet"
            if name is None:
                self._capture(part, value, variable)
            elif name != own:
                self._pieces[part].append(name.encode())
            if isinstance(value, ModuleType) and len(chain) == 1 and foreign_parts(value.__name__) is None:
                self._whole_module(value)
        if len(chain) > 1 and isinstance(value, FunctionType | type):
            self._read_attribute(value, chain[1], part)

    def _read_attribute(self, owner: Any, attribute: str, part: str) -> None:
        """An attribute that somebody gave to a function; or a docstring, which counts where code reads it."""
        if attribute == "__doc__" or (isinstance(owner, FunctionType) and attribute in owner.__dict__):
            value = getattr(owner, attribute)
            self._bind(f"attribute {attribute!r} of {part}", (id(owner), attribute), value)

    def _whole_module(self, module: ModuleType) -> None:
        """A module that is used as a value: whatever is in it may be used."""
        for name in sorted(vars(module)):
            value = vars(module)[name]
            if not name.startswith("_") and not isinstance(value, ModuleType):
                self._read_name(vars(module), (name,))

    # ---- classes

    def _class(self, cls: type) -> str:
        if foreign_class(cls) is not None:
            return self._foreign(class_module(cls), cls.__qualname__)
        name = f"class {cls.__qualname__!r} (module {_module_of(cls)!r})"
        return self._entity((id(cls),), name, lambda part: self._follow_class(cls, part))

    def _follow_class(self, cls: type, part: str) -> None:
        self._code[part].append(cls)
        pieces = self._pieces[part]
        kinds = cls.__bases__ if type(cls) is type else (*cls.__bases__, type(cls))
        pieces.extend(self._class(each).encode() for each in kinds)
        for name in sorted(cls.__dict__):
            member = cls.__dict__[name]
            if isinstance(member, Node):
                self._salt(member, f"{name!r} of {part}")
            for func in functions_of(member):
                if not is_generated(func, cls):
                    pieces.append(f"{type(member).__qualname__} {name}".encode())
                    self._follow_member(cls, name, func, part)
        for label, value in data_of(cls):
            self._capture(part, value, (id(cls), label), label, cls)
        for annotation in inspect.get_annotations(cls).values():
            if isinstance(annotation, str):
                self._follow_annotation(cls, annotation)

    def _follow_member(self, cls: type, name: str, func: Any, part: str) -> None:
        if not is_own(func, cls):
            self._pieces[part].append((self._reference(func) or self._class(type(func))).encode())
            return
        self._code[part].append(func)
        self._pieces[part].append(code_of(func).digest)
        self._uses(func, repr(f"{cls.__qualname__}.{name}"), when_made=makes_classes(cls, name))
        for parameter, value in _defaults(func):
            if not self._state.is_memory(func, parameter, value):
                self._capture(part, value, label=f"default of {parameter!r} of {name!r}")

    def _follow_annotation(self, cls: type, annotation: str) -> None:
        """Follow the classes that a field is annotated with, where annotations are kept as text."""
        names = getattr(sys.modules.get(class_module(cls)), "__dict__", {})
        for name in names_in(annotation):
            if isinstance(names.get(name), type):
                self._read_name(names, (name,))


def _is_salted(value: Node[..., Any]) -> bool:
    return value.version is not None or bool(value.depends_on)


def _description(code: FunctionType | type) -> bytes:
    """Return the digest of the docstring and annotations of a function; of a class, whose annotations count anyway."""
    doc = code.__doc__
    said = hash_value(inspect.cleandoc(doc) if isinstance(doc, str) else None)
    return said if isinstance(code, type) else joined(said, code_of(code).annotations)


def _module_of(cls: type) -> str:
    return module_name(getattr(sys.modules.get(class_module(cls)), "__dict__", {"__name__": class_module(cls)}))


def _inner_name(value: Any) -> str:
    """Return the name of the function inside of partials and decorators, quoted."""
    while isinstance(value, functools.partial | Node):
        value = value.func
    return repr(getattr(value, "__qualname__", type(value).__qualname__))


def _defaults(func: FunctionType) -> Iterator[tuple[str, Any]]:
    code = func.__code__
    if values := func.__defaults__:
        # A wrapper `(*args, **kwargs)` may bear those of what it wraps, and has no parameters to name them by.
        names = code.co_varnames[: code.co_argcount]
        for position, value in enumerate(values, start=len(names) - len(values)):
            yield names[position] if position >= 0 else str(position), value
    yield from sorted((func.__kwdefaults__ or {}).items())
