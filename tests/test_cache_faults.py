"""Caches that lose, damage or forge entries, that fail, and values that cannot be kept: runs go on and are right."""

import errno
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import anyio
import psutil
import pytest

from hypernodes import DiskCache, Pipeline, node
from hypernodes.cache._envelope import seal
from hypernodes.events import CacheRefused, NodeStored
from tests import _caching
from tests._caching import in_order, opened, tally, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran, warned = _caching.cache, _caching.ran, _caching.warned  # pytest finds fixtures among a module's names

ROOT = Path(__file__).parent.parent


class Memory:
    """A store in memory, with an accident between what it finds and what it gives."""

    def __init__(self, accident=None, key=None):
        self.entries = {}
        self.accident = accident
        self.key = key

    async def find_many(self, keys):
        return [key for key in keys if key in self.entries]

    async def get_many(self, keys):
        found = {key: self.entries[key] for key in keys if key in self.entries}
        if self.accident is not None:
            found = {key: data for key, data in self.accident(found).items() if data is not None}
        return found

    async def set_many(self, entries):
        for key, entry in entries.items():
            self.entries[key] = entry if isinstance(entry, bytes) else b"".join(bytes(part) for part in entry)

    def results(self):
        """The entries that are results, not histories."""
        return {key: data for key, data in self.entries.items() if not key.startswith("ledger-")}


def three(ran, size=0):
    """Three nodes in a row; those after the first need its value, of which they tell whether it is right."""

    @node("a")
    async def first(x):
        ran.note("first", x)
        return [x, "." * size]

    @node("b")
    async def second(a):
        ran.note("second", a[0])
        return [*a, "b"]

    @node("c")
    async def third(b):
        ran.note("third", b[0])
        return [*b, "c"]

    return Pipeline([first, second, third], name="three")


# ---- entries that vanish or are damaged between lookup and load


def flipped(data):
    position = len(data) * 2 // 3
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


ACCIDENTS = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "bit-flipped": flipped,
    "header flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "other": lambda data: b"something else altogether, which is no envelope at all",
}


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("way", ["run", "map", "nested map", "stream"])
async def test_an_entry_that_cannot_be_used_is_computed_again(way, accident, ran):
    """Whatever happens to entries after they were found, the result is right and what is needed is computed again."""
    store = Memory()
    pipeline = three(ran)
    nested = Pipeline([pipeline.as_node({"xs": "x"}, {"b": "bs", "c": "cs"}, map_over="xs", name="every")])

    async def run():
        if way == "run":
            return await pipeline.with_cache(store).arun(x=1)
        if way == "map":
            return await pipeline.with_cache(store).amap({"x": [1, 2]}, "x")
        if way == "nested map":
            return await nested.with_cache(store).arun(xs=[1, 2], output_name=["bs", "cs"])
        async with pipeline.with_cache(store).astream({"x": iter([1, 2])}, "x") as items:
            return [item.outputs async for item in items]

    expected = await run()
    ran.take()
    store.accident = lambda found: {key: ACCIDENTS[accident](data) for key, data in found.items()}
    assert await run() == expected
    assert set(ran.take()) >= ({"second 1", "third 1"} if way == "nested map" else {"first 1", "second 1", "third 1"})
    store.accident = None
    assert await run() == expected
    assert ran.take() == []


@pytest.mark.parametrize("victim", range(3))
async def test_one_lost_entry_costs_one_call(victim, ran):
    """If one of three entries is gone when it is loaded, that node alone runs again, and the event says why."""
    store = Memory()
    pipeline = three(ran).with_cache(store).with_backend(in_order)
    expected, seen = await watched(pipeline, {"x": 1})
    keys = [each.signature for each in seen if type(each) is NodeStored]
    ran.take()
    store.accident = lambda found: {key: flipped(data) if key == keys[victim] else data for key, data in found.items()}
    answer, seen = await watched(pipeline, {"x": 1})
    assert answer == expected
    assert ran.take() == [["first 1", "second 1", "third 1"][victim]]
    [refused] = [each for each in seen if type(each) is CacheRefused]
    assert refused.signature == keys[victim]
    assert "checksum" in refused.reason
    assert tally(seen)["stored"] == 1


async def test_some_lost_items_of_a_map_are_computed_and_no_others(ran):
    """Of a map of 50 items, those whose entries have been damaged run again, in whatever batch they are."""
    store = Memory()
    pipeline = three(ran).with_cache(store)
    expected = await pipeline.amap({"x": range(50)}, "x")
    ran.take()
    lost = set(random.Random(1).sample(sorted(store.results()), 9))
    store.accident = lambda found: {key: None if key in lost else data for key, data in found.items()}
    assert await pipeline.amap({"x": range(50)}, "x") == expected
    assert len(ran.take()) == 9


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("accident", ["deleted", "empty", "truncated", "bit-flipped"])
async def test_damaged_files_of_a_directory_are_misses(size, accident, cache, ran):
    """Every file of the cache is damaged on disk: everything is right, and recomputed at most once."""
    pipeline = three(ran, size).with_cache(cache)
    expected = await pipeline.amap({"x": range(5)}, "x")
    ran.take()
    for file in Path(cache.path).rglob("*"):  # noqa: ASYNC240 - quick
        if file.is_file() and file.stat().st_size > 100:
            damaged = ACCIDENTS[accident](file.read_bytes())
            file.unlink() if damaged is None else file.write_bytes(damaged)
    fresh = pipeline.with_cache(opened(cache.path))
    assert await fresh.amap({"x": range(5)}, "x") == expected
    again = ran.take()
    assert 1 <= len(again) == len(set(again)) <= 15
    assert await pipeline.with_cache(opened(cache.path)).amap({"x": range(5)}, "x") == expected
    assert ran.take() == []


async def test_a_directory_that_is_cleared_during_runs_does_no_harm(cache, ran):
    """While one thread clears the cache again and again, every run of a map is right."""
    over = threading.Event()

    def clear():
        other = opened(cache.path)
        while not over.is_set():
            other.clear()
            time.sleep(0.003)

    pipeline = three(ran).with_cache(cache)
    expected = {name: list(column) for name, column in (await pipeline.amap({"x": range(20)}, "x")).items()}
    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for _ in range(15):
            assert await pipeline.amap({"x": range(20)}, "x") == expected
    finally:
        over.set()
        await anyio.to_thread.run_sync(thread.join)


async def test_entries_that_vanish_in_a_nested_map_are_computed_from_inputs_that_vanished_too(ran):
    """An item whose input was to be loaded, and is gone, is computed from what made that input."""
    store = Memory()

    @node("raws")
    async def load(n):
        ran.note("load")
        return list(range(n))

    @node("d")
    async def more(c):
        ran.note("more", c[0])
        return c[0] * 10

    first = three(ran).as_node({"raws": "x"}, {"c": "cs"}, map_over="raws", name="first")
    then = Pipeline([more]).as_node({"cs": "c"}, {"d": "ds"}, map_over="cs", name="then")
    pipeline = Pipeline([load, first, then]).with_cache(store)
    assert await pipeline.arun(n=3, output_name="ds") == [0, 10, 20]
    _, seen = await watched(pipeline, {"n": 3}, output_name="ds")
    ran.take()
    for lost in ({"more"}, {"more", "third"}, {"more", "third", "second", "first"}, {"first", "load"}):
        gone = {each.signature for each in seen if each.path[-1] in lost and hasattr(each, "signature")}
        assert gone
        store.accident = lambda found, gone=gone: {k: None if k in gone else v for k, v in found.items()}
        assert await pipeline.arun(n=3, output_name="ds") == [0, 10, 20], lost
        assert {line.split()[0] for line in ran.take()} <= lost, lost


# ---- entries of others


class Mark:
    """What leaves a mark on disk when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def marked(folder):
    """Whether such a mark has been left."""
    return (folder / "mark").exists()


SECRET, OTHER = b"our key", b"another key"


@pytest.mark.parametrize(
    "forgery", ["tampered", "unsigned", "signed with another key", "swapped", "signed for another"]
)
@pytest.mark.parametrize("size", [10, 100_000])
async def test_with_a_key_what_others_have_written_is_never_unpickled(forgery, size, ran, tmp_path):
    """Payloads that would leave a mark are refused before they are unpickled, said as an event, and computed anew."""
    store = Memory(key=SECRET)
    pipeline = three(ran, size).with_cache(store).with_backend(in_order)
    expected, seen = await watched(pipeline, {"x": 1})
    keys = [each.signature for each in seen if type(each) is NodeStored]
    ran.take()
    evil = pickle.dumps(Mark(str(tmp_path / "mark")), protocol=5)

    def sealed(key, secret):
        return b"".join(bytes(part) for part in seal(key, 1, b"{}", [evil], secret))

    honest = dict(store.entries)
    for number, key in enumerate(keys):
        match forgery:
            case "tampered":
                store.entries[key] = sealed(key, SECRET)[:-40] + honest[key][-40:]
            case "unsigned":
                store.entries[key] = sealed(key, None)
            case "signed with another key":
                store.entries[key] = sealed(key, OTHER)
            case "swapped":
                store.entries[key] = honest[keys[number - 1]]
            case "signed for another":
                store.entries[key] = sealed(keys[number - 1], SECRET)
    answer, seen = await watched(pipeline, {"x": 1})
    assert answer == expected
    assert ran.take() == ["first 1", "second 1", "third 1"]
    assert tally(seen)["refused"] == 3
    assert not marked(tmp_path)
    assert (await watched(pipeline, {"x": 1}))[0] == expected
    assert ran.take() == []


async def test_the_mark_would_be_left_by_what_is_signed(ran, tmp_path):
    """The same payload, signed with our key for its own entry, is unpickled: the other tests can fail."""
    store = Memory(key=SECRET)
    pipeline = three(ran).with_cache(store).with_backend(in_order)
    _, seen = await watched(pipeline, {"x": 1})
    key = [each.signature for each in seen if type(each) is NodeStored][-1]
    evil = pickle.dumps(Mark(str(tmp_path / "mark")), protocol=5)
    store.entries[key] = b"".join(bytes(part) for part in seal(key, 1, b"{}", [evil], SECRET))
    await pipeline.arun(x=1)
    assert marked(tmp_path)


@pytest.mark.parametrize(("wrote", "reads"), [(None, SECRET), (SECRET, None), (OTHER, SECRET)])
async def test_a_directory_with_another_key_is_as_good_as_empty(wrote, reads, tmp_path, ran):
    """What was written under another key, or none, is computed again, and explanations do not read it either."""
    pipeline = three(ran)
    expected = await pipeline.with_cache(DiskCache(tmp_path / "cache", key=wrote)).arun(x=1)
    ran.take()
    mine = pipeline.with_cache(DiskCache(tmp_path / "cache", key=reads))
    assert {reason.why for each in await mine.explain(x=2) for reason in each.reasons} == {"new"}
    assert await mine.arun(x=1) == expected
    assert ran.take() == ["first 1", "second 1", "third 1"]
    assert await mine.arun(x=1) == expected
    assert ran.take() == []


async def test_damaged_histories_cost_reasons_and_nothing_else(ran):
    """What explanations are read from may be garbage: then everything is new, and hits are hits."""
    store = Memory()
    pipeline = three(ran).with_cache(store)
    await pipeline.arun(x=1)
    ran.take()
    for key in store.entries.keys() - store.results().keys():
        store.entries[key] = flipped(store.entries[key])
    assert {reason.why for each in await pipeline.explain(x=2) for reason in each.reasons} == {"new"}
    assert (await pipeline.explain(x=1)).hits == 3
    await pipeline.arun(x=2)
    assert {str(reason) for reason in (await pipeline.explain(x=3)).nodes[0].reasons} == {"input 'x' is new"}


# ---- stores that fail


class Failing(Memory):
    """A store whose calls fail, some or all of them."""

    def __init__(self, error, calls):
        super().__init__()
        self.error = error
        self.calls = calls

    async def find_many(self, keys):
        if "find" in self.calls:
            raise self.error
        return await super().find_many(keys)

    async def get_many(self, keys):
        if "get" in self.calls:
            raise self.error
        return await super().get_many(keys)

    async def set_many(self, entries):
        if "set" in self.calls:
            raise self.error
        return await super().set_many(entries)


@pytest.mark.parametrize("calls", ["find", "get", "set", "find get set"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ZeroDivisionError(), TimeoutError()], ids=repr
)
@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_store_that_raises_costs_one_warning(calls, error, size, ran, warned):
    """Whatever a store raises and when, every result is right and there is one warning."""
    store = Failing(error, calls.split())
    expected = await three(ran, size).amap({"x": range(10)}, "x")
    pipeline = three(ran, size).with_cache(store)
    for _ in range(3):
        assert await pipeline.amap({"x": range(10)}, "x") == expected
    assert await pipeline.arun(x=1, output_name="c") == expected["c"][1]
    assert len(warned()) == 1, warned()
    assert "cache" in warned()[0]


FULL = """
    import resource, signal, sys
    import anyio
    from hypernodes import DiskCache, Pipeline, node

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ran = []

    @node("y")
    async def work(x):
        ran.append(x)
        return bytes(2000) + bytes([x])

    async def main():
        cache = DiskCache("cache")
        pipeline = Pipeline([work], cache=cache)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        made = await pipeline.amap({"x": range(20)}, "x")
        assert [each[-1] for each in made["y"]] == list(range(20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ran.clear()
        assert await pipeline.amap({"x": range(20)}, "x") == made
        assert len(ran) == 20
        ran.clear()
        assert await pipeline.amap({"x": range(20)}, "x") == made
        assert ran == []

    anyio.run(main)
"""


def test_a_full_disk_costs_one_warning(tmp_path):
    """When no file can grow any more, the run is right, nothing partial is left, and later runs cache again."""
    (tmp_path / "script.py").write_text(textwrap.dedent(FULL))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr


async def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path, ran, warned):
    """With a file in the place of the cache's own folders nothing can be stored, and runs are right."""
    cache = DiskCache(tmp_path / "cache")
    pipeline = three(ran).with_cache(cache)
    await pipeline.arun(x=0)
    for folder in [each for each in Path(cache.path).iterdir() if each.is_dir()]:  # noqa: ASYNC240 - quick
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
        folder.write_text("in the way")
    cache = opened(cache.path)
    for _ in range(2):
        assert await pipeline.with_cache(cache).amap({"x": [1, 2]}, "x", output_name="c") == {
            "c": [[1, "", "b", "c"], [2, "", "b", "c"]]
        }
    assert len(warned()) == 1, warned()


# ---- killed processes

KILLED = """
    import asyncio, os, sys, time
    from hypernodes import DiskCache, Pipeline, node
    from hypernodes.backend import LocalBackend

    log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @node("y")
    async def work(x):
        await asyncio.sleep(0.004)
        os.write(log, f"{x} {time.time()}\\n".encode())
        return x * x

    pipeline = Pipeline([work], backend=LocalBackend(map_execution="sequential"), cache=DiskCache("cache"))
    print("up", flush=True)
    print(sum(pipeline.map({"x": range(900)}, "x")["y"]))
"""


def killed_again_and_again(folder, times, seed):
    """Kill a script at random moments, and let it end at last; return its answer, the kills, and what it did when."""
    chance = random.Random(seed)
    folder.mkdir()
    (folder / "script.py").write_text(textwrap.dedent(KILLED))
    kills = []
    for number in range(times + 1):
        with subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "up\n"
            if number < times:
                time.sleep(chance.uniform(0.05, 2.0))
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills.append(time.time())
            else:
                answer = int(process.stdout.read())
    calls = [line.split() for line in (folder / "log").read_text().splitlines()]
    return answer, kills, [(int(item), float(at)) for item, at in calls]


def test_a_process_that_is_killed_loses_no_more_than_a_second_of_work(tmp_path):
    """Killed twenty times in the middle of a map: the answer is right, and only what was not yet written is redone."""
    results = {}

    def run(number):
        results[number] = killed_again_and_again(tmp_path / f"killed{number}", 5, number)

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    redone = 0
    for number in range(4):
        answer, kills, calls = results[number]
        assert answer == sum(x * x for x in range(900))
        assert {item for item, _ in calls} == set(range(900))
        done = {}
        for item, at in calls:
            if item in done:
                # It was done before, in a process that was killed before its results were written.
                redone += 1
                killed_at = min(kill for kill in kills if kill >= done[item])
                assert killed_at - done[item] < 2.5
            done[item] = at
    assert redone > 0


# ---- leaks


async def test_many_cached_runs_leave_nothing(tmp_path, ran):
    """After 500 runs there are as many tasks, threads, descriptors and objects of ours as after the first ones."""
    pipeline = three(ran)
    process = psutil.Process()

    async def run(number):
        cached = pipeline.with_cache(DiskCache(tmp_path / "cache"))
        assert await cached.arun(x=number % 50, output_name="b") == [number % 50, "", "b"]
        if number % 10 == 0:
            await cached.explain(x=number)

    def held():
        gc.collect()
        ours = sum(str(type(each).__module__).startswith("hypernodes") for each in gc.get_objects())
        return process.num_fds(), threading.active_count(), ours

    for number in range(60):
        await run(number)
    before = held()
    for number in range(500):
        await run(number)
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 1
    assert after[2] <= before[2] + 50
