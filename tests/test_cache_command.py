"""``hypernodes cache``: what it prints of a cache directory, what it deletes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypernodes import DiskCache, Pipeline, node
from hypernodes._cli import main
from hypernodes.cache._envelope import seal

ROOT = Path(__file__).parent.parent
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="terminals are POSIX here")


@node("double")
def twice(number: int) -> int:
    return 2 * number


@node("text")
def written(double: int) -> str:
    return "x" * double


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache with the results of two nodes for ten items."""
    monkeypatch.delenv("HYPERNODES_CACHE_KEY", raising=False)
    path = str(tmp_path / "cache")
    filled(path)
    return path


def filled(path: str, **options) -> None:
    pipeline = Pipeline([twice, written], cache=DiskCache(path, **options))
    pipeline.map({"number": range(10)}, map_over="number")


def packs(path: str) -> list[Path]:
    return sorted(Path(path, "packs").iterdir())


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run ``hypernodes cache``; gives exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["cache", *arguments])
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_ls_shows_each_result_with_node_size_and_key(folder, call):
    code, out, err = call("ls", folder)
    head, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split() == ["node", "size", "stored", "took", "key"]
    assert len(rows) == 20
    row = re.compile(r"(twice|written) +\d+ bytes  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d +[\d.]+ (µs|ms|s)  [0-9a-f]{64}")
    assert all(row.fullmatch(each) for each in rows), out
    assert len({each.split()[-1] for each in rows}) == 20


def test_ls_shows_what_a_terminal_would_obey(folder, call):
    """Whoever may write a cache cannot retitle, clear or turn around the terminal of who looks into it."""
    key, name = "0" * 64, "\x1b]0;owned\x07\x1b[2J\u202edouble\udc80"
    meta = json.dumps({"node": name, "at": 1, "seconds": 1}).encode()
    DiskCache(folder).write({key: seal(key, 1, meta, [b"x"], None)})
    for arguments in (["ls", folder], ["stats", folder], ["ls", folder, "--node", "none"]):
        _, out, err = call(*arguments)
        assert r"\x1b]0;owned\x07\x1b[2J\u202edouble\udc80" in out + err
        assert (out + err).replace("\n", "").isprintable()
    _, out, _ = call("ls", folder, "--node", name, "--json")
    assert json.loads(out)["node"] == name


@pytest.mark.parametrize(
    "meta", [b"[" * 100_000, b'{"node": "twice", "seconds": 1' + b"0" * 400 + b"}"], ids=["deep", "high"]
)
def test_ls_of_what_cannot_be_read(folder, call, meta):
    """What is said of an entry may be anything; the others are listed."""
    key = "0" * 64
    DiskCache(folder).write({key: seal(key, 1, meta, [b"x"], None)})
    code, out, err = call("ls", folder)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 22
    assert "(cannot be read)" in out


def test_ls_can_be_of_one_node_and_of_the_newest(folder, call):
    _, out, _ = call("ls", folder, "--node", "written", "--limit", "3")
    assert [line.split()[0] for line in out.splitlines()] == ["node", "written", "written", "written"]


def test_ls_puts_the_newest_first(folder, call):
    Pipeline([written], cache=DiskCache(folder)).run(double=500)
    _, out, _ = call("ls", folder, "--limit", "1", "--json")
    newest = json.loads(out)
    assert newest["size"] > 500
    _, out, _ = call("ls", folder, "--json")
    times = [json.loads(line)["stored_at"] for line in out.splitlines()]
    assert times == sorted(times, reverse=True)


def test_ls_as_json_has_the_keys_under_which_a_store_finds_the_results(folder, call):
    _, out, _ = call("ls", folder, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    found = DiskCache(folder).read([row["key"] for row in rows])
    assert {key: len(value) for key, value in found.items()} == {row["key"]: row["size"] for row in rows}
    assert {row["node"] for row in rows} == {"twice", "written"}
    assert all(row["seconds"] >= 0 for row in rows)


def test_ls_of_a_node_that_has_no_results_names_those_that_have(folder, call):
    code, out, err = call("ls", folder, "--node", "twcie")
    assert (code, out) == (1, "")
    assert err == f"hypernodes: {folder} has no result of a node 'twcie': it has results of twice, written\n"


def test_stats_counts_by_node_and_in_all(folder, call):
    code, out, err = call("stats", folder)
    assert (code, err) == (0, "")
    assert re.match(r"22 entries, [\d.]+ kB, in \d files? of [\d.]+ kB\nstored from 20", out)
    counted = dict(re.findall(r"^(twice|written|\(what explain\(\) remembers\)) +(\d+) ", out, re.MULTILINE))
    assert counted == {"twice": "10", "written": "10", "(what explain() remembers)": "2"}


def test_stats_as_json_agrees_with_the_cache(folder, call):
    _, out, _ = call("stats", folder, "--json")
    told, stats = json.loads(out), DiskCache(folder).stats()
    assert told["entries"] == stats.entries == sum(each["entries"] for each in told["nodes"]) == 22
    assert told["entry_bytes"] == stats.entry_bytes == sum(each["bytes"] for each in told["nodes"])
    assert (told["files"], told["file_bytes"], told["unreadable"]) == (stats.files, stats.file_bytes, 0)


def test_a_cache_with_a_key_is_listed_without_it(tmp_path, call):
    path = str(tmp_path / "signed")
    filled(path, key=b"secret")
    assert call("ls", path)[1].count("twice") == 10


def test_verify_says_that_all_is_whole(folder, call):
    assert call("verify", folder) == (0, "22 entries checked, 0 damaged\n", "")


def flip_a_bit(folder: str) -> None:
    """In the last byte of a pack: of the payload of its last entry."""
    file = packs(folder)[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_verify_names_what_is_damaged_and_exits_with_1(folder, call):
    flip_a_bit(folder)
    code, out, err = call("verify", folder)
    assert (code, err) == (1, "")
    assert re.search(r"^packs/\S+: \S+: damaged: the checksum is wrong$", out, re.MULTILINE)
    assert out.endswith("22 entries checked, 1 damaged\n")


def test_verify_can_drop_what_is_damaged(folder, call):
    flip_a_bit(folder)
    code, out, _ = call("verify", folder, "--repair")
    assert code == 0
    assert out.endswith("22 entries checked, 1 damaged, 1 dropped\n")
    assert call("verify", folder)[:2] == (0, "21 entries checked, 0 damaged\n")


def test_verify_does_not_call_damaged_what_another_key_has_signed(tmp_path, call, monkeypatch):
    path = str(tmp_path / "signed")
    filled(path, key=b"secret")
    code, out, _ = call("verify", path)
    assert code == 0
    assert "22 cannot be opened here: signed with a key that this cache does not have\n" in out
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "secret")
    assert call("verify", path)[1] == "22 entries checked, 0 damaged\n"


def test_prune_keeps_what_it_is_told_to_keep(folder, call):
    assert call("prune", folder)[1].startswith("0 entries removed, 0 bytes in 0 files; ")
    code, out, _ = call("prune", folder, "--max-size", "10MB")
    assert (code, out.startswith("0 entries removed")) == (0, True)
    code, out, _ = call("prune", folder, "--max-size", "1")
    assert code == 0
    assert out.startswith("22 entries removed, ")
    assert out.endswith("; 0 bytes left\n")
    assert DiskCache(folder).stats().entries == 0


def test_a_size_that_is_none_is_wrong_usage(folder, call):
    code, _, err = call("prune", folder, "--max-size", "much")
    assert code == 2
    assert "argument --max-size: 'much' is no size such as" in err


def test_clear_deletes_everything_when_told_yes(folder, call):
    code, out, err = call("clear", folder, "--yes")
    assert (code, err) == (0, "")
    assert out.startswith("22 entries removed, ")
    assert DiskCache(folder).stats().entries == 0
    assert call("stats", folder)[:2] == (0, "0 entries, 0 bytes, in 0 files of 0 bytes\n")


def cleared(folder: str, answer: str) -> tuple[int, str]:
    """``hypernodes cache clear`` on a terminal where this is typed; gives the exit code and what stood there."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hypernodes", "cache", "clear", folder]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    seen = ""
    try:
        while "[y/N] " not in seen:
            seen += os.read(ours, 1024).decode()
        os.write(ours, f"{answer}\n".encode())
        while piece := os.read(ours, 1024).decode():
            seen += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(50), seen


@posix_only
@pytest.mark.parametrize("answer", ["", "n", "nonsense"])
def test_clear_asks_on_a_terminal_and_deletes_nothing_without_a_yes(folder, answer):
    code, seen = cleared(folder, answer)
    assert code == 1
    assert re.match(r"Delete all 22 entries \([\d.]+ kB\) of \S+\? \[y/N\] ", seen)
    assert "hypernodes: nothing was deleted" in seen
    assert DiskCache(folder).stats().entries == 22


@posix_only
@pytest.mark.parametrize("answer", ["y", "YES"])
def test_clear_deletes_when_the_answer_is_yes(folder, answer):
    code, seen = cleared(folder, answer)
    assert code == 0
    assert "22 entries removed" in seen
    assert DiskCache(folder).stats().entries == 0


def test_clear_without_a_terminal_refuses(folder, call, monkeypatch):
    with open(os.devnull, encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        code, out, err = call("clear", folder)
    assert (code, out) == (1, "")
    assert err == "hypernodes: clear deletes all results, and nobody can be asked here: say --yes\n"
    assert DiskCache(folder).stats().entries == 22


@pytest.mark.parametrize("action", ["ls", "stats", "verify", "prune", "clear"])
def test_a_path_that_is_no_cache_is_one_line_and_left_as_it_is(tmp_path, call, action):
    yes = ["--yes"] if action == "clear" else []
    nothing, empty, other = tmp_path / "nothing", tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    precious = other / "thesis.tex"
    precious.write_text("years of work")
    for path, complaint in [
        (nothing, "there is no cache at "),
        (empty, "there is no cache at "),
        (other, "holds other files and is not a hypernodes cache"),
        (precious, "is not a directory"),
    ]:
        code, out, err = call(action, str(path), *yes)
        assert (code, out) == (1, "")
        assert err.startswith("hypernodes: ")
        assert complaint in err
        assert err.count("\n") == 1
    assert not nothing.exists()
    assert list(empty.iterdir()) == []
    assert precious.read_text() == "years of work"


def test_a_cache_that_others_may_write_can_be_looked_at(folder, call):
    os.chmod(folder, 0o777)
    assert call("stats", folder)[0] == 0
    assert call("clear", folder, "--yes")[0] == 0


def test_looking_at_a_cache_runs_no_code_from_it(folder, tmp_path, call):
    ran = tmp_path / "ran"

    @node("trap")
    def trap(number: int) -> object:
        return Trap(str(ran))

    Pipeline([trap], cache=DiskCache(folder)).run(number=1)
    for action in ("ls", "stats", "verify"):
        assert call(action, folder)[0] == 0
    assert "trap" in call("ls", folder)[1]
    assert not ran.exists()
    refreshed = Pipeline([trap], cache=DiskCache(folder)).run(number=1)
    assert ran.exists(), "only a run loads results"
    assert refreshed["trap"] is None


class Trap:
    """Unpickling one creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_help_says_what_each_command_does(call):
    code, out, _ = call("--help")
    assert code == 0
    for action in ("ls", "stats", "verify", "prune", "clear"):
        assert re.search(rf"^ +{action} ", out, re.MULTILINE)
        code, described, _ = call(action, "--help")
        assert code == 0
        assert f"usage: hypernodes cache {action} " in described


def test_a_command_or_path_that_is_left_out_is_wrong_usage(call):
    assert call()[0] == 2
    assert call("ls")[0] == 2
    assert call("lss", "x")[0] == 2


def test_the_command_works_in_a_process_of_its_own(folder):
    command = [sys.executable, "-W", "error", "-m", "hypernodes", "cache", "stats", folder]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50, cwd=ROOT)
    assert answer.stdout.startswith("22 entries")
    assert answer.stderr == ""
