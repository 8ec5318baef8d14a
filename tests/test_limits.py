"""Bounds on what runs at once: named limits, per node, per map, and across runs."""

import threading

import anyio
import pytest

from hypernodes import DefinitionError, DependencyError, Pipeline, PipelineCallback, RetryPolicy, node
from hypernodes.backend import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long


class Room:
    """Counts who is inside at once; everyone stays until ``size`` have met there."""

    def __init__(self, size=1):
        self.size = size
        self.now = 0
        self.most = 0
        self.met = anyio.Event()

    async def visit(self):
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.size:
            self.met.set()
        try:
            await self.met.wait()
            for _ in range(10):
                await anyio.sleep(0)
        finally:
            self.now -= 1


class ThreadRoom:
    """The same for threads: everyone stays until ``size`` have met."""

    def __init__(self, size=1):
        self.size = size
        self.now = 0
        self.most = 0
        self.lock = threading.Lock()
        self.met = threading.Event()

    def visit(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self.size:
                self.met.set()
        assert self.met.wait(PATIENCE_S)
        with self.lock:
            self.now -= 1


def visiting(room, output_name="y", **options):
    """A node that visits a room and gives its input back."""

    async def visit(x):
        await room.visit()
        return x

    return node(output_name, **options)(visit)


async def test_a_named_limit_bounds_a_node_over_all_items():
    """``limit="api"`` with ``limits={"api": 2}`` lets exactly two items into the node at once."""
    room = Room(size=2)
    pipeline = Pipeline([visiting(room, limit="api")], limits={"api": 2})
    with anyio.fail_after(PATIENCE_S):
        assert (await pipeline.amap({"x": range(12)}, "x"))["y"] == list(range(12))
    assert room.most == 2


async def test_nodes_that_name_one_limit_share_it():
    """Two nodes that name the same limit are bounded together."""
    room = Room(size=2)
    nodes = [visiting(room, name, limit="api") for name in ("a", "b", "c")]
    pipeline = Pipeline(nodes, limits={"api": 2})
    with anyio.fail_after(PATIENCE_S):
        await pipeline.amap({"x": range(6)}, "x")
    assert room.most == 2


async def test_different_limits_do_not_bound_each_other():
    """Two limits of one each let two different nodes in at once."""
    room = Room(size=2)
    pipeline = Pipeline(
        [visiting(room, "a", limit="api"), visiting(room, "b", limit="gpu")], limits={"api": 1, "gpu": 1}
    )
    with anyio.fail_after(PATIENCE_S):
        assert await pipeline.arun(x=1) == {"a": 1, "b": 1}
    assert room.most == 2


async def test_a_number_limits_each_run_by_itself():
    """A limit given as a number is bound per run: two runs at the same time have one each."""
    room = Room(size=2)
    pipeline = Pipeline([visiting(room, limit="api")], limits={"api": 1})
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.amap({"x": range(3)}, "x"))
            tasks.start_soon(lambda: pipeline.amap({"x": range(3)}, "x"))
    assert room.most == 2


async def test_a_users_own_limiter_bounds_all_runs_that_hold_it():
    """A ``CapacityLimiter`` as the limit's value is shared by runs and pipelines, and is free in the end."""
    limiter, room = anyio.CapacityLimiter(2), Room(size=2)
    one = Pipeline([visiting(room, limit="api")], limits={"api": limiter})
    other = Pipeline([visiting(room, "z", limit="remote")], limits={"remote": limiter})
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(lambda: one.amap({"x": range(4)}, "x"))
                tasks.start_soon(lambda: other.amap({"x": range(4)}, "x"))
    assert room.most == 2
    assert limiter.borrowed_tokens == 0


async def test_a_users_limiter_is_shared_with_the_users_own_code():
    """A node waits while the user's own code holds the limiter, and runs once it is given back."""
    limiter, order = anyio.CapacityLimiter(1), []

    @node("y", limit="api")
    async def call(x):
        order.append("node")
        return x

    pipeline = Pipeline([call], limits={"api": limiter})
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks, limiter:
            tasks.start_soon(lambda: pipeline.arun(x=1))
            while limiter.statistics().tasks_waiting == 0:
                await anyio.sleep(0)
            order.append("mine")
    assert order == ["mine", "node"]


@pytest.mark.parametrize("how", ["failure", "cancellation"])
async def test_a_users_limiter_is_given_back_when_a_run_ends_early(how):
    """No token of the user's limiter is kept by a run that failed or was cancelled."""
    limiter, all_in = anyio.CapacityLimiter(3), anyio.Event()

    @node("y", limit="api")
    async def call(x):
        if limiter.borrowed_tokens == 3:
            all_in.set()
        await all_in.wait()
        if how == "failure":
            raise LookupError(x)
        await anyio.sleep_forever()

    pipeline = Pipeline([call], limits={"api": limiter})
    with anyio.fail_after(PATIENCE_S):
        if how == "failure":
            with pytest.raises(LookupError):
                await pipeline.amap({"x": range(9)}, "x")
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: pipeline.amap({"x": range(9)}, "x"))
                await all_in.wait()
                tasks.cancel_scope.cancel()
    assert limiter.borrowed_tokens == 0
    assert limiter.statistics().tasks_waiting == 0


async def test_node_max_concurrency_bounds_all_items_of_a_run():
    """``max_concurrency`` of a node holds over all items of a map."""
    room = Room(size=3)
    pipeline = Pipeline([visiting(room, max_concurrency=3)])
    with anyio.fail_after(PATIENCE_S):
        assert (await pipeline.amap({"x": range(15)}, "x"))["y"] == list(range(15))
    assert room.most == 3


async def test_node_max_concurrency_holds_across_nested_maps():
    """``max_concurrency`` of a node holds over the items of all nested maps of a run together."""
    room = Room(size=2)
    inner = Pipeline([visiting(room, max_concurrency=2)], name="inner")
    rows = Pipeline([inner.as_node({"row": "x"}, map_over="row")], name="rows")
    table = Pipeline([rows.as_node({"table": "row"}, map_over="table")], name="table")
    with anyio.fail_after(PATIENCE_S):
        result = await table.arun(table=[[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert result == {"y": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    assert room.most == 2


async def test_node_max_concurrency_holds_for_each_run_by_itself():
    """``max_concurrency`` of a node does not make two runs wait for each other."""
    room = Room(size=2)
    pipeline = Pipeline([visiting(room, max_concurrency=1)])
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.arun(x=1))
            tasks.start_soon(lambda: pipeline.arun(x=2))
    assert room.most == 2


async def test_a_node_keeps_both_its_own_bound_and_the_named_one():
    """With a limit and ``max_concurrency`` on one node, the tighter bound decides."""
    room = Room(size=2)
    pipeline = Pipeline([visiting(room, limit="api", max_concurrency=2)], limits={"api": 5})
    with anyio.fail_after(PATIENCE_S):
        await pipeline.amap({"x": range(10)}, "x")
    assert room.most == 2


@pytest.mark.parametrize("run_in", ["thread", "auto"])
async def test_a_limit_bounds_sync_nodes_in_threads(run_in):
    """Limits hold for sync functions in worker threads too."""
    room = ThreadRoom(size=2)

    def work(x):
        room.visit()
        return x

    pipeline = Pipeline([node("y", run_in=run_in, limit="disk")(work)], limits={"disk": 2})
    with anyio.fail_after(PATIENCE_S):
        assert (await pipeline.amap({"x": range(10)}, "x"))["y"] == list(range(10))
    assert room.most == 2


async def test_a_users_limiter_bounds_sync_nodes_in_threads():
    """A user's own limiter may bound a node that runs in a thread."""
    limiter, room = anyio.CapacityLimiter(2), ThreadRoom(size=2)

    def work(x):
        room.visit()
        return x

    pipeline = Pipeline([node("y", run_in="thread", limit="disk")(work)], limits={"disk": limiter})
    with anyio.fail_after(PATIENCE_S):
        assert (await pipeline.amap({"x": range(8)}, "x"))["y"] == list(range(8))
    assert room.most == 2
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("mode", ["sequential", "threaded"])
async def test_a_limit_holds_when_items_run_in_threads(mode):
    """A limit bounds a node over all worker threads of a threaded map, each with a loop of its own."""
    room = ThreadRoom(size=1)

    def work(x):
        room.visit()
        return x

    backend = LocalBackend(node_execution=mode, map_execution="threaded", max_workers=4)
    pipeline = Pipeline([node("y", limit="disk")(work)], limits={"disk": 1}, backend=backend)
    with anyio.fail_after(PATIENCE_S):
        assert (await pipeline.amap({"x": range(40)}, "x"))["y"] == list(range(40))
    assert room.most == 1


def enter_alone(folder, x):
    """Fail if another process is in here at the same time."""
    sign = folder / "occupied"
    sign.touch(exist_ok=False)
    try:
        sum(range(200_000))
    finally:
        sign.unlink()
    return x


@pytest.mark.parametrize("options", [{"limit": "disk"}, {"max_concurrency": 1}])
async def test_a_limit_bounds_nodes_in_processes(tmp_path, options):
    """A limit of one lets one process at a time into a node that runs in processes."""
    pipeline = Pipeline(
        [node("y", **options)(enter_alone)],
        limits={"disk": 1},
        backend=LocalBackend(node_execution="parallel", max_workers=2),
    )
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"folder": tmp_path, "x": range(30)}, "x")
    assert result["y"] == list(range(30))


async def test_nested_maps_finish_with_every_limit_at_one():
    """Nested maps finish when every bound there is allows one at a time: no token is held while waiting."""

    @node("numbers", limit="only")
    async def count(row):
        await anyio.sleep(0)
        return list(range(row))

    @node("square", limit="only", max_concurrency=1)
    async def square(number):
        await anyio.sleep(0)
        return number * number

    @node("total", limit="only", max_concurrency=1)
    def total(squares):
        return sum(squares)

    squares = Pipeline([square], name="squares")
    row = Pipeline(
        [
            count,
            squares.as_node({"numbers": "number"}, {"square": "squares"}, map_over="numbers", max_concurrency=1),
            total,
        ],
        name="row",
    )
    table = Pipeline(
        [row.as_node({"rows": "row"}, map_over="rows", max_concurrency=1)], name="table", limits={"only": 1}
    )
    backend = LocalBackend(max_workers=1, max_concurrency=1)
    with anyio.fail_after(PATIENCE_S):
        result = await table.with_backend(backend).amap({"rows": [[3, 4], [5]]}, "rows", max_concurrency=1)
    assert result["total"] == [[5, 14], [30]]


@pytest.mark.parametrize("mode", ["threaded", "parallel"])
async def test_nested_maps_finish_with_one_worker(mode):
    """Nested maps in one worker thread or process finish: an item's own map needs no second worker."""
    inner = Pipeline([node("double")(lambda number: 2 * number)], name="inner")
    outer = Pipeline(
        [node("numbers")(lambda n: list(range(n))), inner.as_node({"numbers": "number"}, map_over="numbers")],
        name="outer",
    )
    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=1)
    with anyio.fail_after(PATIENCE_S):
        result = await outer.with_backend(backend).amap({"n": [1, 2, 3]}, "n")
    assert result["double"] == [[0], [0, 2], [0, 2, 4]]


async def test_a_node_that_waits_to_retry_holds_no_limit():
    """Between two attempts a node gives its limit back: the other item gets in."""
    second_ran = anyio.Event()

    @node("y", limit="api", retry=RetryPolicy(attempts=2, wait_s=3600, max_wait_s=3600, jitter_s=0))
    async def call(x):
        if x == 0:
            raise ConnectionError("down")
        second_ran.set()
        return x

    pipeline = Pipeline([call], limits={"api": 1})
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.amap({"x": [0, 1]}, "x"))
            await second_ran.wait()
            tasks.cancel_scope.cancel()


async def test_a_node_that_waits_for_its_inputs_holds_no_limit():
    """A node takes its limit when it is ready to run, so a chain under a limit of one goes through."""
    nodes = [node("a", limit="one")(lambda x: x + 1), node("b", limit="one")(lambda a: a + 1)]
    nodes.append(node("c", limit="one")(lambda a, b: a + b))
    with anyio.fail_after(PATIENCE_S):
        assert await Pipeline(nodes, limits={"one": 1}).arun(x=1) == {"a": 2, "b": 3, "c": 5}


async def test_a_failing_node_gives_its_limit_back():
    """Collected failures do not use up a limit: later items still get in."""

    @node("y", limit="api")
    async def call(x):
        if x < 5:
            raise LookupError(x)
        return x

    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([call], limits={"api": 1}).amap({"x": range(10)}, "x", on_error="collect")
    assert result["y"] == [None] * 5 + [5, 6, 7, 8, 9]
    assert len(result.failures) == 5


async def test_a_nested_pipeline_uses_its_parents_limits():
    """A node of a nested pipeline may name a limit that only the outermost pipeline defines."""
    room = Room(size=2)
    inner = Pipeline([visiting(room, limit="api")], name="inner")
    outer = Pipeline([inner.as_node(map_over="x"), visiting(room, "z", limit="api")], limits={"api": 2})
    with anyio.fail_after(PATIENCE_S):
        assert await outer.arun(x=[1, 2, 3, 4]) == {"y": [1, 2, 3, 4], "z": [1, 2, 3, 4]}
    assert room.most == 2


async def test_a_nested_pipelines_own_limit_is_one_for_its_whole_run():
    """A limit defined by a mapped nested pipeline bounds all of its items together."""
    room = Room(size=2)
    inner = Pipeline([visiting(room, limit="api")], name="inner", limits={"api": 2})
    with anyio.fail_after(PATIENCE_S):
        await Pipeline([inner.as_node(map_over="x")]).arun(x=list(range(10)))
    assert room.most == 2


async def test_a_limit_set_deep_inside_is_one_for_the_whole_run():
    """A limit that a nested pipeline sets is bound once per run, also within mapped items."""
    room = Room(size=2)
    inner = Pipeline([visiting(room, limit="api")], name="inner", limits={"api": 2})
    row = Pipeline([inner.as_node({"row": "x"}, map_over="row")], name="row")
    table = Pipeline([row.as_node({"table": "row"}, map_over="table")], name="table")
    with anyio.fail_after(PATIENCE_S):
        await table.arun(table=[[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert room.most == 2


async def test_an_undefined_limit_is_refused_at_the_call():
    """A limit that nobody defines is an error of the call that names it, the node and the likely meaning."""
    ran = []
    pipeline = Pipeline([node("y", limit="opnai")(lambda x: ran.append(x))], limits={"openai": 8})
    with pytest.raises(DependencyError) as refused:
        await pipeline.arun(x=1)
    assert "'opnai'" in str(refused.value)
    assert "'openai'" in str(refused.value)
    assert "<lambda>" in str(refused.value)
    with pytest.raises(DependencyError, match="opnai"):
        await pipeline.amap({"x": [1]}, "x")
    assert ran == []


async def test_an_undefined_limit_of_a_nested_node_is_refused_at_the_call():
    """The check of limits looks into nested pipelines before anything runs."""
    ran = []
    inner = Pipeline([node("y", limit="gpu")(lambda first: first)], name="inner")
    outer = Pipeline([node("first")(lambda x: ran.append(x)), inner], name="outer")
    with pytest.raises(DependencyError, match="gpu"):
        await outer.arun(x=1)
    assert ran == []


async def test_with_limits_gives_a_new_pipeline():
    """``with_limits`` sets limits on a copy; the original still has none."""
    bare = Pipeline([node("y", limit="api")(lambda x: x)])
    assert await bare.with_limits({"api": 1}).arun(x=3) == {"y": 3}
    with pytest.raises(DependencyError, match="api"):
        await bare.arun(x=3)


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", None, True])
def test_a_limit_is_a_whole_number_or_a_limiter(value):
    """A limit that is no positive whole number and no limiter is refused when the pipeline is made."""
    with pytest.raises(DefinitionError, match="api"):
        Pipeline([node("y", limit="api")(lambda x: x)], limits={"api": value})


@pytest.mark.parametrize("value", [0, -2, 2.0, "3"])
def test_a_nodes_max_concurrency_is_a_whole_number(value):
    """A node's ``max_concurrency`` below one or of another type is refused at decoration."""
    with pytest.raises(DefinitionError, match="max_concurrency"):
        node("y", max_concurrency=value)(lambda x: x)


@pytest.mark.parametrize("value", [0, -2, 2.0, "3"])
async def test_a_maps_max_concurrency_is_a_whole_number(value):
    """A map's ``max_concurrency`` below one or of another type is refused at the call."""
    with pytest.raises(ValueError, match="max_concurrency"):
        await Pipeline([node("y")(lambda x: x)]).amap({"x": [1]}, "x", max_concurrency=value)


async def test_a_node_in_a_process_and_a_parallel_map_share_a_limit():
    """A call that waits for a worker holds no token that the items in the workers wait for."""
    mapped_runs = anyio.Event()

    class Started(PipelineCallback):
        def on_map_item_start(self, item_index, ctx):
            mapped_runs.set()

    @node("z")
    async def slow(x):
        await anyio.sleep(0.3)
        return x

    @node("y", limit="one")
    async def bounded(z):
        return z

    @node("w")
    async def after_the_map_has_its_worker(s):
        await mapped_runs.wait()
        return s

    @node("a", run_in="process", limit="one")
    def call(w):
        return w

    mapped = Pipeline([slow, bounded]).as_node(map_over="x", name="mapped")
    pipeline = Pipeline(
        [mapped, after_the_map_has_its_worker, call],
        limits={"one": 1},
        callbacks=[Started()],
        backend=LocalBackend(map_execution="parallel", max_workers=1),
    )
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.arun(x=[1, 2, 3], s=4)
    assert (result["y"], result["a"]) == ([1, 2, 3], 4)


async def test_a_token_nobody_waits_for_any_more_is_not_kept_by_an_idle_worker():
    """A failed item's call that waited for a limit gives its place up, also when its worker has no next item."""

    @node("first", limit="one")
    async def hold(x):
        if x == 0:
            await anyio.sleep(0.4)
        return x

    @node("failed")
    async def fail(x):
        if x == 1:
            await anyio.sleep(0.15)
            raise ValueError(x)

    @node("pause")
    async def pause(first):
        await anyio.sleep(0.3)

    @node("again", limit="one")
    async def hold_again(pause, x):
        return x

    pipeline = Pipeline(
        [fail, hold, pause, hold_again],
        limits={"one": 1},
        backend=LocalBackend(map_execution="parallel", max_workers=2),
    )
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.astream({"x": iter(range(3))}, "x", max_concurrency=2, on_error="collect") as items:
            made = [item.outputs and item.outputs["again"] async for item in items]
    assert made == [0, None, 2]
