"""Objects that live as long as the process: made once, handed to every run."""

import asyncio
import gc
import importlib
import logging
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from hypernodes import DefinitionError, DiskCache, Pipeline, forget_kept, node

pytestmark = pytest.mark.anyio

MADE = []


class Model:
    """Something that cannot be pickled."""

    def __init__(self, name):
        MADE.append(name)
        self.name = name
        self.lock = threading.Lock()

    def encode(self, text):
        return f"{self.name}:{text}"


@node("model", keep="process")
def load_model(name):
    return Model(name)


@node("vector")
def encode(model, text):
    return model.encode(text)


@pytest.fixture(autouse=True)
def nothing_kept():
    MADE.clear()
    forget_kept()
    yield
    forget_kept()


PIPELINE = Pipeline([load_model, encode])


async def test_it_is_made_once_for_all_runs(anyio_backend):
    """Runs after each other, maps, and runs from other threads and loops share one object."""
    first = await PIPELINE.arun(name="small", text="a")
    assert first["vector"] == "small:a"
    second = await PIPELINE.arun(name="small", text="b")
    assert second["model"] is first["model"]
    assert (await PIPELINE.amap({"name": "small", "text": ["c", "d"]}, "text"))["vector"] == ["small:c", "small:d"]
    assert await anyio.to_thread.run_sync(lambda: PIPELINE.run(name="small", text="e")["model"]) is first["model"]
    assert MADE == ["small"]


async def test_one_for_each_input(anyio_backend):
    """Other inputs make another object; the first one is still there."""
    for name in ("small", "large", "small"):
        await PIPELINE.arun(name=name, text="a")
    assert MADE == ["small", "large"]


async def test_the_one_used_longest_ago_goes_first(anyio_backend):
    """Four are held of a node."""
    for name in "abcd":
        await PIPELINE.arun(name=name, text="")
    await PIPELINE.arun(name="a", text="")
    await PIPELINE.arun(name="e", text="")
    MADE.clear()
    for name in "acde":
        await PIPELINE.arun(name=name, text="")
    assert MADE == []
    await PIPELINE.arun(name="b", text="")
    assert MADE == ["b"]


async def test_runs_at_one_moment_make_it_once(anyio_backend):
    """Those who come while it is being made wait for it."""
    count = 0

    @node("model", keep="process")
    async def load(name):
        nonlocal count
        count += 1
        await anyio.sleep(0.02)
        return object()

    pipeline = Pipeline([load])
    models = []

    async def run():
        models.append(await pipeline.arun(name="x", output_name="model"))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(run)
    assert count == 1
    assert len(set(map(id, models))) == 1


async def test_a_mapped_node_makes_it_once(anyio_backend):
    """Items of a map that each need it share one object."""
    inner = Pipeline([load_model, encode], name="inner").as_node(map_over="text")
    made = await Pipeline([inner]).arun(name="small", text=list("abcdef"))
    assert made["vector"] == [f"small:{each}" for each in "abcdef"]
    assert MADE == ["small"]


async def test_an_edited_function_makes_it_anew(anyio_backend, tmp_path, monkeypatch):
    """So does an edited helper; the object of the earlier version is let go of."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "kept_models.py"

    def write(size):
        module.write_text(
            "from hypernodes import node\n"
            "class Model:\n    pass\n"
            f"def size():\n    return {size}\n"
            "@node('model', keep='process')\n"
            "def load(name):\n    model = Model()\n    model.size = size()\n    return model\n"
        )
        sys.modules.pop("kept_models", None)
        importlib.invalidate_caches()
        return importlib.import_module("kept_models")

    old = await Pipeline([write(1).load]).arun(name="a", output_name="model")
    assert await Pipeline([write(1).load]).arun(name="a", output_name="model") is old
    gone = weakref.ref(old)
    del old
    new = await Pipeline([write(22).load]).arun(name="a", output_name="model")
    assert new.size == 22
    gc.collect()
    assert gone() is None


async def test_version_and_dependencies_count(anyio_backend, tmp_path):
    """As they do in a cache."""
    weights = tmp_path / "weights"
    weights.write_text("1")

    def load(name):
        return Model(name)

    for version in (1, 1, 2):
        await Pipeline([node("model", keep="process", version=version, depends_on=[weights])(load)]).arun(name="a")
    assert MADE == ["a", "a"]
    weights.write_text("2")
    await Pipeline([node("model", keep="process", version=2, depends_on=[weights])(load)]).arun(name="a")
    assert MADE == ["a", "a", "a"]


async def test_a_failure_is_not_kept(anyio_backend):
    """The next run tries again."""
    fails = [True]

    @node("model", keep="process")
    def load(name):
        if fails:
            fails.pop()
            raise OSError("not now")
        return Model(name)

    with pytest.raises(OSError, match="not now"):
        await Pipeline([load]).arun(name="a")
    await Pipeline([load]).arun(name="a")
    assert MADE == ["a"]


async def test_a_cancelled_one_is_not_kept(anyio_backend):
    """Who is cancelled while making it leaves the making to the next."""

    @node("model", keep="process")
    async def load(name):
        await anyio.sleep(0.05)
        return Model(name)

    with anyio.move_on_after(0.01):
        await Pipeline([load]).arun(name="a")
    assert MADE == []
    await Pipeline([load]).arun(name="a")
    assert MADE == ["a"]


async def test_refresh_makes_it_anew(anyio_backend):
    """refresh=True, or the output by name."""
    await PIPELINE.arun(name="a", text="")
    await PIPELINE.arun(name="a", text="", refresh=True)
    await PIPELINE.arun(name="a", text="", refresh=["model"])
    await PIPELINE.arun(name="a", text="", refresh=["vector"])
    assert MADE == ["a", "a", "a"]


async def test_forget_kept(anyio_backend):
    """Lets go of one node's objects, or of all."""
    other = node("other", keep="process")(load_model.func)
    pipeline = Pipeline([load_model, other])
    models = await pipeline.arun(name="a")
    gone = [weakref.ref(model) for model in models.values()]
    del models
    forget_kept(load_model)
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is not None
    forget_kept()
    gc.collect()
    assert gone[1]() is None


async def test_an_input_without_identity(anyio_backend, caplog):
    """It is made each time, and a warning says why."""
    with caplog.at_level(logging.WARNING, logger="hypernodes"):
        for _ in range(2):
            await PIPELINE.arun(name=(each for each in "ab"), text="")
    assert len(MADE) == 2
    (said,) = [record.message for record in caplog.records if "is not kept" in record.message]
    assert "generator" in said


async def test_options_go_together(anyio_backend):
    """retry, timeout, limits and threads are those of the making."""
    attempts = []

    @node("model", keep="process", retry=3, timeout=5, max_concurrency=1, run_in="thread")
    def load(name):
        attempts.append(threading.current_thread())
        if len(attempts) < 2:
            raise OSError
        return Model(name)

    for _ in range(2):
        await Pipeline([load]).arun(name="a")
    assert len(attempts) == 2
    assert threading.main_thread() not in attempts


async def test_what_is_kept_stays_in_this_process(anyio_backend):
    """Where nodes run in worker processes, this one does not."""
    pipeline = Pipeline([load_model, encode])
    from hypernodes.backend import LocalBackend

    made = await pipeline.with_backend(LocalBackend(node_execution="parallel", max_workers=1)).arun(
        name="a", text="b", output_name="model"
    )
    assert made.name == "a"


async def test_wrong_option(anyio_backend):
    """Anything else is refused at decoration."""
    with pytest.raises(DefinitionError, match="keep of 'load' must be 'process' or None"):

        @node("model", keep=True)
        def load(name):
            return name


class TestWithACache:
    async def test_what_is_kept_is_not_written(self, anyio_backend, tmp_path, caplog):
        """What is made with it is cached under its function and inputs, and it is not made where all is there."""
        cache = DiskCache(tmp_path / "cache")
        pipeline = PIPELINE.with_cache(cache)
        with caplog.at_level(logging.WARNING, logger="hypernodes"):
            assert (await pipeline.arun(name="a", text="x", output_name="vector")) == "a:x"
            forget_kept()
            assert (await pipeline.arun(name="a", text="x", output_name="vector")) == "a:x"
        assert MADE == ["a"]
        assert caplog.records == []
        assert "load_model" not in str(list(cache.entries()))
        assert cache.stats().entries == 2  # of encode: its result, and what is remembered of it

    async def test_it_is_made_where_something_needs_it(self, anyio_backend, tmp_path):
        """A new item needs it; an old one does not."""
        pipeline = PIPELINE.with_cache(DiskCache(tmp_path / "cache"))
        await pipeline.amap({"name": "a", "text": ["x", "y"]}, "text", output_name="vector")
        forget_kept()
        made = await pipeline.amap({"name": "a", "text": ["x", "y", "z"]}, "text", output_name="vector")
        assert made["vector"] == ["a:x", "a:y", "a:z"]
        assert MADE == ["a", "a"]

    async def test_other_inputs_of_it_count(self, anyio_backend, tmp_path):
        """Another model's vectors are others."""
        pipeline = PIPELINE.with_cache(DiskCache(tmp_path / "cache"))
        for name in "aba":
            assert (await pipeline.arun(name=name, text="x", output_name="vector")) == f"{name}:x"
        assert MADE == ["a", "b"]

    async def test_explain_says_so(self, anyio_backend, tmp_path):
        """It is no miss: no cache has it; what is made with it is told as ever."""
        pipeline = PIPELINE.with_cache(DiskCache(tmp_path / "cache"))
        await pipeline.arun(name="a", text="x")
        told = [(each.path[-1], each.status) for each in await pipeline.explain(name="a", text="x")]
        assert told == [("load_model", "uncached"), ("encode", "hit")]
        told = [(each.path[-1], each.status) for each in await pipeline.explain(name="b", text="x")]
        assert told == [("load_model", "uncached"), ("encode", "miss")]


async def test_other_loops_wait_for_it(anyio_backend, anyio_backend_name, monkeypatch):
    """Threads with loops of their own that need it at one moment get one object, however long it takes."""
    if anyio_backend_name == "trio":
        pytest.skip("starts loops of asyncio")
    monkeypatch.setattr("hypernodes.cache._flight.ACROSS_LOOPS_S", 0.01)  # as long as a call of a cache would wait
    begun, go_on = threading.Event(), threading.Event()

    @node("model", keep="process")
    def load(name):
        begun.set()
        assert go_on.wait(30)
        return Model(name)

    pipeline = Pipeline([load])
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(lambda: asyncio.run(pipeline.arun(name="a", output_name="model"))) for _ in range(2)]
        assert await anyio.to_thread.run_sync(begun.wait, 30)
        await anyio.sleep(0.1)  # the other one has long been waiting, or has begun as well
        go_on.set()
        models = [await anyio.to_thread.run_sync(call.result, 30) for call in calls]
    assert models[0] is models[1]
    assert MADE == ["a"]
