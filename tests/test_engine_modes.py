"""The engine's modes: where and how nodes and items run, and that it never changes the answers."""

import functools
import itertools
import os
import pickle
import threading
import time

import anyio
import cloudpickle
import pytest

from hypernodes import DefinitionError, Pipeline, node
from hypernodes.backend import Backend, LocalBackend, PipelineExecutionEngine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

MODES = ("sequential", "async", "threaded", "parallel")
PATIENCE_S = 20  # only a hang takes this long


@node("cleaned")
def clean(text):
    return text.strip().lower()


@node("words")
def split(cleaned):
    yield from cleaned.split()


@node(("count", "longest"))
async def measure(words):
    await anyio.sleep(0)
    return len(words), max(words, key=len)


@node("letters")
async def spell(longest):
    for letter in longest:
        yield letter


def weigh(word, salt):
    return sum(map(ord, word)) + salt


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, weight):
        return weight + self.by


class Summary:
    def __init__(self, unit):
        self.unit = unit

    def write(self, codes, count, letters):
        return f"{sum(codes)} {self.unit} in {count} words, {''.join(letters)} the longest"


one_word = Pipeline([node("weight")(weigh), node("code")(Shift(3))], name="one_word")

report = Pipeline(
    [
        clean,
        split,
        measure,
        spell,
        one_word.as_node(
            input_mapping={"words": "word"},
            output_mapping={"code": "codes", "weight": "weights"},
            map_over="words",
        ),
        node("tripled")(functools.partial(lambda factor, count: factor * count, 3)),
        node("summary")(Summary("points").write),
    ],
    name="report",
)

TEXTS = ["  In the Beginning ", "Let there be LIGHT", "and there was light", "Day", "and the evening"]


def expected(text, salt):
    words = text.strip().lower().split()
    longest = max(words, key=len)
    weights = [sum(map(ord, word)) + salt for word in words]
    codes = [weight + 3 for weight in weights]
    return {
        "cleaned": text.strip().lower(),
        "words": words,
        "count": len(words),
        "longest": longest,
        "letters": list(longest),
        "weights": weights,
        "codes": codes,
        "tripled": 3 * len(words),
        "summary": f"{sum(codes)} points in {len(words)} words, {longest} the longest",
    }


@pytest.mark.parametrize(("node_execution", "map_execution"), list(itertools.product(MODES, MODES)))
async def test_every_mix_of_modes_gives_the_same_answers(node_execution, map_execution):
    """A run, a map, a failing map and a stream give the same in all sixteen mixes of modes."""
    modes = {"node_execution": node_execution, "map_execution": map_execution, "max_workers": 2}
    with anyio.fail_after(PATIENCE_S):
        async with LocalBackend(**modes) as backend:
            pipeline = report.with_backend(backend)

            assert await pipeline.arun(text=TEXTS[0], salt=1) == expected(TEXTS[0], 1)
            assert await pipeline.arun(text=TEXTS[0], salt=1, output_name="codes") == expected(TEXTS[0], 1)["codes"]

            mapped = await pipeline.amap({"text": TEXTS, "salt": 2}, map_over="text")
            rows = [expected(text, 2) for text in TEXTS]
            assert mapped == {name: [row[name] for row in rows] for name in rows[0]}
            assert mapped.failures == []

            crossed = await pipeline.amap(
                {"text": TEXTS[:2], "salt": [0, 5]}, ["text", "salt"], map_mode="product", output_name="codes"
            )
            assert crossed == {"codes": [expected(text, salt)["codes"] for text in TEXTS[:2] for salt in (0, 5)]}

            holes = await pipeline.amap(
                {"text": [TEXTS[0], None, TEXTS[1], "   "], "salt": 0}, map_over="text", on_error="collect"
            )
            assert holes["count"] == [3, None, 4, None]
            assert [(failure.index, failure.path, type(failure.error)) for failure in holes.failures] == [
                (1, ("report", 1, "clean"), AttributeError),
                (3, ("report", 3, "measure"), ValueError),
            ]
            assert holes.failures[0].inputs["text"] is None
            assert any("report[1] / clean" in note for note in holes.failures[0].error.__notes__)

            async with pipeline.astream({"text": TEXTS, "salt": 4}, map_over="text") as items:
                streamed = [item async for item in items]
            assert [item.index for item in streamed] == [0, 1, 2, 3, 4]
            assert [item.outputs for item in streamed] == [expected(text, 4) for text in TEXTS]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_answers_from_sync_code(mode):
    """``run``, ``map`` and ``stream`` give from a script what their async forms give, in every mode."""
    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=2)
    pipeline = report.with_backend(backend)
    assert pipeline.run(text=TEXTS[3], salt=1) == expected(TEXTS[3], 1)
    mapped = pipeline.map({"text": TEXTS[:2], "salt": 1}, map_over="text", output_name="summary")
    assert mapped == {"summary": [expected(text, 1)["summary"] for text in TEXTS[:2]]}
    with pipeline.stream({"text": TEXTS[:2], "salt": 1}, map_over="text") as items:
        assert [item.outputs for item in items] == [expected(text, 1) for text in TEXTS[:2]]


class Overlap:
    """Counts how many callers are inside at once."""

    def __init__(self):
        self.now = 0
        self.most = 0
        self.lock = threading.Lock()

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *exc_info):
        with self.lock:
            self.now -= 1


async def give_way():
    for _ in range(20):
        await anyio.sleep(0)


async def test_sequential_nodes_run_one_at_a_time_in_topological_order():
    """With ``node_execution="sequential"`` independent nodes never overlap and keep their order."""
    inside, order = Overlap(), []

    def branch(name):
        async def wait_a_little(x):
            with inside:
                order.append(name)
                await give_way()
                return x

        return node(name)(wait_a_little)

    pipeline = Pipeline([branch("a"), branch("b"), branch("c")])
    one_by_one = pipeline.with_backend(LocalBackend(node_execution="sequential"))
    assert await one_by_one.arun(x=1) == {"a": 1, "b": 1, "c": 1}
    assert inside.most == 1
    assert order == ["a", "b", "c"]


async def test_async_nodes_that_are_ready_run_at_once():
    """In the default mode two independent async nodes run at the same time: each waits for the other."""
    first_here, second_here = anyio.Event(), anyio.Event()

    @node("first")
    async def first(x):
        first_here.set()
        await second_here.wait()
        return x

    @node("second")
    async def second(x):
        second_here.set()
        await first_here.wait()
        return x

    with anyio.fail_after(PATIENCE_S):
        assert await Pipeline([first, second]).arun(x=1) == {"first": 1, "second": 1}


async def test_a_node_starts_as_soon_as_its_own_inputs_are_there():
    """A node never waits for a slow node that it does not need."""
    downstream_ran = anyio.Event()

    @node("slow")
    async def slow(x):
        await downstream_ran.wait()
        return x

    @node("quick")
    async def quick(x):
        return x + 1

    @node("after_quick")
    async def after_quick(quick):
        downstream_ran.set()
        return quick + 1

    with anyio.fail_after(PATIENCE_S):
        assert await Pipeline([slow, quick, after_quick]).arun(x=1) == {
            "slow": 1,
            "quick": 2,
            "after_quick": 3,
        }


async def test_threaded_nodes_run_in_several_threads_at_once():
    """With ``node_execution="threaded"`` two sync nodes meet at a barrier, each in its own thread."""
    barrier = threading.Barrier(2)
    here = threading.get_ident()

    def branch(name):
        def meet(x):
            barrier.wait(timeout=PATIENCE_S)
            return threading.get_ident()

        return node(name)(meet)

    pipeline = Pipeline([branch("a"), branch("b")], backend=LocalBackend(node_execution="threaded", max_workers=2))
    idents = await pipeline.arun(x=1)
    assert len({here, idents["a"], idents["b"]}) == 3


async def test_threaded_nodes_use_no_more_threads_than_workers():
    """With ``max_workers=1`` threaded sync nodes never overlap, and none runs on the loop's thread."""
    inside, here = Overlap(), threading.get_ident()

    def branch(name):
        def work(x):
            with inside:
                time.sleep(0.002)
                return threading.get_ident()

        return node(name)(work)

    branches = [branch(f"b{number}") for number in range(6)]
    pipeline = Pipeline(branches, backend=LocalBackend(node_execution="threaded", max_workers=1))
    idents = await pipeline.arun(x=1)
    assert inside.most == 1
    assert here not in idents.values()


def meet_in_folder(folder, me, other):
    """Leave a sign in a folder and wait for the other's: returns only if both run at the same time."""
    (folder / me).touch()
    give_up = time.monotonic() + PATIENCE_S
    while not (folder / other).exists():
        if time.monotonic() > give_up:
            raise AssertionError(f"{other} never came")
        time.sleep(0.005)
    return os.getpid()


async def test_parallel_nodes_run_in_several_processes_at_once(tmp_path):
    """With ``node_execution="parallel"`` two sync nodes run at the same time in two other processes."""

    @node("a")
    def first(folder):
        return meet_in_folder(folder, "a", "b")

    @node("b")
    def second(folder):
        return meet_in_folder(folder, "b", "a")

    pipeline = Pipeline([first, second], backend=LocalBackend(node_execution="parallel", max_workers=2))
    with anyio.fail_after(PATIENCE_S):
        pids = await pipeline.arun(folder=tmp_path)
    assert len({os.getpid(), pids["a"], pids["b"]}) == 3


async def test_sequential_items_run_one_at_a_time_in_order():
    """With ``map_execution="sequential"`` items never overlap, even when a limit would allow it."""
    inside, order = Overlap(), []

    @node("y")
    async def work(x):
        with inside:
            order.append(x)
            await give_way()
            return x

    pipeline = Pipeline([work], backend=LocalBackend(map_execution="sequential"))
    result = await pipeline.amap({"x": range(5)}, "x", max_concurrency=4)
    assert result == {"y": [0, 1, 2, 3, 4]}
    assert order == [0, 1, 2, 3, 4]
    assert inside.most == 1


async def test_async_items_run_up_to_max_concurrency_at_once():
    """``max_concurrency=3`` lets exactly three items in: three meet, a fourth never joins them."""
    inside, three_here = Overlap(), anyio.Event()

    @node("y")
    async def work(x):
        with inside:
            if inside.now == 3:
                three_here.set()
            await three_here.wait()
            await give_way()
            return x

    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([work]).amap({"x": range(9)}, "x", max_concurrency=3)
    assert result["y"] == list(range(9))
    assert inside.most == 3


@pytest.mark.parametrize("where", ["map", "as_node", "engine"])
async def test_max_concurrency_bounds_items_wherever_it_is_said(where):
    """The bound on items holds from a call, from ``as_node`` and from the engine."""
    inside, two_here = Overlap(), anyio.Event()

    @node("y")
    async def work(x):
        with inside:
            if inside.now == 2:
                two_here.set()
            await two_here.wait()
            await give_way()
            return x

    inner = Pipeline([work], name="inner")
    with anyio.fail_after(PATIENCE_S):
        if where == "map":
            result = await inner.amap({"x": range(8)}, "x", max_concurrency=2)
        elif where == "engine":
            result = await inner.with_backend(LocalBackend(max_concurrency=2)).amap({"x": range(8)}, "x")
        else:
            outer = Pipeline([inner.as_node(map_over="x", max_concurrency=2)])
            result = await outer.arun(x=list(range(8)))
    assert result["y"] == list(range(8))
    assert inside.most == 2


async def test_a_hundred_items_run_at_once_by_default():
    """A map without ``max_concurrency`` has a hundred items under way, no more."""
    inside, full = Overlap(), anyio.Event()

    @node("y")
    async def work(x):
        with inside:
            if inside.now == 100:
                full.set()
            await full.wait()
            await give_way()
            return x

    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([work]).amap({"x": range(250)}, "x")
    assert result["y"] == list(range(250))
    assert inside.most == 100


async def test_threaded_items_run_in_several_threads_at_once():
    """With ``map_execution="threaded"`` two items meet at a barrier, each in its own thread."""
    barrier, idents = threading.Barrier(2), set()
    here = threading.get_ident()

    @node("y")
    def work(x):
        idents.add(threading.get_ident())
        barrier.wait(timeout=PATIENCE_S)
        return x

    pipeline = Pipeline([work], backend=LocalBackend(map_execution="threaded", max_workers=2))
    assert (await pipeline.amap({"x": range(6)}, "x"))["y"] == list(range(6))
    assert here not in idents
    assert len(idents) >= 2


async def test_parallel_items_run_in_several_processes_at_once(tmp_path):
    """With ``map_execution="parallel"`` two items run at the same time in two other processes."""

    @node("pid")
    def work(me, other, folder):
        return meet_in_folder(folder, me, other)

    pipeline = Pipeline([work], backend=LocalBackend(map_execution="parallel", max_workers=2))
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"me": ["a", "b"], "other": ["b", "a"], "folder": tmp_path}, ["me", "other"])
    assert len({os.getpid(), *result["pid"]}) == 3


async def test_parallel_items_use_no_more_processes_than_workers():
    """Many items share ``max_workers`` processes."""

    @node("pid")
    def where(x):
        return os.getpid()

    pipeline = Pipeline([where], backend=LocalBackend(map_execution="parallel", max_workers=2))
    result = await pipeline.amap({"x": range(60)}, "x")
    assert os.getpid() not in result["pid"]
    assert 1 <= len(set(result["pid"])) <= 2


async def test_async_nodes_stay_on_the_loop_when_nodes_run_in_processes():
    """Node modes place sync functions; an async node keeps its loop and the objects it holds."""
    lock = threading.Lock()  # cannot be pickled: it would fail if it had to travel

    @node("here")
    async def where(x):
        with lock:
            return os.getpid()

    pipeline = Pipeline([where], backend=LocalBackend(node_execution="parallel", max_workers=1))
    assert await pipeline.arun(x=1) == {"here": os.getpid()}


def test_an_engine_is_frozen_and_equal_by_value():
    """An engine cannot be changed after it is made; two with the same options are equal."""
    engine = PipelineExecutionEngine(map_execution="threaded", max_workers=3)
    with pytest.raises(AttributeError):
        engine.max_workers = 4
    assert engine == PipelineExecutionEngine(map_execution="threaded", max_workers=3)
    assert engine != PipelineExecutionEngine(map_execution="threaded", max_workers=4)
    assert hash(engine) == hash(PipelineExecutionEngine(map_execution="threaded", max_workers=3))


def test_an_engine_survives_pickling():
    """An engine goes through plain pickle as itself, options and all."""
    engine = PipelineExecutionEngine("threaded", "sequential", max_workers=3, max_concurrency=7)
    copy = pickle.loads(pickle.dumps(engine))
    assert copy == engine
    assert (copy.node_execution, copy.map_execution) == ("threaded", "sequential")
    assert (copy.max_workers, copy.max_concurrency) == (3, 7)


def test_an_engine_has_the_documented_defaults():
    """Said nothing, an engine is async in both dimensions."""
    engine = PipelineExecutionEngine()
    assert (engine.node_execution, engine.map_execution) == ("async", "async")
    assert engine.max_workers is None
    assert engine.max_concurrency is None


@pytest.mark.parametrize("kind", [PipelineExecutionEngine, LocalBackend])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"node_execution": "paralel"}, ["node_execution", "paralel", "parallel"]),
        ({"map_execution": "thread"}, ["map_execution", "'thread'", "threaded"]),
        ({"node_execution": None}, ["node_execution", "None", "async"]),
        ({"max_workers": 0}, ["max_workers", "0"]),
        ({"max_workers": "two"}, ["max_workers", "two"]),
        ({"max_concurrency": -1}, ["max_concurrency", "-1"]),
        ({"max_concurrency": 1.5}, ["max_concurrency", "1.5"]),
    ],
)
def test_a_bad_engine_option_is_refused_by_name(kind, options, words):
    """A bad option is refused when the engine is made, with the option, the value and what would do."""
    with pytest.raises(DefinitionError) as refused:
        kind(**options)
    for word in [*words, kind.__name__]:
        assert word in str(refused.value)


def test_an_unknown_engine_option_is_refused():
    """A misspelt option is an error, never silently dropped."""
    with pytest.raises(TypeError, match="max_worker"):
        LocalBackend(max_worker=2)


def test_a_local_backend_is_the_default_backend():
    """``LocalBackend`` is a ``Backend``, and what a pipeline uses when it is told nothing."""
    assert issubclass(LocalBackend, Backend)

    @node("y")
    def double(x):
        return 2 * x

    assert Pipeline([double]).run(x=2) == Pipeline([double], backend=LocalBackend()).run(x=2) == {"y": 4}


def test_a_local_backend_survives_pickling():
    """A backend that holds no running workers can be sent elsewhere."""
    backend = LocalBackend(node_execution="sequential", max_workers=2)
    copy = pickle.loads(cloudpickle.dumps(backend))

    @node("y")
    def double(x):
        return 2 * x

    assert Pipeline([double], backend=copy).run(x=2) == {"y": 4}


def test_a_backend_must_have_both_methods():
    """``Backend`` cannot be instantiated until a subclass defines both ``arun`` and ``amap``."""

    class Half(Backend):
        async def arun(self, job, emit):
            return {}

    with pytest.raises(TypeError, match="amap"):
        Half()
    with pytest.raises(TypeError):
        Backend()


def test_a_pipeline_refuses_what_is_not_a_backend():
    """Something that is no backend is refused when the pipeline is made, by name of the option."""
    with pytest.raises(DefinitionError, match="backend"):
        Pipeline([clean], backend="local")


class Counting(Backend):
    """A user's own place: it counts what it is given and lets a local backend do it."""

    def __init__(self, **options):
        self.local = LocalBackend(**options)
        self.runs = 0
        self.maps = 0

    async def arun(self, job, emit):
        self.runs += 1
        return await self.local.arun(job, emit)

    async def amap(self, job, sink, emit):
        self.maps += 1
        await self.local.amap(job, sink, emit)


async def test_a_users_own_backend_gets_the_runs_and_maps():
    """A subclass of ``Backend`` is handed each run and each map, and its answers are the pipeline's."""
    backend = Counting()
    pipeline = report.with_backend(backend)

    assert await pipeline.arun(text=TEXTS[0], salt=1) == expected(TEXTS[0], 1)
    assert backend.runs == 1
    maps_of_the_run = backend.maps
    assert await pipeline.amap({"text": TEXTS[:2], "salt": 1}, "text", output_name="count") == {"count": [3, 4]}
    assert backend.maps == maps_of_the_run + 1
    async with pipeline.astream({"text": TEXTS[:2], "salt": 1}, "text") as items:
        assert [item.outputs["count"] async for item in items] == [3, 4]
    assert backend.maps == maps_of_the_run + 2


def test_a_users_own_backend_serves_sync_calls():
    """The sync calls come with the async interface: a user writes none of them."""
    backend = Counting()
    pipeline = report.with_backend(backend)
    assert pipeline.run(text=TEXTS[0], salt=1) == expected(TEXTS[0], 1)
    assert pipeline.map({"text": TEXTS[:2], "salt": 1}, "text", output_name="count") == {"count": [3, 4]}
    assert (backend.runs, backend.maps > 0) == (1, True)


class Where:
    """Says in which process and thread it is called."""

    def __call__(self, x):
        return os.getpid(), threading.get_ident()


async def test_a_nested_pipeline_runs_in_its_own_backend():
    """A nested pipeline with a backend of its own runs there; its parent stays where it was."""
    inner = Pipeline(
        [node("inner_place")(Where())],
        backend=LocalBackend(node_execution="parallel", max_workers=1),
        name="inner",
    )
    outer = Pipeline([inner, node("outer_place", run_in="loop")(Where())], name="outer")
    places = await outer.arun(x=1)
    assert places["outer_place"] == (os.getpid(), threading.get_ident())
    assert places["inner_place"][0] != os.getpid()


async def test_a_nested_pipeline_inherits_its_parents_backend():
    """A nested pipeline that names no backend runs in its parent's, at every depth."""
    inner = Pipeline([node("place")(Where())], name="inner")
    middle = Pipeline([inner], name="middle")
    outer = Pipeline([middle], backend=LocalBackend(node_execution="parallel", max_workers=1))
    assert (await outer.arun(x=1))["place"][0] != os.getpid()
    assert (await middle.arun(x=1))["place"][0] == os.getpid()


async def test_the_nearest_backend_wins():
    """A backend set on a nested pipeline shields it from its parent's processes."""
    inner = Pipeline([node("place", run_in="loop")(Where())], backend=LocalBackend(), name="inner")
    outer = Pipeline([inner], backend=LocalBackend(node_execution="parallel", max_workers=1))
    assert (await outer.arun(x=1))["place"] == (os.getpid(), threading.get_ident())


async def test_a_mapped_nested_pipeline_runs_its_items_in_its_own_backend():
    """Only the nested map's items go to processes when only it has a parallel backend."""
    inner = Pipeline(
        [node("place")(Where())], backend=LocalBackend(map_execution="parallel", max_workers=2), name="inner"
    )
    outer = Pipeline([node("xs", run_in="loop")(lambda n: list(range(n))), inner.as_node({"xs": "x"}, map_over="xs")])
    places = (await outer.arun(n=8))["place"]
    assert len(places) == 8
    assert os.getpid() not in {pid for pid, _ in places}


async def test_a_nested_pipeline_may_have_a_users_own_backend():
    """A user's backend on a nested pipeline gets that step and nothing else."""
    backend = Counting()
    inner = Pipeline([node("y")(lambda x: x + 1)], backend=backend, name="inner")
    outer = Pipeline([inner, node("z")(lambda y: y * 10)], name="outer")
    assert await outer.arun(x=1) == {"y": 2, "z": 20}
    assert (backend.runs, backend.maps) == (1, 0)
    mapped = Pipeline([inner.as_node(map_over="x")], name="outer")
    assert await mapped.arun(x=[1, 2, 3]) == {"y": [2, 3, 4]}
    assert (backend.runs, backend.maps) == (1, 1)


async def test_with_backend_leaves_the_pipeline_as_it_was():
    """``with_backend`` gives a new pipeline; the old one keeps its place."""
    before = Pipeline([node("place", run_in="loop")(Where())])
    after = before.with_backend(LocalBackend(map_execution="parallel", max_workers=1))
    assert (await before.amap({"x": [1]}, "x"))["place"][0][0] == os.getpid()
    assert (await after.amap({"x": [1]}, "x"))["place"][0][0] != os.getpid()


async def test_one_pipeline_runs_many_times_at_once():
    """One pipeline object runs in several tasks at the same time without mixing their values."""
    results = {}

    async def run(number):
        results[number] = await report.arun(text=TEXTS[number % 5], salt=number)

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(run, number)
    assert results == {number: expected(TEXTS[number % 5], number) for number in range(40)}


def test_one_pipeline_runs_in_many_threads_and_loops_at_once():
    """One pipeline object runs in several threads, each with its own loop, at the same time."""
    barrier, results = threading.Barrier(8), {}

    def run(number):
        barrier.wait(timeout=PATIENCE_S)
        results[number] = [report.run(text=TEXTS[number % 5], salt=salt) for salt in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [expected(TEXTS[n % 5], salt) for salt in range(5)] for n in range(8)}
