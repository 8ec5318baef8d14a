"""What is built and shipped. Needs the sources: `.ci/run` leaves it out where it tests the built package."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import hypernodes
from hypernodes.backend._image import NEEDED

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(dist_info(wheel) + "METADATA").decode())


def dist_info(wheel: zipfile.ZipFile) -> str:
    return next(name for name in wheel.namelist() if name.endswith("/METADATA")).removesuffix("METADATA")


def test_the_version_is_the_same_everywhere() -> None:
    changelog = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == hypernodes.__version__ == changelog[0]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if not name.startswith(dist_info(wheel))}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "hypernodes").rglob("*.py")}
    assert shipped == sources | {"hypernodes/py.typed"}


def test_the_wheel_carries_its_license(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert wheel.read(dist_info(wheel) + "licenses/LICENSE").startswith(b"MIT License")


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    entry_points = wheel.read(dist_info(wheel) + "entry_points.txt").decode()
    assert "hypernodes = hypernodes._cli:main" in entry_points


def test_the_demo_is_not_among_the_dependencies(metadata: Message) -> None:
    needed = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    needed = {re.split(r"[<>=;\[ ]", line)[0] for line in needed}
    assert needed == {"aiocache", "anyio", "cloudpickle", "tenacity"}
    assert needed == set(NEEDED), "what modal_image installs"
