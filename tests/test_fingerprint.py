"""What a fingerprint of code depends on: every edit that can change a result, none that cannot, the code that runs."""

import ast
import builtins
import functools
import gc
import importlib
import importlib.metadata
import json
import linecache
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from hypernodes import Pipeline, node
from hypernodes._signature import code, origin
from hypernodes._signature.bytecode import bytecode_digest
from hypernodes._signature.code import _known, fingerprint, hash_code, hash_dependencies
from hypernodes._signature.values import hash_value
from hypernodes.errors import UncacheableError

HERE = Path(__file__).parent
PROJECT = HERE / "fingerprint_project"


class Edit(NamedTuple):
    """Text that is replaced in a file of the project, and the parts of the fingerprint that must change."""

    file: str
    old: str
    new: str
    changed: tuple[str, ...] = ()


DEPTH = "global 'DEPTH' (module 'pkg.numbers')"
DOC = "class 'Doc' (module 'job')"
JOB = "function 'job' (module 'job')"
ENCODER = "class 'Encoder' (module 'job')"
WRAPPER = "'logged.<locals>.decorate.<locals>.wrapper'"

EDITS = {
    "body": Edit("job.py", "sep) if", "sep, 1) if", (JOB,)),
    "nested function": Edit("job.py", 'word.strip(".")', 'word.strip(",")', (JOB,)),
    "lambda": Edit("job.py", "(len(word), word)", "(word, len(word))", (JOB,)),
    "comprehension": Edit("job.py", '!= "the"', '!= "a"', (JOB,)),
    "f-string": Edit("job.py", "!r:>10", "!r:>11", (JOB,)),
    "async comprehension": Edit("job.py", "fetch(word) for", "fetch([word]) for", (JOB,)),
    "default": Edit("job.py", "top_k=5", "top_k=6", ("default of 'top_k' of 'job'",)),
    "keyword default": Edit("job.py", 'sep=" "', 'sep="-"', ("default of 'sep' of 'job'",)),
    "global": Edit("job.py", "LIMIT = 3", "LIMIT = 4", ("global 'LIMIT' (module 'job')",)),
    "type of a global": Edit("job.py", "LIMIT = 3", "LIMIT = 3.0", ("global 'LIMIT' (module 'job')",)),
    "inside a global": Edit("job.py", '["a", "b"]', '["a", "c"]', ("global 'CONFIG' (module 'job')",)),
    "global set": Edit("job.py", '"y", "z"}', '"y"}', ("global 'ALLOWED' (module 'job')",)),
    "global pattern": Edit("job.py", '"[a-z]+"', '"[a-z]*"', ("global 'WORD' (module 'job')",)),
    "attribute of a module": Edit("consts.py", "0.25", "0.5", ("global 'RATE' (module 'consts')",)),
    "attribute of a module's module": Edit("pkg/numbers.py", "= 30", "= 33", (DEPTH,)),
    "helper": Edit("tools.py", ", BASE]", ", BASE, 0]", ("function 'helper' (module 'tools')",)),
    "helper's helper": Edit("tools.py", '+ "leaf"', '+ "leaves"', ("function 'leaf' (module 'tools')",)),
    "helper's global": Edit("tools.py", "BASE = 100", "BASE = 101", ("global 'BASE' (module 'tools')",)),
    "function under another name": Edit("tools.py", "x * 2", "x * 3", ("function 'scaled' (module 'tools')",)),
    "another function under the name": Edit(
        "job.py",
        "import scaled as",
        "import shrunk as",
        (
            "global 'resized' (module 'job')",
            "function 'scaled' (module 'tools')",
            "function 'shrunk' (module 'tools')",
        ),
    ),
    "function of a package": Edit(
        "pkg/sub.py", "[: numbers", "[1 : numbers", ("function 'trim' (module 'pkg.sub')",)
    ),
    "global of a package, by relative imports": Edit(
        "pkg/numbers.py", "= 31", "= 32", ("global 'WIDTH' (module 'pkg.numbers')",)
    ),
    "deep in a package": Edit(
        "pkg/deep.py", '"lowest"', '"low"', ("function 'lowest' (module 'pkg.deep')",)
    ),
    "function imported in the body": Edit("lazy.py", '"late"', '"later"', ("function 'late' (module 'lazy')",)),
    "module imported in the body": Edit("lazy_names.py", "K = 20", "K = 22", ("global 'K' (module 'lazy_names')",)),
    "method": Edit("job.py", "word * self.dim", "word + self.dim", (ENCODER,)),
    "property": Edit("job.py", 'return "suffix"', 'return "end"', (ENCODER,)),
    "class method": Edit("job.py", 'return "named"', 'return "name"', (ENCODER,)),
    "static method": Edit("job.py", '"plain" + salt', '"plain"', (ENCODER,)),
    "default of a method": Edit("job.py", 'salt="salt"', 'salt="pepper"', (ENCODER,)),
    "method into property": Edit("job.py", "@classmethod\n    def named", "@property\n    def named", (ENCODER,)),
    "class attribute": Edit("job.py", "dim = 4", "dim = 5", (ENCODER,)),
    "function as a class attribute": Edit("tools.py", '"built"', '"build"', ("function 'build' (module 'tools')",)),
    "method of a base class": Edit("job.py", "return 10", "return 12", ("class 'Base' (module 'job')",)),
    "attribute of a base class": Edit("job.py", "ratio = 0.1", "ratio = 0.2", ("class 'Base' (module 'job')",)),
    "other base class": Edit("job.py", "Encoder(Base, ", "Encoder(", (ENCODER, "class 'Base' (module 'job')")),
    "metaclass": Edit("job.py", "__call__(*args)", "__call__(*args[:1])", ("class 'Meta' (module 'job')",)),
    "default of a field": Edit("job.py", "score: float = 0.5", "score: float = 0.6", (DOC,)),
    "type of a field": Edit("job.py", "score: float", "score: int", (DOC,)),
    "field option": Edit(
        "job.py", "factory=make_tags", "factory=make_tags, compare=False", (DOC,)
    ),
    "dataclass option": Edit("job.py", "@dataclass\n", "@dataclass(order=True)\n", (DOC,)),
    "default factory": Edit("job.py", 'return ["new"]', "return []", ("function 'make_tags' (module 'job')",)),
    "enum member's value": Edit("job.py", "RED = 1", "RED = 3", ("class 'Color' (module 'job')",)),
    "enum member": Edit("job.py", "GREEN = 2", "GREEN = 2\n    BLUE = 3", ("class 'Color' (module 'job')",)),
    "NamedTuple default": Edit("job.py", "y: int = 7", "y: int = 6", ("class 'Point' (module 'job')",)),
    "namedtuple default": Edit("job.py", "defaults=(8,)", "defaults=(9,)", ("class 'Pair' (module 'job')",)),
    "state of a global object": Edit("job.py", "Encoder(11)", "Encoder(16)", ("global 'ENCODER' (module 'job')",)),
    "state of a bound method's self": Edit(
        "job.py", "Encoder(12)", "Encoder(17)", ("self of method 'Encoder.encode'",)
    ),
    "state of a callable object": Edit("job.py", "Scorer(13)", "Scorer(18)", ("global 'SCORER' (module 'job')",)),
    "__call__": Edit("job.py", "len(word) * self.weight", "len(word)", ("class 'Scorer' (module 'job')",)),
    "decorator": Edit(
        "job.py", "return prefix, function(*args)", "return function(*args)", (f"function {WRAPPER} (module 'job')",
        f"closure variable 'prefix' of {WRAPPER}")
    ),
    "argument of a decorator": Edit(
        "job.py", '@logged("prefix")', '@logged("before")', (f"closure variable 'prefix' of {WRAPPER}",)
    ),
    "decorated function": Edit("job.py", '+ "decorated"', '+ "dec"', ("function 'decorated' (module 'job')",)),
    "argument of a foreign decorator": Edit("job.py", "maxsize=16", "maxsize=8", ("decorators of 'remembered'",)),
    "under a foreign decorator": Edit("job.py", '+ "remembered"', '+ "r"', ("function 'remembered' (module 'job')",)),
    "singledispatch implementation": Edit("job.py", 'return "int"', 'return "whole"', ("function '_' (module 'job')",)),
    "singledispatch type": Edit("job.py", "(x: int)", "(x: float)", ("registry of 'shown'",)),
    "function in a table": Edit("job.py", "x.upper()", "x.title()", ("function 'upper' (module 'job')",)),
    "function deep in a table": Edit("job.py", "x.lower()", "x.casefold()", ("function 'lower' (module 'job')",)),
    "table with functions swapped": Edit(
        "job.py", '"up": upper, "down": [lower]', '"up": lower, "down": [upper]', ("global 'TABLE' (module 'job')",)
    ),
    "partial": Edit("tools.py", "{number}{text}", "{text}{number}", ("function 'tag' (module 'tools')",)),
    "argument of a partial": Edit("job.py", "tools.tag, 14", "tools.tag, 15", ("argument 1 of partial of 'tag'",)),
    "keyword of a partial": Edit(
        "job.py", 'mark="mark"', 'mark="sign"', ("argument 'mark' of partial of 'tag'",)
    ),
    "closure": Edit(
        "job.py",
        "multiplier(15)",
        "multiplier(16)",
        ("closure variable 'factor' of 'multiplier.<locals>.multiply'",),
    ),
    "inside a factory": Edit(
        "tools.py", "x * factor", "factor * x", ("function 'multiplier.<locals>.multiply' (module 'tools')",)
    ),
    "mutual recursion": Edit("job.py", "n != 0 and", "n > 0 and", ("function 'odd' (module 'job')",)),
    "coroutine": Edit("job.py", "x):\n    return x\n\n\ndef pieces", "x):\n    return [x]\n\n\ndef pieces", (
        "function 'fetch' (module 'job')",)),
    "def into async def": Edit("job.py", "async def fetch", "def fetch", ("function 'fetch' (module 'job')",)),
    "generator": Edit("job.py", 'yield "piece"', 'yield "part"', ("function 'pieces' (module 'job')",)),
    "node that is called": Edit("job.py", "text.strip()", "text.lstrip()", ("function 'clean' (module 'job')",)),
    "node of a pipeline": Edit("job.py", "cleaned.split()", "[cleaned]", ("function 'cut' (module 'job')",)),
    "input bound in a pipeline": Edit(
        "job.py", 'text="bound"', 'text="fixed"', ("input 'text' bound in pipeline 'inner'",)
    ),
    "builtin replaced": Edit(
        "job.py",
        "def unused(x):",
        "def len(x):",
        ("function 'len' (module 'job')",),
    ),
}  # fmt: skip

NON_EDITS = {
    "nothing": Edit("job.py", "", ""),
    "comment": Edit("job.py", "# A comment.", "# Another one.\n\n    # And one more."),
    "docstring": Edit("job.py", '"""Use everything."""', '"""Use all of it."""'),
    "no docstring": Edit("job.py", '    """Use everything."""\n', ""),
    "docstring of a helper": Edit("tools.py", '"""Help."""', '"""Help more."""'),
    "docstring of a class": Edit("job.py", '"""Encodes."""', '"""Encodes words."""'),
    "docstring of a method": Edit("job.py", '"""Encode."""', '"""Encode one."""'),
    "docstring of a module": Edit("tools.py", '"""Helpers."""', '"""Other helpers."""'),
    "line breaks": Edit(
        "job.py", "(helper(words), resized(label)", "(\n            helper(words),\n  resized( label )"
    ),
    "quotes": Edit("job.py", '"{text!r:>10}"', "'{text!r:>10}'"),
    "parentheses": Edit("job.py", "return x.upper()", "return (x).upper()"),
    "annotations": Edit(
        "job.py", 'job(text, top_k=5, *, sep=" "):', 'job(text: str, top_k: "int"=5, *, sep=" ")->"x":'
    ),
    "annotation of a local variable": Edit("job.py", "words: list = ", "words = "),
    "moved down": Edit("job.py", "LIMIT = 3", "\n\n\n\nLIMIT = 3"),
    "unused function": Edit("job.py", "def unused(x):\n    return x", "def unused(x):\n    return [x]"),
    "unused global": Edit("job.py", "UNUSED = 1", "UNUSED = 2"),
    "unused attribute of a module": Edit("consts.py", "OTHER = 1", "OTHER = 2"),
    "unused name of a module imported in the body": Edit("lazy_names.py", "OTHER = 21", "OTHER = 22"),
    "other import": Edit("consts.py", "import pkg", "import os\nimport pkg"),
    "order of functions": Edit(
        "tools.py",
        "def scaled(x):\n    return x * 2\n\n\ndef shrunk(x):\n    return x / 2\n",
        "def shrunk(x):\n    return x / 2\n\n\ndef scaled(x):\n    return x * 2\n",
    ),
    "order of methods": Edit(
        "job.py",
        "    ratio = 0.1\n\n    def size(self):\n        return 10\n",
        "    def size(self):\n        return 10\n\n    ratio = 0.1\n",
    ),
    "order of a set": Edit("job.py", '{"x", "y", "z"}', '{"z", "y", "x"}'),
    "order of a dict": Edit("job.py", '{"k": 1, "words": ["a", "b"]}', '{"words": ["a", "b"], "k": 1}'),
    "what a global is computed from": Edit("job.py", "LIMIT = 3", "LIMIT = 1 + 2"),
    "options of a node": Edit("job.py", "retry=2", "retry=3, timeout=5"),
    "how many lines": Edit(
        "tools.py", "    def multiply(x):\n        return", "    def multiply(x):\n\n\n        return"
    ),
}


def run(folders, hash_seed="0", *options, **environment):
    """Fingerprints of projects, by folder, from a fresh process."""
    done = subprocess.run(
        [sys.executable, *options, str(HERE / "fingerprint_runner.py"), *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": hash_seed} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    for each in found.values():
        assert "error" not in each, each["error"]
    return list(found.values())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The fingerprint of the project as it is, and those after each edit, made on disk and imported elsewhere."""
    root = tmp_path_factory.mktemp("projects")
    edits = {**EDITS, **NON_EDITS}
    folders = []
    for number, edit in enumerate(edits.values()):
        folders.append(shutil.copytree(PROJECT, root / str(number), ignore=shutil.ignore_patterns("__pycache__")))
        file = folders[-1] / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1 or not edit.old, f"{edit.old!r} is in {edit.file} {text.count(edit.old)} times"
        file.write_text(text.replace(edit.old, edit.new) if edit.old else text)
    before = run([PROJECT], "1", PYTHONDONTWRITEBYTECODE="1")[0]
    return before, dict(zip(edits, run(folders, "2"), strict=True))


def differing(one, other):
    """Names of the parts that are not the same in both."""
    return {name for name in {*one["parts"], *other["parts"]} if one["parts"].get(name) != other["parts"].get(name)}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_parts_that_name_it_and_no_others(evaluated, name):
    before, after = evaluated[0], evaluated[1][name]
    assert differing(before, after) == set(EDITS[name].changed)
    assert before["digest"] != after["digest"]


@pytest.mark.parametrize("name", NON_EDITS)
def test_what_changes_no_result_changes_nothing(evaluated, name):
    before, after = evaluated[0], evaluated[1][name]
    assert differing(before, after) == set()
    assert before["digest"] == after["digest"]


@pytest.mark.parametrize("options", [("-O",), ("-OO",), ("-B",), ("-X", "no_debug_ranges")], ids=" ".join)
def test_it_is_the_same_however_python_was_started(evaluated, options):
    assert run([PROJECT], "3", *options)[0]["digest"] == evaluated[0]["digest"]


# ---- the code that runs


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and imports it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(text, name=None, *, load=True):
        name = name or f"fingerprinted_{len(names)}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        names.append(name)
        return importlib.import_module(name) if load else None

    yield write
    for name in names:
        sys.modules.pop(name, None)


def changed(one, other):
    return {name for name in {*one.parts, *other.parts} if one.parts.get(name) != other.parts.get(name)}


def rewrite(loaded, text):
    """Edit the file of a module that stays as it was imported."""
    file = Path(loaded.__file__)
    file.write_text(textwrap.dedent(text))
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 10**9))


TWICE = "K = 2\ndef f(x):\n    return x * K\n"


def test_a_file_edited_after_its_import_changes_nothing_until_it_is_imported_again(module):
    loaded = module(TWICE)
    before = fingerprint(loaded.f)
    rewrite(loaded, TWICE.replace("x * K", "x + K").replace("2", "3"))
    assert fingerprint(loaded.f) == before
    importlib.reload(loaded)
    assert changed(fingerprint(loaded.f), before) == {
        f"function 'f' (module {loaded.__name__!r})",
        f"global 'K' (module {loaded.__name__!r})",
    }


def test_old_code_is_never_taken_for_the_new_text_of_its_file(module):
    old = module(TWICE)
    rewrite(old, TWICE.replace("x * K", "x + K"))
    seen_late = fingerprint(old.f)
    importlib.reload(old)
    assert seen_late != fingerprint(old.f)
    assert seen_late.parts[f"function 'f' (module {old.__name__!r})"] == bytecode_digest(module(TWICE).f.__code__)


def test_old_code_that_only_moved_in_its_file_is_still_found(module):
    as_written = module(TWICE)
    expected = fingerprint(as_written.f)
    moved = module(TWICE)
    rewrite(moved, '"""Moved."""\n\n\ndef before():\n    return 1\n\n\n' + TWICE)
    assert list(fingerprint(moved.f).parts.values()) == list(expected.parts.values())


def test_a_class_counts_as_it_is_in_memory(module):
    text = "class C:\n    n = 1\n    def m(self):\n        return 1\ndef f():\n    return C()\n"
    loaded = module(text)
    before = fingerprint(module(text).f)
    rewrite(loaded, text.replace("n = 1", "n = 2"))
    assert list(fingerprint(loaded.f).parts.values()) == list(before.parts.values())
    loaded.C.n = 2
    assert changed(fingerprint(loaded.f), before) >= {f"class 'C' (module {loaded.__name__!r})"}


def test_functions_without_source_count_by_what_they_do():
    def made(text):
        names = {"__name__": "made"}
        exec(text, names)
        return fingerprint(names["f"])

    plain = made("def f(x):\n    return x + 1")
    assert made('def f(x):\n    """Doc."""\n    # Comment.\n\n    return (x +\n 1)') == plain
    assert made("def f(x):\n    return x + 2") != plain
    assert made("def f(x):\n    return x + 1.0") != plain
    assert made("def f(x):\n    return x - 1") != plain
    nested = made("def f(x):\n    return [lambda: y + 1 for y in x]")
    assert made("def f(x):\n    return [lambda: y + 2 for y in x]") != nested


def test_what_exec_makes_in_a_namespace_without_a_name_counts_by_what_it_does():
    def made(text, name):
        names = {}
        exec(text, names)
        return names[name]

    function, method = "def f(x):\n    return x + {}", "class C:\n    def m(self):\n        return {}"
    kinds = {
        "function": lambda n: fingerprint(made(function.format(n), "f")),
        "class": lambda n: fingerprint(made(method.format(n), "C")),
        "instance": lambda n: fingerprint(made(method.format(n), "C")().m),
    }
    for kind, make in kinds.items():
        assert make(1) == make(1) != make(2), kind


def test_threads_that_parse_at_one_moment(module, monkeypatch):
    """Python may upset a thread that parses while another does: a function is what it was before, all the same."""
    functions = [module(f"def value(x):\n    return x + {number % 2}\n").value for number in range(4)]
    parse, calls = ast.parse, []

    def upset(*arguments, **options):
        calls.append(arguments)
        if len(calls) % 3:
            raise SystemError("AST constructor recursion depth mismatch (before=57, after=50)")
        return parse(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", upset)
        digests = [list(fingerprint(function).parts.values()) for function in functions]
    assert len(calls) == 12
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_code_that_cannot_be_read_is_not_taken_for_other_code(module, monkeypatch):
    """Whatever goes wrong with it, the function is not cached: found by its name alone, its results would be stale."""
    function = module("def value(x):\n    return x\n").value

    def fail(function):
        raise RuntimeError("odd")

    monkeypatch.setattr(code, "uses_of", fail)
    with pytest.raises(UncacheableError, match=r"the code of value cannot be read .*odd"):
        fingerprint(function)


def test_a_text_that_cannot_be_parsed_for_good(module, monkeypatch):
    """Its functions count by their bytecode, and by what they read."""
    functions = [module(f"FACTOR = {number}\ndef value(x):\n    return x * FACTOR\n").value for number in range(2)]

    def fail(*arguments, **options):
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", fail)
        one, other = (fingerprint(function).parts for function in functions)
    assert list(one.values()) != list(other.values())
    assert len(one) == 2
    assert any("FACTOR" in part for part in one)


@pytest.mark.parametrize("others", ["", "first = lambda x: x + 1; "])
def test_lambdas_in_one_line_are_told_apart(module, others):
    loaded = module(f"{others}one, two = (lambda x: x + 1), (lambda x: (lambda: x + 2))\n")
    same = module(f"{others}three = lambda x: x + 1\nfour = lambda x: (lambda: x + 2)\n")
    digests = [list(fingerprint(each).parts.values()) for each in (loaded.one, loaded.two, same.three, same.four)]
    assert digests[0] == digests[2] != digests[1] == digests[3]


def cell(text, number, names):
    """Run a notebook cell as IPython does: its text is in `linecache`, under a file name that does not exist."""
    filename = f"/tmp/ipykernel_{os.getpid()}/{number}.py"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    for each in ast.parse(text, filename).body:
        exec(compile(ast.Module([each], []), filename, "exec", flags=flags, dont_inherit=True), names)


def test_functions_of_notebook_cells_are_read_from_the_cells():
    names = {"__name__": "__main__", "__builtins__": builtins}
    cell("K = 3\ndef helper(x):\n    return x + K\n", 1, names)
    cell("def f(x):\n    # Comment.\n    return helper(x) * 2\n", 2, names)
    before = fingerprint(names["f"])
    assert set(before.parts) == {
        "function 'f' (module '__main__')",
        "function 'helper' (module '__main__')",
        "global 'K' (module '__main__')",
    }
    assert before.parts["function 'f' (module '__main__')"] != bytecode_digest(names["f"].__code__)

    cell("\n\ndef f(x):\n    return helper(x) * 2\n", 3, names)
    assert fingerprint(names["f"]) == before
    cell("K = 4", 4, names)
    assert changed(fingerprint(names["f"]), before) == {"global 'K' (module '__main__')"}
    cell("K = 3\ndef helper(x):\n    return x - K\n", 5, names)
    assert changed(fingerprint(names["f"]), before) == {"function 'helper' (module '__main__')"}


def test_a_script_is_the_module_that_it_can_be_imported_as(tmp_path):
    (tmp_path / "script.py").write_text(
        "from hypernodes._signature.code import fingerprint\n"
        "def f(x):\n    return x\n"
        "if __name__ == '__main__':\n    import script\n"
        "    print(fingerprint(f) == fingerprint(script.f), *fingerprint(f).parts)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True function 'f' (module 'script')\n"


# ---- captured state

READ = {
    "rebinding": ("K = 3", "return K", "K = 4", "global 'K'"),
    "type": ("K = 1", "return K", "K = True", "global 'K'"),
    "item": ("C = {'k': 1}", "return C['k']", "C['k'] = 2", "global 'C'"),
    "deep item": ("C = {'k': [1]}", "return C['k'][0]", "C['k'][0] = 2", "global 'C'"),
    "attribute": ("class A: pass\na = A(); a.n = 1", "return a.n", "a.n = 2", "global 'a'"),
    "class attribute": ("class A: n = 1", "return A.n", "A.n = 2", "class 'A'"),
    "inherited class attribute": ("class B: n = 1\nclass A(B): pass", "return A.n", "B.n = 2", "class 'B'"),
    "method": ("class A:\n    def m(self): return 1", "return A().m()", "A.m = lambda self: 2", "class 'A'"),
    "function": ("def g(): return 1", "return g()", "def g(): return 2", "function 'g'"),
    "attribute of a function": ("def g(): pass\ng.n = 1", "return g.n", "g.n = 2", "attribute 'n' of global 'g'"),
    "read of another attribute": (
        "class A: pass\na = A(); a.n = 1; a.m = 1",
        "a.n += 1; return a.m",
        "a.m = 2",
        "global 'a'",
    ),
    "a tensor's add": (
        "class T:\n    def __init__(self, n): self.n = n\n    def add(self, x): return T(self.n + x)\nt = T(1)",
        "return t.add(1)",
        "t.n = 2",
        "global 't'",
    ),
    "local of the same name": ("log = [1]", "def g():\n        log = []; log.append(1)\n    return log", "log[0] = 2",
                               "global 'log'"),
    "a tensor in a table": (
        "class T:\n    def __init__(self, n): self.n = n\n    def add(self, x): return T(self.n + x)\nts = {'a': T(1)}",
        "return ts['a'].add(1)",
        "ts['a'].n = 2",
        "global 'ts'",
    ),
    "nothing yet": ("", "return K", "K = 1", "global 'K'"),
    "default of a lazy method": (
        "class A:\n    def f(self):\n        if self.k is None: self.k = 10\n        return self.k\na = A(); a.k = 2",
        "return a.f()",
        "a.k = 3",
        "global 'a'",
    ),
    "default of a lazy method, set by another": (
        ("class A:\n    def load(self): self.k = 10\n    def f(self):\n        if self.k is None: self.load()\n"
        "        return self.k\na = A(); a.k = 2"),
        "return a.f()",
        "a.k = 3",
        "global 'a'",
    ),
    "default by or": (
        "class A:\n    def f(self):\n        self.k = self.k or 10\n        return self.k\na = A(); a.k = 2",
        "return a.f()",
        "a.k = 3",
        "global 'a'",
    ),
    "default from outside": (
        "class A: pass\na = A(); a.k = 2",
        "a.k = 10 if a.k is None else a.k; return a.k",
        "a.k = 3",
        "global 'a'",
    ),
    "docstring": ("def g(): 'one'", "return g.__doc__", "g.__doc__ = 'two'", "attribute '__doc__' of global 'g'"),
    "unused method that writes": (
        "class A:\n    w = 1\n    def fit(self): self.w = 5\n    def use(self): return self.w\na = A(); a.w = 2",
        "return a.use()",
        "a.fit()",
        "global 'a'",
    ),
}  # fmt: skip

WRITTEN = {
    "append": ("log = []", "log.append(x)"),
    "item": ("seen = {}", "seen[x] = 1"),
    "deleted item": ("seen = {1: 1, 2: 2}", "del seen[x]"),
    "augmented item": ("from collections import Counter\nn = Counter()", "n[x] += 1"),
    "deep item": ("seen = {'a': {}}", "seen['a'][x] = 1"),
    "slice": ("seen = [1, 2]", "seen[0:1] = [x, x]"),
    "set": ("seen = set()", "seen.add(x)"),
    "deque": ("from collections import deque\nrecent = deque()", "recent.appendleft(x)"),
    "setdefault": ("seen = {}", "seen.setdefault(x, []).append(1)"),
    "through a subscript": ("logs = {'a': []}", "logs['a'].append(x)"),
    "global": ("n = 0", "global n; n += 1"),
    "attribute": ("class A: n = 0\na = A(); a.n = 0", "a.n += 1"),
    "class attribute": ("class A: n = 0", "A.n += 1"),
    "attribute's list": ("class A: pass\na = A(); a.log = []", "a.log.append(x)"),
    "method that writes": ("class A:\n    def hit(self): self.n += 1\na = A(); a.n = 0", "a.hit()"),
    "method that notes": (
        "class A:\n    def hit(self, x):\n        self.last = x\n        return self.last\na = A(); a.last = 0",
        "a.hit(x)",
    ),
    "noted and shown": (
        (
            "class A:\n    def hit(self, x): self.last = x\n    def __repr__(self): return str(self.last)\n"
            "a = A(); a.last = 0"
        ),
        "a.hit(x)",
    ),
    "method that appends": ("class A:\n    def hit(self): self.log.append(1)\na = A(); a.log = []", "a.hit()"),
    "class method that writes": ("class A:\n    n = 0\n    @classmethod\n    def hit(cls): cls.n += 1", "A.hit()"),
    "callable object": ("class A:\n    def __call__(self, x): self.n += 1\na = A(); a.n = 0", "a(x)"),
    "attribute of a function": ("", "f.n = getattr(f, 'n', 0) + 1"),
    "in a helper": ("log = []\ndef g(x): log.append(x)", "g(x)"),
    "in a nested function": ("log = []", "(lambda: log.append(x))()"),
    "in a comprehension": ("log = []", "[log.append(y) for y in [x]]"),
    "under another name": ("log = []\nother = log", "log.append(x); return len(other)"),
    "heap": ("import heapq\nheap = []", "heapq.heappush(heap, x)"),
    "lazily made": ("made = None", "global made\n    if made is None: made = {}\n    made[x] = 1"),
    "for target": ("class A: pass\na = A(); a.n = 0", "for a.n in (1, 2): pass"),
    "with target": ("import contextlib\nd = {}", "with contextlib.nullcontext(x) as d[x]: pass"),
}


def made_from(setup, body):
    """Like a module, with an `f` whose body this is, and with its source or without."""
    text = f"{setup}\ndef f(x=1):\n    {body}\n"
    with_source = {"__name__": "captured", "__builtins__": builtins}
    cell(text, f"captured_{hash(text)}", with_source)
    without = {"__name__": "captured", "__builtins__": builtins}
    exec(text, without)
    return with_source, without


@pytest.mark.parametrize("name", READ)
def test_what_code_reads_counts_as_it_is_now(name):
    setup, body, change, part = READ[name]
    for names in made_from(setup, body):
        before = fingerprint(names["f"])
        exec(change, names)
        parts = changed(fingerprint(names["f"]), before)
        assert part in {each.removesuffix(" (module 'captured')") for each in parts}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_code_writes_does_not_count(name):
    for names in made_from(*WRITTEN[name]):
        before = fingerprint(names["f"])
        names["f"](1)
        names["f"](2)
        assert changed(fingerprint(names["f"]), before) == set()


def test_what_a_function_keeps_in_a_default_is_state():
    for names in made_from("", "pass\ndef f(x, seen={}, k=[1]):\n    seen[x] = k"):
        before = fingerprint(names["f"])
        names["f"](1)
        assert fingerprint(names["f"]) == before
        names["f"].__defaults__[1].append(2)
        assert changed(fingerprint(names["f"]), before) == {"default of 'k' of 'f'"}


def test_functions_of_one_factory_are_told_apart_by_what_uses_them():
    setup = "def make(k):\n    return lambda: k\none, two = make(1), make(2)"
    for names in made_from(setup, "return one() - two()"):
        before = fingerprint(names["f"])
        names["one"], names["two"] = names["two"], names["one"]
        assert fingerprint(names["f"]).digest != before.digest
        exec("one, two = make(1), make(2)", names)
        assert fingerprint(names["f"]) == before


def test_functions_swapped_between_two_names_are_told_apart():
    for names in made_from("def one(): return 1\ndef two(): return 2", "return one() - two()"):
        before = fingerprint(names["f"])
        names["one"], names["two"] = names["two"], names["one"]
        assert changed(fingerprint(names["f"]), before) == {
            "global 'one' (module 'captured')",
            "global 'two' (module 'captured')",
        }


def test_fields_of_attrs_classes_count_with_their_options():
    attrs = pytest.importorskip("attrs")

    def make(default=1, factory=list, converter=None):
        @attrs.define
        class Doc:
            n: int = attrs.field(default=default, converter=converter)
            tags: list = attrs.field(factory=factory)

        return lambda: Doc()

    before = fingerprint(make())
    assert fingerprint(make()) == before
    for edit in ({"default": 2}, {"factory": set}, {"converter": int}):
        assert [each.partition(" (")[0] for each in changed(fingerprint(make(**edit)), before)] == [
            f"class '{make.__qualname__}.<locals>.Doc'"
        ]


def test_constraints_and_validators_of_pydantic_models_count():
    pydantic = pytest.importorskip("pydantic")

    def make(at_least=1, default=1, checked="n"):
        class Doc(pydantic.BaseModel):
            n: int = pydantic.Field(default, ge=at_least)
            m: int = 1

            @pydantic.field_validator(checked)
            @classmethod
            def check(cls, value):
                return value

        return lambda: Doc()

    before = fingerprint(make())
    assert fingerprint(make()) == before
    for edit in ({"at_least": 0}, {"default": 2}, {"checked": "m"}):
        assert [each.partition(" (")[0] for each in changed(fingerprint(make(**edit)), before)] == [
            f"class '{make.__qualname__}.<locals>.Doc'"
        ]


def test_closure_variables_that_are_rebound_are_state_and_others_are_not():
    def make(step):
        count, log = 0, []

        def f():
            nonlocal count
            count += step
            log.append(count)

        return f

    one, two, other = make(1), make(1), make(2)
    one()
    assert fingerprint(one) == fingerprint(two)
    assert {each.partition(" of ")[0] for each in changed(fingerprint(one), fingerprint(other))} == {
        "closure variable 'step'"
    }


def test_what_can_neither_be_hashed_nor_followed_counts_by_its_class(tmp_path):
    class Client:
        def __init__(self, model):
            self.model, self.lock = model, threading.Lock()

        def ask(self):
            return self.model

    def make():
        lock, file, logger = threading.Lock(), (tmp_path / "file").open("w"), logging.getLogger("asked")
        client, table = Client("small"), {"k": 1, "clients": [Client("large")]}

        def f():
            logger.info("asked")
            with lock:
                return client.ask(), table["clients"][0].ask(), table["k"], file.read()

        file.close()
        return f, client, table

    f, client, table = make()
    found = fingerprint(f)
    assert found == fingerprint(make()[0])
    assert {re.sub(r" of '.*f'", "", each) for each in found.opaque} == {
        "closure variable 'lock': _thread.lock",
        "closure variable 'logger': logging.Logger",
        "closure variable 'file': _io.TextIOWrapper",
        "closure variable 'client'.lock: _thread.lock",
        "closure variable 'table'['clients'][0].lock: _thread.lock",
    }
    # What can be hashed beside it still counts.
    for holder, change in ((table, {"k": 2}), (client.__dict__, {"model": "other"})):
        before = fingerprint(f)
        holder.update(change)
        assert len(changed(fingerprint(f), before)) == 1


class Scale:
    """An object all of whose state is private."""

    def __init__(self, factor, offset=None, lock=None):
        self._factor, self._offset, self._calls, self._lock = factor, offset, 0, lock

    def __call__(self, x):
        self._calls += 1
        if self._offset is None:
            self._offset = 0
        return x * self._factor + self._offset

    scale = __call__


class Slotted:
    """The same in a slot."""

    __slots__ = ("_factor",)

    def __init__(self, factor):
        self._factor = factor

    def scale(self, x):
        return x * self._factor


class PrivateOnly:
    """What it is made with, nobody else can see."""

    def __init__(self, factor):
        self._factor = factor

    def scale(self, x):
        return x * self._factor


def test_the_private_attributes_of_an_object_whose_method_runs_count():
    def called(scale):
        return fingerprint(lambda x: scale(x))

    ways = {
        "method": lambda *args: fingerprint(Scale(*args).scale),
        "method that is called": lambda *args: called(Scale(*args).scale),
        "callable object": lambda *args: fingerprint(Scale(*args)),
        "callable object that is called": lambda *args: called(Scale(*args)),
    }
    for way, make in ways.items():
        assert make(2) == make(2) != make(3), way
        assert make(2, 1) != make(2, 2), way
        assert make(2).opaque == (), way
    assert fingerprint(Slotted(2).scale) == fingerprint(Slotted(2).scale) != fingerprint(Slotted(3).scale)


def test_private_attributes_that_methods_count_with_do_not_count():
    scale = Scale(2, 1)
    before = fingerprint(scale.scale)
    scale(1)
    assert fingerprint(scale.scale) == before


def test_a_private_attribute_that_cannot_be_hashed_is_opaque():
    found = fingerprint(Scale(2, 0, threading.Lock()).scale)
    assert found.opaque == ("self of method 'Scale.__call__'._lock: _thread.lock",)
    assert found == fingerprint(Scale(2, 0, threading.Lock()).scale)


def test_a_captured_object_with_nothing_but_private_attributes_is_opaque():
    scale, table = Slotted(2), {"k": PrivateOnly(2)}
    found = fingerprint(lambda x: table["k"].scale(x) + scale.scale(x))
    assert {re.sub(r" of '.*>'", "", each) for each in found.opaque} == {
        f"closure variable 'scale': {__name__}.Slotted",
        f"closure variable 'table'['k']: {__name__}.PrivateOnly",
    }


def test_how_a_logger_is_set_up_does_not_count():
    def f():
        logger.info("asked")

    logger = logging.Logger("alone")  # noqa: LOG001 - one without handlers, which could not be hashed
    before = fingerprint(f)
    logger.setLevel(logging.DEBUG)
    assert fingerprint(f) == before


# ---- other code


def test_packages_count_by_their_version_and_the_standard_library_by_pythons(monkeypatch):
    import numpy

    def f(x):
        return numpy.mean(x), json.dumps(x), pytest.approx(x)

    before = fingerprint(f)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = {each for each in before.parts if each.startswith(("package", "Python"))}
    assert names == {
        f"package 'numpy' {numpy.__version__}",
        f"package 'pytest' {pytest.__version__}",
        f"Python {version}",
    }

    installed = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Newer(installed(name)))
    origin._parts_of.cache_clear()
    assert "package 'numpy' 99" in changed(fingerprint(f), before)
    origin._parts_of.cache_clear()


class Newer:
    """A distribution of another version."""

    def __init__(self, installed):
        self.read_text = lambda name: re.sub(r"\nVersion: .*", "\nVersion: 99", installed.read_text(name) or "")


def test_a_module_is_found_in_a_distribution_of_another_name():
    import dateutil.parser

    version = importlib.metadata.version("python-dateutil")
    assert list(origin.foreign_parts(dateutil.parser.__name__)) == [f"package 'python-dateutil' {version}"]


def test_functions_of_one_package_are_told_apart():
    assert fingerprint(json.dumps) != fingerprint(json.loads)
    assert fingerprint(len) != fingerprint(max)
    assert fingerprint("a".join) != fingerprint("b".join)
    assert fingerprint(str.lower) != fingerprint(str.upper)


def test_hypernodes_itself_counts_by_its_version():
    import hypernodes

    def f():
        return hypernodes.RetryPolicy(attempts=2)

    assert f"package 'hypernodes' {hypernodes.__version__}" in fingerprint(f).parts
    assert not any(each.startswith("class") for each in fingerprint(f).parts)


THIRD = """
def twice(f):
    def inner(x):
        return f(f(x))
    return inner

def chained(*functions, start=0):
    calls = 0
    def inner(x):
        nonlocal calls
        calls += 1
        for f in functions:
            x = f(x + start)
        return x
    return inner

class Tool:
    def __init__(self, f):
        self.title, self._f = "tool", f
    def __call__(self, x):
        return self._f(x)
"""


@pytest.fixture
def third(tmp_path, monkeypatch):
    """An installed package."""
    name = f"third_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / "site-packages"
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(THIRD)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "RECORD").write_text(f"{name}/__init__.py,,\n")
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def edited(text):
    """A function `g`, as it is written."""
    names = {"__name__": "edited"}
    exec(text, names)
    return names["g"]


G = "def g(x):\n    return x + 1"
AROUND = {
    "closure": lambda third, g: third.twice(g),
    "several": lambda third, g: third.chained(abs, g),
    "around another": lambda third, g: third.twice(third.twice(g)),
    "private attribute": lambda third, g: third.Tool(g),
    "wrapped": lambda third, g: functools.wraps(abs)(third.chained(abs, g)),
    "numpy.vectorize": lambda third, g: pytest.importorskip("numpy").vectorize(g),
    "numpy.frompyfunc": lambda third, g: pytest.importorskip("numpy").frompyfunc(g, 1, 1),
}


@pytest.mark.parametrize("how", AROUND)
def test_what_somebody_elses_code_holds_of_the_project_counts(third, how):
    def found(text):
        held = AROUND[how](third, edited(text))
        return fingerprint(lambda x: held(x)), fingerprint(held)

    before = found(G)
    assert found(G) == before
    for old, new in zip(before, found(G.replace("1", "2")), strict=True):
        assert "function 'g' (module 'edited')" in changed(new, old)


def test_what_somebody_elses_function_was_made_with_counts_but_for_what_it_counts_itself(third):
    def found(start, calls=0):
        held = third.chained(edited(G), start=start)
        for _ in range(calls):
            held(1)
        return fingerprint(held)

    assert found(1) == found(1, calls=2) != found(2)


def test_compiled_functions_count_by_name_and_by_the_package_that_has_them():
    numpy = pytest.importorskip("numpy")
    found = fingerprint(lambda x: numpy.sin(x))
    assert found.opaque == fingerprint(numpy.sin).opaque == ()
    assert fingerprint(numpy.sin) != fingerprint(numpy.cos)
    assert fingerprint(numpy.frompyfunc(abs, 1, 1)).opaque == ("numpy.ufunc 'abs (vectorized)'",)


# ---- nodes that are called


def test_the_version_and_dependencies_of_a_node_count_for_what_calls_it(tmp_path):
    def found(version=None, text="1"):
        data = tmp_path / "data.txt"
        data.write_text(text)

        @node("cleaned", version=version, depends_on=[data])
        def clean(text):
            return text

        class Job:
            @node("held", version=version, depends_on=[data])
            def held(self, text):
                return text

        inner = Pipeline([clean])
        return {
            "a call": fingerprint(lambda text: clean(text)),
            "a pipeline": fingerprint(lambda text: inner.run(text=text)),
            "a table": fingerprint(lambda text, nodes=(clean,): nodes[0](text)),
            "a class": fingerprint(lambda text: Job().held(text)),
        }

    before = found(1)
    assert found(1) == before
    assert not any(name.startswith("version") for name in found()["a call"].parts)
    for how, newer in found(2).items():
        assert {each.partition(" of ")[0] for each in changed(newer, before[how])} == {"version"}, how
    for how, newer in found(1, text="other").items():
        assert len(changed(newer, before[how])) == 1, how
        assert changed(newer, before[how]).pop().startswith("depends_on"), how


# ---- code inside of values


def test_code_in_values_counts_as_what_it_does():
    def make(k):
        return lambda x: x + k

    assert hash_code(make(1)) == hash_code(make(1)) != hash_code(make(2))
    assert hash_value({"f": [make(1)]}) == hash_value({"f": [make(1)]}) != hash_value({"f": [make(2)]})
    assert hash_code(functools.partial(make, 1)) != hash_code(functools.partial(make, 2))
    assert hash_code(Edit) != hash_code(dict)
    assert hash_code(json) != hash_code(os)


def deeper_down(levels, call, argument):
    return deeper_down(levels - 1, call, argument) if levels else call(argument)


def test_a_function_that_reaches_itself_through_a_value_has_a_fingerprint():
    class Registry:
        def __init__(self):
            self.functions = []

    def f():
        return registry.functions

    registry = Registry()
    registry.functions.append(f)
    before = fingerprint(f)
    assert all(before == deeper_down(n, fingerprint, f) for n in range(25))  # however much of the stack is left
    assert before.opaque == ()
    registry.functions.append(len)
    assert fingerprint(f) != before


def test_many_threads_may_ask_at_once(module):
    text = "".join(f"def f{n}(x):\n    return x + {n}, f{(n + 1) % 40}\n\n" for n in range(40))
    expected = [list(fingerprint(getattr(module(text), f"f{n}")).parts.values()) for n in range(40)]
    loaded = module(text)
    start = threading.Barrier(8)

    def ask(n):
        start.wait(5)
        return [list(fingerprint(getattr(loaded, f"f{each}")).parts.values()) for each in range(n, 40, 8)]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(8)))
    assert all(found[n % 8][n // 8] == expected[n] for n in range(40))


def test_what_is_known_of_code_goes_with_it(module):
    loaded = module("def f(x):\n    return x\n")
    fingerprint(loaded.f)
    address = id(loaded.f.__code__)
    assert address in _known
    del loaded.f
    gc.collect()
    assert address not in _known


# ---- depends_on


def test_files_and_folders_count_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("1")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a.txt").write_text("a")
    asked = ["data.json", tmp_path / "folder", 3, make_nothing]
    before = hash_dependencies(asked)
    folder = f"depends_on {str(tmp_path / 'folder')!r}"
    assert list(before) == ["depends_on 'data.json'", folder, "depends_on[2]", "depends_on 'make_nothing'"]
    assert hash_dependencies(asked) == before

    os.utime(tmp_path / "data.json", ns=(0, 0))
    assert hash_dependencies(asked) == before
    (tmp_path / "data.json").write_text("2")
    os.utime(tmp_path / "data.json", ns=(0, 0))
    after = hash_dependencies(asked)
    assert {each for each in before if before[each] != after[each]} == {"depends_on 'data.json'"}

    for change in (
        lambda: (tmp_path / "folder" / "inner" / "a.txt").write_text("b"),
        lambda: (tmp_path / "folder" / "inner" / "a.txt").rename(tmp_path / "folder" / "a.txt"),
        lambda: (tmp_path / "folder" / "b.txt").touch(),
    ):
        before = hash_dependencies(asked)
        change()
        after = hash_dependencies(asked)
        assert {each for each in before if before[each] != after[each]} == {folder}


def test_folders_count_through_links_also_where_these_lead_in_a_circle(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a.txt").write_text("a")
    (folder / "train").symlink_to(elsewhere)
    (folder / "back").symlink_to(folder)
    (elsewhere / "up").symlink_to(folder)
    seen = [hash_dependencies([folder])]
    assert hash_dependencies([folder]) == seen[0]

    (elsewhere / "a.txt").write_text("edited")
    seen.append(hash_dependencies([folder]))
    (folder / "validation").symlink_to(elsewhere)
    seen.append(hash_dependencies([folder]))
    (folder / "validation").unlink()
    (folder / "validation").symlink_to(folder)
    seen.append(hash_dependencies([folder]))
    assert len({*(digest for each in seen for digest in each.values())}) == len(seen)


def make_nothing():
    return None


def test_a_missing_file_is_named():
    with pytest.raises(UncacheableError, match=r"depends_on 'missing.json' \(in '.*'\): No such file or directory"):
        hash_dependencies(["missing.json"])
    with pytest.raises(UncacheableError, match=r"depends_on\[1\]"):
        hash_dependencies([1, threading.Lock()])
