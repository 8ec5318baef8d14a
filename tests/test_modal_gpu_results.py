"""What a GPU holds comes back on the CPU, wherever it hides in a result, and can be used without a GPU.

Where there is no GPU, the device is faked, and nothing else: torch is told to write the storages of some tensors as
being on "cuda:0". So messages hold the bytes that a machine with a GPU writes, and it is torch itself that refuses them
where they are not brought to the CPU; `test_the_fake_is_one` shows that it does. The tensors' own `device` is not
faked. Where there is a GPU, the same tests run with tensors that are on it.
"""

import collections
import dataclasses
import os
import pickle
import subprocess
import sys
import types
from typing import Any

import pydantic
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

import modal  # noqa: E402  (after the skip)

from hypernodes import Pipeline, node  # noqa: E402
from hypernodes.backend import ModalBackend  # noqa: E402
from hypernodes.backend._message import packed, unpacked  # noqa: E402
from tests import loopback  # noqa: E402

plane, client = loopback.plane, loopback.client

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["faked", pytest.param("cuda", marks=no_gpu)])
def on_gpu(request, monkeypatch):
    """Returns a function that brings a tensor to the GPU: to a real one, or to one that only its pickle knows of."""
    if request.param == "cuda":
        return lambda tensor: tensor.to("cuda")
    there = []
    monkeypatch.setattr(torch.serialization, "_package_registry", list(torch.serialization._package_registry))

    def location(storage):
        pointer = (storage if isinstance(storage, torch.UntypedStorage) else storage._untyped_storage).data_ptr()
        return "cuda:0" if pointer in {each.data_ptr() for each in there} else None

    torch.serialization.register_package(0, location, lambda storage, location: None)

    def bring(tensor):
        parts = [tensor]
        if tensor.layout is torch.sparse_coo:
            parts = [tensor._indices(), tensor._values()]
        elif tensor.layout is torch.sparse_csr:
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        there.extend(part.untyped_storage() for part in parts)
        return tensor

    return bring


def sent(value):
    """What arrives at the other end."""
    return unpacked(packed("returned", value))[1]


def test_the_fake_is_one(on_gpu):
    """What torch pickles itself cannot be unpickled without a GPU."""
    written = pickle.dumps(on_gpu(torch.arange(3.0)))
    loading = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
    done = subprocess.run(
        loading, input=written, capture_output=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert b"Attempting to deserialize object on a CUDA device" in done.stderr


def test_without_a_gpu(on_gpu):
    """A message with all kinds of tensors can be read in a process that has no GPU."""
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(on_gpu(torch.ones(2, 3)))
    data = packed("returned", {"model": model, "rows": on_gpu(torch.ones(4, 3))[1:3]})
    script = """if True:
        import sys
        from hypernodes.backend._message import unpacked
        result = unpacked(sys.stdin.buffer.read())[1]
        print(result["model"](result["rows"]).shape, result["model"].weight.device)
        """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True, env=environment)
    assert done.stdout.decode().strip() == "torch.Size([2, 2]) cpu"


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass(frozen=True)
class Scores:
    name: str
    values: Any


class Batch(pydantic.BaseModel, arbitrary_types_allowed=True):
    tensors: dict[str, torch.Tensor]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


HIDES = {
    "itself": (lambda t: t, lambda v: v),
    "a dict": (lambda t: {"a": {"b": t}}, lambda v: v["a"]["b"]),
    "a list": (lambda t: [0, [t]], lambda v: v[1][0]),
    "a tuple": (lambda t: (t,), lambda v: v[0]),
    "a named tuple": (lambda t: Pair(1, t), lambda v: v.second),
    "a dataclass": (lambda t: Scores("x", [t]), lambda v: v.values[0]),
    "a pydantic model": (lambda t: Batch(tensors={"a": t}), lambda v: v.tensors["a"]),
    "an object": (lambda t: types.SimpleNamespace(inner=types.SimpleNamespace(t=t)), lambda v: v.inner.t),
    "an object with slots": (Slotted, lambda v: v.value),
    "a closure": (lambda t: lambda: t, lambda v: v()),
    "an ordered dict": (lambda t: collections.OrderedDict(a=t), lambda v: v["a"]),
    "a deque": (lambda t: collections.deque([t]), lambda v: v[0]),
    "all of them": (
        lambda t: {"x": [Scores("y", Pair(Batch(tensors={"z": t}), None))]},
        lambda v: v["x"][0].values.first.tensors["z"],
    ),
}


@pytest.mark.parametrize("where", HIDES)
def test_a_tensor_is_found(on_gpu, where):
    """Whatever a tensor hides in, it comes to the CPU, with its values and type."""
    hide, seek = HIDES[where]
    there = hide(on_gpu(torch.arange(6.0).reshape(2, 3)))
    here = sent(there)
    assert type(here) is type(there)
    tensor = seek(here)
    assert type(tensor) is torch.Tensor
    assert tensor.device.type == "cpu"
    assert torch.equal(tensor + 1, torch.arange(6.0).reshape(2, 3) + 1)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_every_kind_of_number(on_gpu, dtype):
    """Types of numbers are kept, also those that numpy lacks; torch 2.13 can pickle no uint16, uint32 and uint64."""
    made = torch.tensor([0, 1, 1]).to(dtype)
    here = sent(on_gpu(made.clone()))
    assert here.dtype is dtype
    assert torch.equal(here, made)


@pytest.mark.parametrize("empty", [(0,), (3, 0), ()])
def test_shapes_without_items(on_gpu, empty):
    """An empty tensor and a scalar keep their shapes."""
    assert sent(on_gpu(torch.zeros(empty))).shape == torch.Size(empty)


class TestModules:
    def test_a_parameter(self, on_gpu):
        """A parameter stays one, and says whether it is trained."""
        for trained in (True, False):
            here = sent(torch.nn.Parameter(on_gpu(torch.ones(2)), requires_grad=trained))
            assert type(here) is torch.nn.Parameter
            assert here.requires_grad is trained
            assert torch.equal(here, torch.ones(2))

    def test_a_module(self, on_gpu):
        """Parameters and buffers are the module's own, and it can be trained further."""
        there = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        there._apply(on_gpu)
        here = sent({"model": there})["model"]
        assert [name for name, _ in here.named_parameters()] == [name for name, _ in there.named_parameters()]
        assert all(type(each) is torch.nn.Parameter and each.device.type == "cpu" for each in here.parameters())
        assert {name: value.tolist() for name, value in here.state_dict().items()} == {
            name: value.tolist() for name, value in there.state_dict().items()
        }
        here(torch.ones(2, 3)).sum().backward()
        torch.optim.SGD(here.parameters(), lr=0.1).step()

    def test_tied_weights_stay_tied(self, on_gpu):
        """A parameter that two layers share is one object here too."""
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "out": torch.nn.Linear(2, 4, bias=False)})
        model._apply(on_gpu)
        model["out"].weight = model["embed"].weight
        here = sent(model)
        assert here["out"].weight is here["embed"].weight

    def test_an_optimizer(self, on_gpu):
        """Its state comes along, and goes on from there."""
        weight = torch.nn.Parameter(on_gpu(torch.ones(2)))
        optimizer = torch.optim.Adam([weight])
        weight.sum().backward()
        optimizer.step()
        for value in optimizer.state[weight].values():
            on_gpu(value)
        here, moved = sent((weight, optimizer))
        assert moved.param_groups[0]["params"][0] is here
        (here * 2).sum().backward()
        moved.step()


class TestTensors:
    def test_the_same_one_twice(self, on_gpu):
        """A tensor that is in a result twice is one tensor, and is sent once."""
        tensor = on_gpu(torch.ones(10_000))
        first, second = sent([tensor, tensor])
        assert first is second
        assert len(packed("returned", [tensor, tensor])) < 2 * tensor.nbytes

    @pytest.mark.parametrize("brought", [True, False])
    def test_a_part_is_sent_without_the_rest(self, on_gpu, brought):
        """A row, or a column, of a large tensor costs what it holds itself, on the GPU and on the CPU."""
        large = torch.arange(1_000_000.0).reshape(1_000, 1_000)
        there = on_gpu(large) if brought else large
        for part, same in ((there[3], large[3]), (there[:, 3], large[:, 3]), (there[::100, :5], large[::100, :5])):
            assert len(packed("returned", part)) < part.nbytes + 2_000
            assert torch.equal(sent(part), same.cpu())

    def test_strides(self, on_gpu):
        """A transposed tensor keeps its order in memory; an expanded one costs its one item."""
        there = on_gpu(torch.arange(6.0).reshape(2, 3)).t()
        assert sent(there).stride() == there.stride() == (1, 3)
        wide = on_gpu(torch.ones(1)).expand(1_000_000)
        assert len(packed("returned", wide)) < 2_000
        assert torch.equal(sent(wide), torch.ones(1_000_000))

    def test_gradients(self, on_gpu):
        """What asks for gradients does so here; how it was computed stays there."""
        leaf = on_gpu(torch.ones(3)).requires_grad_()
        assert sent(leaf).requires_grad
        made = sent(on_gpu(leaf * 2))
        assert made.requires_grad
        assert made.grad_fn is None
        part = sent(leaf[:1])
        assert part.requires_grad
        assert part.grad_fn is None

    def test_inference_mode(self, on_gpu):
        """Tensors of inference mode come too."""
        with torch.inference_mode():
            rows = on_gpu(torch.arange(4.0).reshape(2, 2) + 0)
            assert sent([rows, rows[0]])[1].tolist() == [0, 1]

    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
    @pytest.mark.filterwarnings("ignore:Sparse")
    def test_sparse(self, on_gpu, layout):
        """A sparse tensor stays sparse."""
        dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        here = sent(on_gpu(dense.to_sparse(layout=layout)))
        assert here.layout is layout
        assert torch.equal(here.to_dense(), dense)

    def test_a_conjugate(self, on_gpu):
        """A lazily conjugated tensor has its values."""
        there = on_gpu(torch.tensor([1 + 2j, 3 + 4j])).conj()
        assert sent(there).tolist() == [1 - 2j, 3 - 4j]
        assert sent(there[:1]).tolist() == [1 - 2j]

    def test_attributes(self, on_gpu):
        """What a user has put onto a tensor comes along."""
        tensor = on_gpu(torch.ones(2))
        tensor.tag = {"language": "he"}
        assert sent(tensor).tag == {"language": "he"}

    def test_a_subclass(self, on_gpu):
        """A tensor of a class of the user's own stays one."""
        tensor = on_gpu(torch.ones(2)).as_subclass(Named)
        tensor.name_of_it = "x"
        here = sent(tensor)
        assert (type(here), here.name_of_it) == (Named, "x")

    def test_without_data(self):
        """A tensor of the meta device, which has no data, stays there."""
        assert sent(torch.ones(3, device="meta")).device.type == "meta"


class Named(torch.Tensor):
    pass


@pytest.mark.asyncio
async def test_from_a_container(plane, client):
    """Results come to the CPU from a container that says of all its tensors that they are on a GPU."""

    @node("model")
    def train(size):
        import torch

        torch.serialization.register_package(0, lambda storage: "cuda:0", lambda storage, location: None)
        return torch.nn.Linear(size, 1)

    @node("found")
    def apply(model, size):
        import torch

        return {"scores": [model(torch.ones(2, size))]}

    pipeline = Pipeline([train, apply], backend=ModalBackend(modal.Image.debian_slim()))
    made = await pipeline.arun(size=3)
    assert torch.equal(made["model"](torch.ones(2, 3)), made["found"]["scores"][0])
