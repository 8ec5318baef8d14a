"""Fingerprints of what people have in their modules: typing's own objects, odd classes, registries, vendored code."""

import importlib
import sys
import textwrap
import typing

import pytest

from hypernodes._signature.code import fingerprint, hash_code
from hypernodes._signature.values import hash_value


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of always the same name into a folder of its own, and imports it anew."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text, name="trial"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield write
    sys.modules.pop("trial", None)


def changed(one, other):
    return {name for name in {*one.parts, *other.parts} if one.parts.get(name) != other.parts.get(name)}


@pytest.mark.parametrize(
    "annotation",
    ["List", "Dict", "Callable", "Iterable", "Optional[List]", "Union", "Annotated[int, 3]", "Callable[..., List]"],
)
def test_bare_generics_of_typing_count_in_fields_code_and_containers(module, annotation):
    text = """
        from dataclasses import dataclass
        from typing import *

        KINDS = [{0}]

        @dataclass
        class Config:
            names: {0}

        def f(config):
            return isinstance(config, Config), {0}, KINDS
        """
    one = module(text.format(annotation))
    before = fingerprint(one.f)
    assert before.opaque == ()
    assert fingerprint(module(text.format(annotation)).f) == before
    other = fingerprint(module(text.format("Sequence")).f)
    assert changed(before, other) >= {"class 'Config' (module 'trial')", "global 'KINDS' (module 'trial')"}
    assert hash_value(one.Config(["a"])) == hash_value(one.Config(["a"]))
    assert hash_code(one.Config) != hash_code(one.f)


def test_what_raises_when_it_is_looked_at_counts_by_its_class(module):
    loaded = module("""
        class Proxy:
            @property
            def __class__(self):
                raise RuntimeError("nothing is bound")

        PROXY, K = Proxy(), 3

        def f(x):
            return PROXY, K
        """)
    before = fingerprint(loaded.f)
    assert before.opaque == ("global 'PROXY' (module 'trial'): trial.Proxy",)
    loaded.K = 4
    assert changed(fingerprint(loaded.f), before) == {"global 'K' (module 'trial')"}


def test_defaults_of_a_wrapper_without_named_parameters_count(module):
    loaded = module("""
        def f(*args, **kwargs):
            return args

        f.__defaults__ = (1, 2)
        """)
    before = fingerprint(loaded.f)
    loaded.f.__defaults__ = (1, 3)
    assert len(changed(fingerprint(loaded.f), before)) == 1


def test_a_class_whose_metaclass_has_another_use_for_module_is_followed(module):
    text = """
        class Meta(type):
            __module__ = property(lambda cls: cls)

        class A(metaclass=Meta):
            def m(self):
                return {0}

        def f(x):
            return A().m()

        a = A()

        def g(x):
            return a
        """
    one, other = module(text.format(1)), module(text.format(2))
    assert changed(fingerprint(one.f), fingerprint(other.f)) == {"class 'A' (module 'trial')"}
    assert fingerprint(one.g).digest != fingerprint(other.g).digest


@pytest.mark.parametrize("annotation", [typing.List, typing.Callable, typing.Optional[typing.List]])  # noqa: UP006, UP045
def test_generics_can_be_captured_alone(annotation):
    assert fingerprint(lambda: annotation).opaque == ()


def vendored(folder, top, info, listing, version="1.0"):
    """Write a package and what its installation left beside it."""
    (folder / top).mkdir(parents=True)
    (folder / top / "__init__.py").write_text("def g(x):\n    return x\n")
    (folder / info).mkdir()
    (folder / info / ("METADATA" if info.endswith("dist-info") else "PKG-INFO")).write_text(
        f"Name: Some-{top}\nVersion: {version}\n\n"
    )
    (folder / info / listing[0]).write_text(listing[1])


@pytest.mark.parametrize(
    ("info", "listing", "part"),
    [
        ("a-1.0.dist-info", ("RECORD", "{0}/__init__.py,sha256=x,9\n"), "package 'Some-{0}' 1.0"),
        ("a-1.0.dist-info", ("top_level.txt", "{0}\n"), "package 'Some-{0}' 1.0"),
        ("a-1.0.dist-info", ("RECORD", "__editable__.{0}.pth,,\n"), "function 'g' (module '{0}')"),
        ("a.egg-info", ("top_level.txt", "{0}\n"), "function 'g' (module '{0}')"),
    ],
)
def test_packages_installed_into_a_folder_count_by_version_and_editable_ones_by_their_code(
    tmp_path, monkeypatch, module, info, listing, part
):
    top = f"vendored_{abs(hash(str(tmp_path)))}"
    vendored(tmp_path / "vendor", top, info, (listing[0], listing[1].format(top)))
    monkeypatch.syspath_prepend(tmp_path / "vendor")
    loaded = module(f"import {top}\ndef f(x):\n    return {top}.g(x)\n")
    parts = set(fingerprint(loaded.f).parts)
    sys.modules.pop(top)
    assert {each for each in parts if top in each and not each.startswith("global")} == {part.format(top)}


REGISTRIES = {
    "init_subclass": """
        class Step:
            registry = {}
            def __init_subclass__(cls):
                Step.registry[cls.__name__] = cls
        class Clean(Step):
            def run(self, x): return x + 1
        def f(x):
            return Step.registry["Clean"]().run(x)
        """,
    "metaclass": """
        KINDS = []
        class Meta(type):
            def __init__(cls, *args):
                KINDS.append(cls)
        class Clean(metaclass=Meta):
            def run(self, x): return x + 1
        def f(x):
            return Meta and KINDS[0]().run(x)
        """,
    "set_name": """
        FIELDS = {}
        class Field:
            def __set_name__(self, owner, name):
                FIELDS[name] = owner
        class Clean:
            run = Field()
            def go(self, x): return x + 1
        def f(x):
            return Field and FIELDS["run"]().go(x)
        """,
}
KEPT = {
    "get or default": """
        ITEMS = {}
        def register(f):
            ITEMS[f.__name__] = f
            return f
        def get(name):
            if name not in ITEMS: ITEMS[name] = None
            return ITEMS[name]
        @register
        def clean(x): return x + 1
        def f(x):
            return get("clean")(x)
        """,
    "factory": """
        ITEMS = []
        def make(k):
            def made(x): return x + 1
            return made
        ITEMS.append([make(3)])
        def f(x):
            ITEMS.append(x)
            return ITEMS[0][0](x)
        """,
    "attribute": """
        class Registry:
            def __init__(self): self.items = {}
            def get(self, name): return self.items.setdefault(name, None)
        def clean(x): return x + 1
        REGISTRY = Registry()
        REGISTRY.items["clean"] = clean
        def f(x):
            return REGISTRY.get("clean")(x)
        """,
}


@pytest.mark.parametrize("name", REGISTRIES | KEPT)
def test_the_code_in_a_registry_counts_and_calls_do_not_change_it(module, name):
    text = (REGISTRIES | KEPT)[name]
    one, other = module(text), module(text.replace("return x + 1", "return x + 2"))
    before = fingerprint(one.f)
    assert changed(before, fingerprint(other.f))
    one.f(1)
    assert fingerprint(one.f) == before


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_registry_filled_when_classes_are_made_counts_by_what_is_in_it(module, name):
    loaded = module(REGISTRIES[name])
    before = fingerprint(loaded.f)
    exec("class Other(Clean):\n    run = Field() if 'Field' in globals() else Clean", vars(loaded))
    assert changed(fingerprint(loaded.f), before)


def test_functions_that_a_function_makes_and_keeps_do_not_count_twice(module):
    loaded = module("""
        MADE = {}
        def f(x):
            class Local: pass
            MADE[x] = lambda: x
            MADE[-x] = Local
            return MADE[x]()
        """)
    before = fingerprint(loaded.f)
    loaded.f(1)
    loaded.f(2)
    assert fingerprint(loaded.f) == before


DESCRIBED = {
    "pydantic model": (
        "from pydantic import BaseModel\nclass A(BaseModel):\n    '''One.'''\n    text: str\ndef f(x):\n    return A",
        "class 'A' (module 'trial')",
    ),
    "tool in a list": (
        "def tool(a: int):\n    '''One.'''\nTOOLS = [tool]\ndef f(x):\n    return TOOLS",
        "docstring and annotations of function 'tool' (module 'trial')",
    ),
    "tool of an object": (
        "class M: pass\ndef tool(a: int):\n    '''One.'''\nm = M()\nm.tools = {'t': tool}\ndef f(x):\n    return m",
        "global 'm' (module 'trial')",
    ),
    "getdoc": (
        "from inspect import getdoc\ndef tool(a: int):\n    '''One.'''\ndef f(x):\n    return getdoc(tool)",
        "docstring and annotations of function 'tool' (module 'trial')",
    ),
    "signature": (
        "import inspect\nclass A:\n    '''One.'''\n    def m(self): pass\ndef f(x):\n    return inspect.signature(A)",
        "docstring and annotations of class 'A' (module 'trial')",
    ),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_docstrings_that_something_may_read_count(module, name):
    text, part = DESCRIBED[name]
    one, other = module(text), module(text.replace("One.", "Two."))
    assert changed(fingerprint(one.f), fingerprint(other.f)) == {part}


def test_annotations_of_functions_held_as_data_count(module):
    text, part = DESCRIBED["tool in a list"]
    one, other = module(text), module(text.replace("a: int", "a: str"))
    assert changed(fingerprint(one.f), fingerprint(other.f)) == {part}
    assert hash_code(one.tool) != hash_code(other.tool)


def test_docstrings_that_nothing_reads_do_not_count(module):
    text = "def g():\n    '''One.'''\nclass A:\n    '''One.'''\ndef f(x):\n    '''One.'''\n    return g(), A()\n"
    assert fingerprint(module(text).f) == fingerprint(module(text.replace("One.", "Two.")).f)
