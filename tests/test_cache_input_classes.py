"""The code of the classes that inputs are of is part of a signature: who edits an encoder's method gets new vectors."""

import subprocess
import sys
import textwrap

import pytest

ENCODER = """
from dataclasses import dataclass

def strength():
    return {strength}

class Base:
    def finish(self, text):
        return text + "{end}"

@dataclass
class Encoder(Base):
    times: int

    def encode(self, text):
        return self.finish(text * self.times * strength())
"""
SCRIPT = """
import sys
from hypernodes import DiskCache, Pipeline, node
from encoders import Encoder

@node("vector")
def encode(text, encoder):
    return encoder.encode(text)

@node("size")
def measure(vector):
    return len(vector)

pipeline = Pipeline([encode, measure], cache=DiskCache(sys.argv[1]))
inputs = {"text": ["a", "bc"], "encoder": Encoder(2)}
ran = []

class Watch:
    def on_node_start(self, node_id, inputs, ctx):
        ran.append(node_id)

print(pipeline.with_callbacks([Watch()]).map(inputs, "text")["vector"], len(ran))
"""


@pytest.fixture
def run(tmp_path):
    """Run the script with an encoder's code; return what it prints: the vectors, and how many nodes were run."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))

    def run(**code):
        (tmp_path / "encoders.py").write_text(ENCODER.format(**{"strength": 1, "end": "", **code}))
        command = [sys.executable, "-B", str(tmp_path / "script.py"), str(tmp_path / "cache")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return run


def test_the_code_of_an_inputs_class_counts(run):
    """A method of the input's class, of its base, or a function that it calls is edited: no stale result."""
    assert run() == "['aa', 'bcbc'] 4"
    assert run() == "['aa', 'bcbc'] 0"
    assert run(end=".") == "['aa.', 'bcbc.'] 4"
    assert run(strength=2) == "['aaaa', 'bcbcbcbc'] 4"
    assert run(end=".") == "['aa.', 'bcbc.'] 0"
