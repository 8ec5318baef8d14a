"""What `check` says of a remote run before it starts: of values, modules, packages, Python and caches.

The images are those of Modal's client, which are read and never built; nothing here shows what Modal would build.
"""

import importlib
import io
import socket
import sqlite3
import sys
import threading

import modal
import numpy as np
import pytest

from hypernodes import (
    DefinitionError,
    DependencyError,
    DiskCache,
    MapTypeError,
    Pipeline,
    RemoteExecutionError,
    SerializationError,
    node,
)
from hypernodes.backend import ModalBackend, Preflight, RemoteBackend, modal_image
from hypernodes.backend._site import site_of
from tests import loopback

plane, client = loopback.plane, loopback.client

OTHER = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"


@node("size")
def measure(text):
    return len(text)


TEXT = Pipeline([measure], name="text")


class Encoder:
    def __init__(self):
        self._lock = threading.RLock()


def check(inputs, *, pipeline=TEXT, image=None, **options):
    return ModalBackend(image or modal_image(), **options).check(pipeline, inputs)


def said(findings):
    return [f"{each.where} {each.what}" for each in findings]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes modules of a project, which can be imported here and nowhere else."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            written.append(name)
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in sources]

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.asyncio
class TestRuns:
    async def test_nothing_is_started(self, plane, client):
        """A check asks nothing of Modal, whatever it finds."""
        backend = ModalBackend(modal_image())
        found = await backend.acheck(TEXT, {"text": Encoder()})
        assert not found.ok
        assert (await backend.acheck(TEXT, {"text": ["a", "b"]}, map_over="text")).ok
        assert plane.calls == {}

    async def test_what_is_found_sound_runs(self, plane, client):
        """What a check finds nothing wrong with runs, and what it sizes is about what is sent."""
        backend = ModalBackend(modal_image("numpy"))
        inputs = {"text": np.zeros(3_000_000, np.uint8)}
        found = await backend.acheck(TEXT, inputs)
        assert (found.problems, found.warnings, found.unknown) == ((), (), ())
        assert await TEXT.with_backend(backend).arun(inputs) == {"size": 3_000_000}
        sent, *_ = plane.blob_sizes
        assert found.sizes["text"] + found.code == pytest.approx(sent, abs=5_000)

    async def test_maps_are_checked_as_they_run(self):
        """What is no list is refused as by a run; what is read as it runs is left alone."""
        backend = ModalBackend(modal_image())
        for wrong in ("abc", 5):
            with pytest.raises(MapTypeError, match="pipeline 'text' maps over 'text', so it takes a list"):
                await backend.acheck(TEXT, {"text": wrong}, "text")
        with pytest.raises(DependencyError, match="inputs is a dict of values by name, not str"):
            await backend.acheck(TEXT, "text")
        texts = iter(["a", "b"])
        found = await backend.acheck(TEXT, {"text": texts}, "text")
        assert found.ok
        assert "the items of inputs['text'], which is read as it runs" in found.unknown
        assert list(texts) == ["a", "b"]

    async def test_whatever_its_own_backend_is(self):
        """What is checked is a run here, of a pipeline that has another place too."""
        elsewhere = TEXT.with_backend(ModalBackend(modal_image(), gpu="T4"))
        assert (await ModalBackend(modal_image()).acheck(elsewhere, {"text": "a"})).ok

    async def test_something_else_is_checked(self):
        """What is no pipeline is refused by name."""
        with pytest.raises(DefinitionError, match="check of ModalBackend takes a Pipeline, not <node measure"):
            await ModalBackend(modal_image()).acheck(measure, {"text": "a"})

    async def test_a_run_looks_for_modules_by_itself(self, plane, client, project):
        """A run that needs a module which the image certainly lacks starts nothing."""
        (shouting,) = project(only_here="def shout(text):\n    return text.upper()\n")
        pipeline = Pipeline([node("loud")(shouting.shout)], backend=ModalBackend(modal_image()))
        with pytest.raises(
            RemoteExecutionError, match=r"no module 'only_here'.*add_local_python_source\('only_here'\)"
        ):
            await pipeline.arun(text="a")
        with pytest.raises(RemoteExecutionError, match="no module 'only_here'"):
            await pipeline.amap({"text": ["a"]}, "text")
        assert plane.calls == {}
        there = ModalBackend(modal_image().add_local_python_source("only_here"))
        assert await pipeline.with_backend(there).arun(text="a") == {"loud": "A"}

    async def test_the_image_of_a_run_is_not_changed_by_reading_it(self, plane, client):
        """An image that was looked at is built as it would have been."""
        backend = ModalBackend(modal_image("numpy").env({"A": "1"}))
        await backend.acheck(TEXT, {"text": "a"})
        await TEXT.with_backend(backend).arun(text="a")
        commands = plane.image_of(plane.functions[0]).commands
        assert commands.count("ENV A=1") == 1
        assert sum("pip install" in line and "numpy" in line for line in commands) == 1


class TestValues:
    def test_all_that_cannot_be_pickled_is_named(self):
        """Each input, each item and each function is looked at, not only up to the first that fails."""

        class Client:
            def __init__(self):
                self.encoder = Encoder()

        lock = threading.Lock()
        both = Pipeline([node("a")(lambda x, y, z: lock), Pipeline([node("b")(lambda a: (a, lock))], name="in")])
        with socket.socket() as opened:
            found = check(
                {"x": Client(), "y": ["fine", opened, threading.Lock()], "z": {"k": Encoder()}}, pipeline=both
            )
        assert [each.where for each in found.problems] == [
            "inputs['x'].encoder._lock",
            "inputs['y'][1]",
            "inputs['y'][2]",
            "inputs['z']['k']._lock",
            "<lambda>'s closure variable 'lock'",
            "in / <lambda>'s closure variable 'lock'",
        ]
        assert found.sizes == {}

    def test_many_of_a_kind_are_counted(self):
        """Of a long list, a few items are named and the others counted."""
        found = check({"text": [Encoder() for _ in range(1_000)]})
        assert len(found.problems) == 6
        assert found.problems[-1].what.startswith("has 995 more items")

    @pytest.mark.parametrize(
        ("make", "advice"),
        [
            (threading.RLock, "__setstate__"),
            (socket.socket, "open it inside the node"),
            (lambda: sqlite3.connect(":memory:"), "open it inside the node"),
            (lambda: io.BufferedReader(io.BytesIO(b"")), "open it inside the node"),
            (lambda: (x for x in ()), "send a list"),
            (lambda: sys._getframe(), "make it inside the node"),
        ],
    )
    def test_what_to_do(self, make, advice):
        """The advice is for the kind of thing that it is."""
        value = make()
        try:
            (problem,) = check({"text": value}).problems
        finally:
            getattr(value, "close", lambda: None)()
        assert advice in problem.do

    def test_sizes(self):
        """Each input has its bytes as they are sent, arrays beside the pickle too; a large one has advice."""
        found = check(
            {"text": "x" * 1_000, "more": np.zeros(13_000_000)}, pipeline=WITH_MORE, image=modal_image("numpy")
        )
        assert 1_000 < found.sizes["text"] < 1_100
        assert 104_000_000 < found.sizes["more"] < 104_001_000
        (warning,) = found.warnings
        assert said([warning]) == ["inputs['more'] is 104 MB, sent with each run"]
        assert "modal.Volume" in warning.do
        assert found.ok

    def test_it_keeps_nothing(self):
        """An array is not copied to be sized."""
        import tracemalloc

        array = np.zeros(5_000_000)
        check({"text": "a"})
        tracemalloc.start()
        try:
            check({"text": array})
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()

    def test_an_iterator_is_left_alone(self):
        """What can be gone through only once is not consumed."""
        numbers = iter([1, 2, 3])
        check({"text": numbers})
        assert list(numbers) == [1, 2, 3]

    def test_another_place_inside(self):
        """A pipeline inside that asks for another container is a problem, as it is for a run."""
        inside = Pipeline([measure], name="inside", backend=ModalBackend(modal_image(), gpu="A100"))
        (problem,) = check({"text": "a"}, pipeline=Pipeline([inside], name="outside")).problems
        assert "a container does not start others" in problem.do

    def test_names_are_checked_as_by_a_run(self):
        """An input that is missing or unknown is the error that a run would raise."""
        with pytest.raises(DependencyError, match="'text'"):
            check({})
        with pytest.raises(DependencyError, match="did you mean 'text'"):
            check({"text": 1, "texts": 2})
        with pytest.raises(ValueError, match="map_over"):
            ModalBackend(modal_image()).check(TEXT, {"text": [1]}, map_over="words")


WITH_MORE = Pipeline([node("size")(lambda text, more: 0)], name="more")


class TestModules:
    def test_those_that_a_pipeline_names(self, project):
        """By a function, a class of an input, a module, an import in a body; and what those use in turn."""
        functions, classes, _whole, _lazy, _deep = project(
            its_functions="import its_deep\ndef shout(text):\n    return its_deep.upper(text)\n",
            its_classes="class Text(str):\n    pass\n",
            its_whole="def f():\n    pass\n",
            its_lazy="",
            its_deep="def upper(text):\n    return text.upper()\n",
        )
        import its_whole

        @node("x")
        def work(text):
            import its_lazy

            return functions.shout(text), its_whole, its_lazy

        wanted = {"its_functions", "its_classes", "its_whole", "its_lazy", "its_deep"}
        found = check({"text": classes.Text("a")}, pipeline=Pipeline([work]))
        assert {each.where.strip("'") for each in found.problems} == wanted
        assert all("add_local_python_source" in each.do for each in found.problems)
        added = modal_image().add_local_python_source(*wanted)
        assert check({"text": classes.Text("a")}, pipeline=Pipeline([work]), image=added).ok

    @pytest.mark.parametrize("copied", [True, False])
    def test_those_that_files_bring(self, project, tmp_path, copied):
        """Files and folders that are added below /root are modules too, copied or mounted."""
        one, two = project(in_a_file="def f(text):\n    pass\n", in_a_folder="def g(x):\n    pass\n")
        pipeline = Pipeline([node("x")(one.f), node("y")(two.g)])
        image = modal_image().add_local_file(tmp_path / "in_a_file.py", "/root/in_a_file.py", copy=copied)
        assert said(check({"text": 1}, pipeline=pipeline, image=image).problems) == [
            "'in_a_folder' is a module of this project, and not in the image"
        ]
        assert check({"text": 1}, pipeline=pipeline, image=image.add_local_dir(tmp_path, "/root", copy=copied)).ok

    @pytest.mark.parametrize(
        "image",
        [
            modal.Image.from_registry("nvidia/cuda:12.4.0-base-ubuntu22.04"),
            modal_image().run_commands("git clone https://example.com/x && pip install ./x"),
            modal_image().pip_install("git+https://example.com/x.git"),
            modal_image().pip_install("a-package-that-is-not-installed-here"),
            modal_image().env({"PYTHONPATH": "/opt/code"}),
        ],
        ids=["registry", "commands", "repository", "unknown package", "PYTHONPATH"],
    )
    def test_what_may_be_there_is_no_problem(self, project, image):
        """Where an image may have a module by ways that cannot be read, a check warns at most, and a run runs."""
        (module,) = project(perhaps_there="def f(text):\n    pass\n")
        backend = ModalBackend(image)
        found = backend.check(Pipeline([node("x")(module.f)]), {"text": 1})
        assert "perhaps_there" not in str(found.problems)
        assert "'perhaps_there' is a module of this project, and perhaps not there" in said(found.warnings)
        backend.require(["perhaps_there"])

    def test_a_volume_or_a_deployed_app_may_have_it(self, project):
        """Nor where a volume lies on the path of modules, or the image is another's."""
        project(perhaps_there="")
        volume = modal.Volume.from_name("code")
        ModalBackend(modal_image(), volumes={"/root/code": volume}).require(["perhaps_there"])
        ModalBackend(deployed="an app").require(["perhaps_there"])
        with pytest.raises(RemoteExecutionError, match="perhaps_there"):
            ModalBackend(modal_image(), volumes={"/data": volume}).require(["perhaps_there"])

    def test_what_is_installed_is_not_the_projects(self):
        """Python's own modules, installed packages and hypernodes are never asked for."""
        ModalBackend(modal_image()).require(["json", "_thread", "numpy.linalg", "hypernodes.demo.hebrew", "builtins"])


class TestPackages:
    def test_what_the_image_lacks(self):
        """A package that the pipeline uses, and those of hypernodes itself."""
        image = modal.Image.debian_slim().pip_install("cloudpickle", "anyio>=4", "aiocache")
        found = check({"text": np.zeros(3)}, image=image)
        assert [each.where for each in found.problems] == ["numpy", "tenacity"]
        assert f"numpy=={np.__version__}" in found.problems[0].do

    def test_what_another_package_brings(self):
        """What an installed package needs is there with it."""
        assert check({"text": b"", "more": _typing()}, pipeline=WITH_MORE, image=modal_image("pydantic")).ok

    def test_a_module_that_is_nowhere(self):
        """What a node imports when it is called, and nobody knows: a warning, as packages have names of their own."""

        @node("size")
        def measure(text):
            import colorsys

            import flash_attention_nobody_has.ops

            return flash_attention_nobody_has.ops, colorsys

        found = check({"text": "a"}, pipeline=Pipeline([measure]), image=modal_image())
        assert found.ok
        assert [each.where for each in found.warnings] == ["'flash_attention_nobody_has'"]
        assert "image.pip_install" in found.warnings[0].do
        known = modal_image().pip_install("flash-attention-nobody-has")
        assert check({"text": "a"}, pipeline=Pipeline([measure]), image=known).warnings == ()

    def test_another_version(self):
        """A version that is another one than here is a warning, with both."""
        found = check({"text": np.zeros(3)}, image=modal_image("numpy==1.26.4"))
        assert found.ok
        assert said(found.warnings) == [f"numpy is 1.26.4 in the image, and {np.__version__} here"]

    @pytest.mark.parametrize("way", ["uv", "file", "uv file"])
    def test_other_ways_to_install(self, way, tmp_path):
        """uv, and files of requirements, are read as well."""
        file = tmp_path / "requirements.txt"
        file.write_text("# what it needs\nnumpy == 1.26.4  # old\ntenacity\n\ncloudpickle[x]; python_version > '3'\n")
        bare = modal.Image.debian_slim()
        image = {
            "uv": lambda: bare.uv_pip_install(
                "numpy==1.26.4", "tenacity", "cloudpickle[x]", index_url="https://x.example"
            ),
            "file": lambda: bare.pip_install_from_requirements(str(file)),
            "uv file": lambda: bare.uv_pip_install(requirements=[str(file)]),
        }[way]()
        site = site_of(image, (), secrets=False)
        assert site.packages == {"numpy": "==1.26.4", "tenacity": "", "cloudpickle": "[x]"}
        assert site.complete


def _typing():
    import typing_extensions

    return typing_extensions.deprecated


class TestPython:
    def test_another_one(self):
        """The image has another Python than this one."""
        image = modal.Image.debian_slim(python_version=OTHER).pip_install(
            "anyio", "tenacity", "aiocache", "cloudpickle"
        )
        (problem,) = check({"text": "a"}, image=image).problems
        assert problem.what.startswith(f"has Python {OTHER}, and this is Python")

    def test_one_that_is_added(self):
        """That which is added to an image of a registry is known; that of the image is not, and it is said so."""
        (problem,) = check({"text": "a"}, image=modal.Image.from_registry("debian", add_python=OTHER)).problems
        assert OTHER in problem.what
        found = check({"text": "a"}, image=modal.Image.from_registry("debian"))
        assert found.ok
        assert [each.partition(":")[0] for each in found.unknown] == [
            "which Python runs there",
            "which modules and packages are installed there",
        ]

    def test_an_image_of_another_client(self):
        """Where Modal's client keeps its images in another way, nothing is known, and nothing fails."""

        class Changed:
            def __init__(self):
                self.inner = self

            _deps = None

        for image in (Changed(), object(), None):
            site = site_of(image, ["/v"], secrets=True)
            assert (site.python, site.complete, site.volumes) == (None, False, ("/v",))


class TestCaches:
    def test_one_that_stays_here(self):
        """A cache that cannot travel caches nothing there."""
        from aiocache import SimpleMemoryCache

        (warning,) = check({"text": "a"}, pipeline=TEXT.with_cache(SimpleMemoryCache())).warnings
        assert "which stays here" in warning.what

    def test_one_that_is_on_no_volume(self, tmp_path):
        """A directory that is no volume's is gone with the container; also that of a pipeline inside."""
        inside = Pipeline([TEXT.with_cache(DiskCache(tmp_path))], name="outside")
        (warning,) = check({"text": "a"}, pipeline=inside).warnings
        assert "'text'" in warning.where
        assert "on none of the volumes" in warning.what
        volumes = {str(tmp_path): modal.Volume.from_name("results")}
        assert check({"text": "a"}, pipeline=inside, volumes=volumes).warnings == ()

    def test_one_that_is_signed(self, tmp_path):
        """A signed cache needs its key there."""
        volumes = {str(tmp_path): modal.Volume.from_name("results")}
        signed = TEXT.with_cache(DiskCache(tmp_path / "cache", key="k"))
        (warning,) = check({"text": "a"}, pipeline=signed, volumes=volumes).warnings
        assert "HYPERNODES_CACHE_KEY" in warning.do
        secrets = [modal.Secret.from_dict({"HYPERNODES_CACHE_KEY": "k"})]
        assert check({"text": "a"}, pipeline=signed, volumes=volumes, secrets=secrets).warnings == ()


class TestReport:
    def test_as_text(self):
        """It says what is wrong, line by line."""
        found = check({"text": Encoder()})
        first, *lines = str(found).splitlines()
        assert first.startswith("pipeline 'text': 1 problem, 0 warnings, ")
        assert lines[0].startswith("  problem    inputs['text']._lock is a RLock, which cannot be pickled")
        assert lines[-1].startswith("  sends      the pipeline ")
        assert repr(found) == str(found)

    def test_as_html(self):
        """Names are written as text, whatever is in them."""
        bold = Pipeline([node("y")(lambda x: x)], name="<b>bold</b>")
        bundle = check({"x": Encoder()}, pipeline=bold)._repr_mimebundle_()
        assert "<b>" not in bundle["text/html"]
        assert "&lt;b&gt;bold" in bundle["text/html"]
        assert bundle["text/plain"].startswith("pipeline '<b>bold</b>'")

    def test_raising(self):
        """All problems are in one error, of the kind that a run would raise."""
        found = check({"text": [Encoder(), Encoder()]})
        with pytest.raises(SerializationError, match=r"(?s)inputs\['text'\]\[0\]\._lock.*inputs\['text'\]\[1\]\._lock"):
            found.raise_for_problems()
        with pytest.raises(RemoteExecutionError, match="Python"):
            check({"text": "a"}, image=modal.Image.debian_slim(python_version=OTHER)).raise_for_problems()
        check({"text": "a"}).raise_for_problems()

    @pytest.mark.asyncio
    async def test_of_another_place(self, project):
        """Of a place that says nothing of itself, values are checked and the rest is not known."""
        (module,) = project(somewhere="def f(text):\n    pass\n")

        class Elsewhere(RemoteBackend):
            async def connected(self, label, receive, work):
                raise AssertionError("a check starts nothing")

        found = await Elsewhere().acheck(Pipeline([node("x")(module.f)]), {"text": Encoder()})
        assert isinstance(found, Preflight)
        assert [each.where for each in found.problems] == ["inputs['text']._lock"]
        assert [(each.where, each.do) for each in found.warnings] == [("'somewhere'", "install somewhere there")]
        assert len(found.unknown) == 2
