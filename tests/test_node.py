"""What may be a node, what a node tells about itself, and which functions are refused."""

import functools
import inspect
from dataclasses import dataclass

import anyio
import pytest

from hypernodes import Node, Pipeline, node
from hypernodes.errors import DefinitionError, HyperNodesError, OutputMismatchError

pytestmark = pytest.mark.anyio


def double(x):
    return 2 * x


async def adouble(x):
    await anyio.lowlevel.checkpoint()
    return 2 * x


def scale(x, factor):
    return factor * x


async def ascale(x, factor):
    await anyio.lowlevel.checkpoint()
    return factor * x


@dataclass
class Scaler:
    factor: int

    def scale(self, x):
        return self.factor * x

    async def ascale(self, x):
        await anyio.lowlevel.checkpoint()
        return self.factor * x

    @classmethod
    def twice(cls, x):
        return cls(2).scale(x)

    @staticmethod
    def double(x):
        return 2 * x


@dataclass
class Multiply:
    factor: int

    def __call__(self, x):
        return self.factor * x


@dataclass
class AsyncMultiply:
    factor: int

    async def __call__(self, x):
        await anyio.lowlevel.checkpoint()
        return self.factor * x


def keyword_only(*, x):
    return 2 * x


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@logged
def double_logged(x):
    return 2 * x


FORMS = {
    "function": double,
    "async function": adouble,
    "lambda": lambda x: 2 * x,
    "keyword-only parameter": keyword_only,
    "partial by keyword": functools.partial(scale, factor=2),
    "partial by position": functools.partial(lambda factor, x: factor * x, 2),
    "partial of an async function": functools.partial(ascale, factor=2),
    "partial of a partial": functools.partial(functools.partial(lambda a, b, x: a * b * x, 1), 2),
    "bound method": Scaler(2).scale,
    "async bound method": Scaler(2).ascale,
    "partial of a bound method": functools.partial(Scaler(2).scale),
    "class method": Scaler.twice,
    "static method": Scaler.double,
    "callable object": Multiply(2),
    "async callable object": AsyncMultiply(2),
    "partial of an async callable object": functools.partial(AsyncMultiply(2)),
    "function wrapped with functools.wraps": double_logged,
}


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    async def test_runs(self, form):
        """Every form of callable is a node: it gets its inputs by name and gives its one output."""
        made = node("y")(FORMS[form])
        assert await Pipeline([made]).arun(x=21) == {"y": 42}

    @pytest.mark.parametrize("form", FORMS)
    async def test_runs_many_times(self, form):
        """Every form gives right answers call after call, wherever the engine has learned to run it."""
        pipeline = Pipeline([node("y")(FORMS[form])])
        result = await pipeline.amap({"x": list(range(40))}, "x")
        assert result == {"y": [2 * x for x in range(40)]}

    @pytest.mark.parametrize("form", FORMS)
    async def test_is_still_the_plain_function(self, form):
        """A decorated node is called in a unit test exactly as the function that it was made of."""
        made = node("y")(FORMS[form])
        answer = made(x=21)
        assert (await answer if inspect.isawaitable(answer) else answer) == 42

    def test_positional_call(self):
        """A node called by hand takes positional arguments like its function."""
        clean = node("clean")(lambda text, suffix="!": text.strip() + suffix)
        assert clean(" x ") == "x!"
        assert clean(" x ", "?") == "x?"

    async def test_generator(self):
        """A generator's output is the list of what it yields."""

        @node("words")
        def split(text):
            yield from text.split()

        assert list(split("a b c")) == ["a", "b", "c"]
        assert await Pipeline([split]).arun(text="a b c") == {"words": ["a", "b", "c"]}

    async def test_async_generator(self):
        """An async generator's output is the list of what it yields."""

        @node("words")
        async def split(text):
            for word in text.split():
                await anyio.lowlevel.checkpoint()
                yield word

        assert [word async for word in split("a b c")] == ["a", "b", "c"]
        assert await Pipeline([split]).arun(text="a b c") == {"words": ["a", "b", "c"]}

    @pytest.mark.parametrize("text", ["", " "])
    async def test_generator_of_nothing(self, text):
        """A generator that yields nothing gives an empty list, which its consumer still gets."""

        @node("words")
        def split(text):
            yield from text.split()

        @node("n")
        def count(words):
            return len(words)

        assert await Pipeline([split, count]).arun(text=text) == {"words": [], "n": 0}

    async def test_generator_method_and_callable_object(self):
        """A generator may be a bound method, a callable object or a partial of an async generator."""

        class Splitter:
            def __init__(self, separator):
                self.separator = separator

            def split(self, text):
                yield from text.split(self.separator)

            async def __call__(self, text):
                for word in text.split(self.separator):
                    yield word

        async def split(text, separator):
            for word in text.split(separator):
                yield word

        pipeline = Pipeline(
            [
                node("method")(Splitter(",").split),
                node("called")(Splitter(",")),
                node("partial")(functools.partial(split, separator=",")),
            ]
        )
        assert await pipeline.arun(text="a,b") == {
            "method": ["a", "b"],
            "called": ["a", "b"],
            "partial": ["a", "b"],
        }

    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_generator_that_fails_midway(self, kind):
        """A generator that raises after some pieces fails the run with its error, its finally run."""
        closed = []

        def sync_pieces(x):
            try:
                yield x
                raise KeyError("gone")
            finally:
                closed.append(x)

        async def async_pieces(x):
            try:
                yield x
                raise KeyError("gone")
            finally:
                closed.append(x)

        pieces = node("y")(sync_pieces if kind == "sync" else async_pieces)
        with pytest.raises(KeyError, match="gone"):
            await Pipeline([pieces]).arun(x=1)
        assert closed == [1]

    async def test_closure_sees_its_variables(self):
        """A node made inside a function keeps the variables that it closes over."""

        def make(factor):
            @node("y")
            def multiply(x):
                return factor * x

            return multiply

        assert await Pipeline([make(3)]).arun(x=2) == {"y": 6}
        assert await Pipeline([make(5)]).arun(x=2) == {"y": 10}

    @pytest.mark.parametrize("value", [None, 0, "", [], (), False, (1, 2), ..., ValueError("a value")])
    async def test_any_value_is_a_value(self, value):
        """None, empty and odd values travel between nodes as they are, the very same object."""
        make = node("made")(lambda: value)

        @node("seen")
        async def see(made, given):
            return [made, given]

        result = await Pipeline([make, see]).arun(given=value)
        assert result["made"] is value
        assert result["seen"][0] is value
        assert result["seen"][1] is value


class TestOutputs:
    async def test_tuple(self):
        """A tuple of names spreads a returned tuple over as many outputs."""

        @node(("head", "tail"))
        def split(items):
            return items[0], items[1:]

        @node("again")
        async def join(tail, head):
            return [head, *tail]

        assert await Pipeline([join, split]).arun(items=[1, 2, 3]) == {
            "head": 1,
            "tail": [2, 3],
            "again": [1, 2, 3],
        }

    async def test_tuple_of_one(self):
        """A tuple of one name takes a tuple of one value."""
        one = node(("y",))(lambda x: (x,))
        assert await Pipeline([one]).arun(x=1) == {"y": 1}

    async def test_str_keeps_a_tuple_whole(self):
        """With one name, a returned tuple is one value."""
        pair = node("pair")(lambda x: (x, x))
        assert await Pipeline([pair]).arun(x=1) == {"pair": (1, 1)}

    @pytest.mark.parametrize(
        "returned",
        [(1,), (1, 2, 3), (), None, 1, "ab"],
        ids=["too few", "too many", "empty", "None", "a number", "a str of that length"],
    )
    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_wrong_number(self, returned, kind):
        """A node that returns the wrong number of outputs fails with both numbers' story and its own name."""

        async def asplit(x):
            return returned

        def split(x):
            return returned

        made = node(("left", "right"))(split if kind == "sync" else asplit)
        with pytest.raises(OutputMismatchError) as caught:
            await Pipeline([made]).arun(x=1)
        message = str(caught.value)
        assert made.name in message
        assert "2" in message or "two" in message
        assert "left" in message
        assert "right" in message
        assert isinstance(caught.value, ValueError)

    async def test_wrong_number_in_a_map(self):
        """In a map the mismatch says which item it was, and with collect the other items are kept."""
        split = node(("left", "right"))(lambda x: tuple(range(x)))
        pipeline = Pipeline([split], name="p")
        result = await pipeline.amap({"x": [2, 3, 2]}, "x", on_error="collect")
        assert result == {"left": [0, None, 0], "right": [1, None, 1]}
        [failure] = result.failures
        assert failure.index == 1
        assert isinstance(failure.error, OutputMismatchError)


class TestDefaults:
    async def test_used_when_absent(self):
        """A parameter with a default is an optional input."""
        greet = node("greeting")(lambda name, greeting_word="hello": f"{greeting_word} {name}")
        pipeline = Pipeline([greet])
        assert await pipeline.arun(name="Ada") == {"greeting": "hello Ada"}
        assert await pipeline.arun(name="Ada", greeting_word="hi") == {"greeting": "hi Ada"}

    async def test_none_given_is_given(self):
        """A None that the caller gives is not replaced by the default."""
        show = node("y")(lambda x=1: repr(x))
        assert await Pipeline([show]).arun(x=None) == {"y": "None"}

    async def test_producer_wins_over_default(self):
        """When another node produces the name, its value is taken and the default is not."""

        @node("k")
        def choose():
            return 7

        @node("y")
        def use(k=1):
            return k

        assert await Pipeline([use, choose]).arun() == {"k": 7, "y": 7}

    async def test_each_node_has_its_own_default(self):
        """Two nodes may default the same input differently; a given value reaches both."""
        pipeline = Pipeline([node("a")(lambda k=1: k), node("b")(lambda k=2: k)])
        assert await pipeline.arun() == {"a": 1, "b": 2}
        assert await pipeline.arun(k=5) == {"a": 5, "b": 5}


class TestAbout:
    def test_attributes(self):
        """A node tells its name, function, output as given, outputs as a tuple, and inputs."""
        made = node("y")(double)
        assert isinstance(made, Node)
        assert made.name == "double"
        assert made.func is double
        assert made.output_name == "y"
        assert made.outputs == ("y",)
        assert list(made.inputs) == ["x"]

    def test_tuple_attributes(self):
        """A node with several outputs keeps the tuple as given."""
        made = node(("a", "b"))(lambda x: (x, x))
        assert made.output_name == ("a", "b")
        assert made.outputs == ("a", "b")

    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (double, "double"),
            (Scaler(2).scale, "scale"),
            (Multiply(2), "Multiply"),
            (functools.partial(scale, factor=2), "scale"),
            (functools.partial(functools.partial(scale), factor=2), "scale"),
            (functools.partial(Multiply(2)), "Multiply"),
            (double_logged, "double_logged"),
        ],
    )
    def test_name(self, function, name):
        """A node is named after its function, a callable object's class, or what a partial wraps."""
        assert node("y")(function).name == name

    def test_inputs(self):
        """Each input carries its name, annotation, default and whether it is required."""

        @node("y")
        def call(text: str, k: int = 5, *, client=None):
            return text * k

        assert list(call.inputs) == ["text", "k", "client"]
        text, k, client = call.inputs.values()
        assert (text.name, text.annotation, text.required) == ("text", str, True)
        assert (k.name, k.annotation, k.default, k.required) == ("k", int, 5, False)
        assert (client.default, client.required) == (None, False)

    def test_inputs_of_a_partial(self):
        """A keyword fixed by a partial stays as an optional input; a position fixed by one is gone."""
        by_keyword = node("y")(functools.partial(scale, factor=2))
        assert {name: given.required for name, given in by_keyword.inputs.items()} == {
            "x": True,
            "factor": False,
        }
        by_position = node("y")(functools.partial(scale, 2))
        assert list(by_position.inputs) == ["factor"]

    def test_inputs_are_read_only(self):
        """The inputs of a node can't be written to."""
        made = node("y")(double)
        with pytest.raises(TypeError):
            made.inputs["x"] = None

    def test_is_immutable(self):
        """A node is not changed by assignment."""
        made = node("y")(double)
        with pytest.raises(AttributeError):
            made.name = "other"
        assert made.name == "double"

    def test_function_is_untouched(self):
        """Making a node writes nothing on the user's function, which may become several nodes."""

        def work(x):
            return x + 1

        before = dict(vars(work))
        first, second = node("a")(work), node("b", timeout=5)(work)
        assert vars(work) == before
        assert Pipeline([first, second]).run(x=1) == {"a": 2, "b": 2}

    def test_keeps_the_docstring(self):
        """A decorated function keeps its docstring, so that help() still helps."""

        @node("y")
        def documented(x):
            """Say what it does."""
            return x

        assert documented.__doc__ == "Say what it does."

    def test_repr(self):
        """A node's repr says its name, inputs and output."""
        text = repr(node("embedding")(ascale))
        for word in ("ascale", "embedding", "x", "factor"):
            assert word in text


def star(*args):
    return args


def double_star(**options):
    return options


def both(x, *rest, **extra):
    return x


def positional_only(x, /, y):
    return x + y


class TestRefused:
    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (star, ["star", "*args"]),
            (double_star, ["double_star", "**options"]),
            (both, ["both", "*rest"]),
            (positional_only, ["positional_only", "positional-only", "x"]),
            (functools.partial(star), ["star", "*args"]),
        ],
    )
    def test_parameters_without_a_name(self, function, words):
        """Parameters that can't be filled by name are refused at decoration, saying which and why."""
        with pytest.raises(DefinitionError) as caught:
            node("y")(function)
        for word in words:
            assert word in str(caught.value)

    def test_builtin_without_a_signature(self):
        """A builtin whose parameters can't be read is refused at decoration, by name."""
        with pytest.raises(DefinitionError, match="max"):
            node("y")(max)

    def test_decorator_without_parentheses(self):
        """@node without an output name says how to write it."""
        with pytest.raises(DefinitionError, match=r"@node\("):

            @node
            def work(x):
                return x

    @pytest.mark.parametrize("thing", [3, "double", None, [double]])
    def test_not_callable(self, thing):
        """Something that can't be called is refused and shown."""
        with pytest.raises(DefinitionError, match=r"call"):
            node("y")(thing)

    @pytest.mark.parametrize("name", ["", (), 3, None, ("a", 3), ("a", ""), "two words", "a-b"])
    def test_bad_output_name(self, name):
        """An output name is a str that can be a parameter's name, or a tuple of such."""
        with pytest.raises(DefinitionError):
            node(name)(double)

    def test_same_output_twice(self):
        """A tuple that repeats an output name is refused, naming it."""
        with pytest.raises(DefinitionError, match="head"):
            node(("head", "head"))(double)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"run_in": "tread"}, ["run_in", "tread", "thread"]),
            ({"max_concurrency": 0}, ["max_concurrency", "0"]),
            ({"max_concurrency": -1}, ["max_concurrency", "-1"]),
            ({"max_concurrency": 1.5}, ["max_concurrency", "1.5"]),
            ({"max_concurrency": True}, ["max_concurrency", "True"]),
            ({"timeout": 0}, ["timeout", "0"]),
            ({"timeout": -2}, ["timeout", "-2"]),
            ({"timeout": "5"}, ["timeout", "5"]),
            ({"retry": 0}, ["attempts", "0"]),
            ({"retry": -1}, ["attempts", "-1"]),
            ({"retry": "often"}, ["retry", "often"]),
            ({"limit": 3}, ["limit", "3"]),
        ],
    )
    def test_bad_option(self, options, words):
        """An option out of its range is refused at decoration, naming the option and the value."""
        with pytest.raises(DefinitionError) as caught:
            node("y", **options)(double)
        for word in words:
            assert word in str(caught.value)

    def test_unknown_option(self):
        """An option that does not exist is a TypeError, as for any Python function."""
        with pytest.raises(TypeError, match="max_concurency"):
            node("y", max_concurency=3)

    def test_errors_are_also_value_errors(self):
        """A refused definition is caught as a HyperNodesError or as a ValueError."""
        for kind in (HyperNodesError, ValueError):
            with pytest.raises(kind):
                node("y")(star)


@pytest.mark.parametrize("name", ["class", ("good", "lambda"), "None"])
def test_an_output_named_as_a_keyword(name):
    """No parameter could be called like a keyword, so no node may make one."""
    with pytest.raises(DefinitionError, match="keyword"):
        node(name)
    assert node("match")(lambda x: x).outputs == ("match",)
