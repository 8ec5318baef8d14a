"""What the type checker knows about pipelines. Checked by mypy, never run."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, assert_type

import anyio

from hypernodes import (
    INHERIT,
    CallbackContext,
    HyperNodesError,
    Input,
    ItemFailure,
    ItemResult,
    MapResult,
    NestedPipeline,
    NodeTimeoutError,
    Pipeline,
    PipelineCallback,
    events,
    node,
)
from hypernodes.backend import Backend, LocalBackend, PipelineExecutionEngine


@node("cleaned")
def clean(text: str) -> str:
    return text.strip()


inner = Pipeline([clean], name="inner")
nested = inner.as_node(input_mapping={"texts": "text"}, map_over="texts", map_mode="product", on_error="collect")
outer = Pipeline([nested, inner], limits={"gpu": 1, "api": anyio.CapacityLimiter(2)}, timeout=1.5, strict_types=True)

assert_type(nested, NestedPipeline)
assert_type(inner.name, str | None)
assert_type(inner.inputs, Mapping[str, Input])
assert_type(inner.outputs, tuple[str, ...])

# Variations are pipelines.
assert_type(inner.bind(text="x"), Pipeline)
assert_type(inner.replace(cleaned=clean), Pipeline)
assert_type(inner.with_backend(LocalBackend(map_execution="parallel", max_workers=2)), Pipeline)
assert_type(inner.with_callbacks([]), Pipeline)
assert_type(inner.with_limits({"gpu": 2}), Pipeline)
assert_type(inner.with_name("other"), Pipeline)
assert_type(inner.with_timeout(None), Pipeline)


async def calls() -> None:
    assert_type(await inner.arun({"text": "x"}), dict[str, Any])
    assert_type(await inner.arun(text="x", output_name=["cleaned"]), dict[str, Any])
    assert_type(await inner.arun(text="x", output_name="cleaned"), Any)
    assert_type(inner.run(text="x"), dict[str, Any])

    result = await inner.amap({"text": ["x"]}, "text", on_error="collect", max_failures=3)
    assert_type(result, MapResult)
    assert_type(result["cleaned"], list[Any])
    assert_type(result.failures, list[ItemFailure])
    assert_type(inner.map({"text": ["x"]}, ["text"], map_mode="product"), MapResult)

    async with inner.astream({"text": ["x"]}, "text", ordered=False) as items:
        assert_type(items, AsyncIterator[ItemResult])
        async for item in items:
            assert_type(item.index, int)
            assert_type(item.outputs, dict[str, Any] | None)
            assert_type(item.error, BaseException | None)
    with inner.stream({"text": ["x"]}, "text") as sync_items:
        assert_type(sync_items, Iterator[ItemResult])

    async with inner.aevents(text="x") as happenings:
        async for event in happenings:
            match event:
                case events.NodeChunk(chunk=chunk):
                    assert_type(chunk, Any)
                case events.RunFinished(result=answer):
                    assert_type(answer, Any)

    async with LocalBackend(map_execution="parallel") as backend:
        assert_type(backend, LocalBackend)

    inner.map({"text": ["x"]}, "text", map_mode="cross")  # type: ignore[arg-type]
    inner.map({"text": ["x"]}, "text", on_error="ignore")  # type: ignore[arg-type]
    inner.map({"text": ["x"]})  # type: ignore[call-arg]
    await inner.arun("x")  # type: ignore[call-overload]
    iter(inner.astream({"text": ["x"]}, "text"))  # type: ignore[call-overload]


class Watch(PipelineCallback):
    def on_node_end(self, node_id: str, outputs: Mapping[str, Any], duration: float, ctx: CallbackContext) -> None:
        assert_type(ctx.depth, int)
        assert_type(ctx.hierarchy_path, list[str])
        assert_type(ctx.current_pipeline_id, str)
        assert_type(ctx.parent_pipeline_id, str | None)


def backend() -> Backend:
    Pipeline([clean], callbacks=[Watch()], backend=LocalBackend())
    PipelineExecutionEngine(node_execution="threaded", map_execution="parallel", max_workers=2, max_concurrency=8)
    LocalBackend(map_execution="quick")  # type: ignore[arg-type]
    return LocalBackend(node_execution="sequential")


def errors_are_what_people_catch(error: NodeTimeoutError) -> tuple[HyperNodesError, TimeoutError]:
    return error, error


inherited = Pipeline([clean], backend=INHERIT, callbacks=INHERIT, timeout=INHERIT)
said = Pipeline([clean], backend=LocalBackend(), callbacks=[PipelineCallback()], timeout=None, limits={"gpu": 1})
Pipeline([clean], backend="local")  # type: ignore[arg-type]
Pipeline([clean], timeout="1s")  # type: ignore[arg-type]
Pipeline([clean], callbacks=PipelineCallback())  # type: ignore[arg-type]
assert_type(inner.replace(cleaned=lambda: "fake"), Pipeline)
