"""What a fingerprint of code depends on: every edit that can change a result, none that cannot, the code that runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
PROJECT = HERE / "fingerprint_project"


class Edit(NamedTuple):
    """Text that is replaced in a file of the project, and the parts of the fingerprint that must change."""

    file: str
    old: str
    new: str
    changed: tuple[str, ...] = ()


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
    "attribute of a module's module": Edit("pkg/numbers.py", "= 30", "= 33", ("global 'DEPTH' (module 'pkg.numbers')",)),
    "helper": Edit("tools.py", "+ [BASE]", "+ [BASE, 0]", ("function 'helper' (module 'tools')",)),
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
    "method into property": Edit("job.py", "@classmethod\n    def named(cls", "@property\n    def named(cls", (ENCODER,)),
    "class attribute": Edit("job.py", "dim = 4", "dim = 5", (ENCODER,)),
    "function as a class attribute": Edit("tools.py", '"built"', '"build"', ("function 'build' (module 'tools')",)),
    "method of a base class": Edit("job.py", "return 10", "return 12", ("class 'Base' (module 'job')",)),
    "attribute of a base class": Edit("job.py", "ratio = 0.1", "ratio = 0.2", ("class 'Base' (module 'job')",)),
    "other base class": Edit("job.py", "Encoder(Base, ", "Encoder(", (ENCODER, "class 'Base' (module 'job')")),
    "metaclass": Edit("job.py", "__call__(*args)", "__call__(*args[:1])", ("class 'Meta' (module 'job')",)),
    "default of a field": Edit("job.py", "score: float = 0.5", "score: float = 0.6", ("class 'Doc' (module 'job')",)),
    "type of a field": Edit("job.py", "score: float", "score: int", ("class 'Doc' (module 'job')",)),
    "field option": Edit(
        "job.py", "default_factory=make_tags", "default_factory=make_tags, compare=False", ("class 'Doc' (module 'job')",)
    ),
    "dataclass option": Edit("job.py", "@dataclass\n", "@dataclass(order=True)\n", ("class 'Doc' (module 'job')",)),
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
    "line breaks": Edit("job.py", "(helper(words), resized(label)", "(\n            helper(words),\n  resized( label )"),
    "quotes": Edit("job.py", '"{text!r:>10}"', "'{text!r:>10}'"),
    "parentheses": Edit("job.py", "return x.upper()", "return (x).upper()"),
    "annotations": Edit("job.py", 'job(text, top_k=5, *, sep=" "):', 'job(text: str, top_k: "int"=5, *, sep=" ")->"x":'),
    "annotation of a local variable": Edit("job.py", "words: list = ", "words = "),
    "moved down": Edit("job.py", "LIMIT = 3", "\n\n\n\nLIMIT = 3"),
    "unused function": Edit("job.py", "def unused(x):\n    return x", "def unused(x):\n    return [x]"),
    "unused global": Edit("job.py", "UNUSED = 1", "UNUSED = 2"),
    "unused attribute of a module": Edit("consts.py", "OTHER = 1", "OTHER = 2"),
    "unused name of a module imported in the body": Edit("lazy_names.py", "OTHER = 21", "OTHER = 22"),
    "other import": Edit("consts.py", "import pkg.numbers as nested", "import os\nimport pkg.numbers as nested"),
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
    "how many lines": Edit("tools.py", "    def multiply(x):\n        return", "    def multiply(x):\n\n\n        return"),
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
