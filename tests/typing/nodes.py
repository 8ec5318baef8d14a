"""What the type checker knows about nodes. Checked by mypy, never run."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, assert_type

from hypernodes import Input, Node, RetryPolicy, node


@node("cleaned")
def clean(text: str, strip: bool = True) -> str:
    return text.strip() if strip else text


@node("vector", max_concurrency=8, limit="gpu", timeout=1.5, retry=3)
async def embed(cleaned: str) -> list[float]:
    return [float(len(cleaned))]


@node(("words", "count"), run_in="thread", retry=RetryPolicy(attempts=2, on=(OSError, ValueError)))
def split(cleaned: str) -> tuple[list[str], int]:
    words = cleaned.split()
    return words, len(words)


@node("lines")
def lines(text: str) -> Iterator[str]:
    yield from text.splitlines()


@node("tokens")
async def tokens(prompt: str) -> AsyncIterator[str]:
    yield prompt


class Model:
    def predict(self, text: str) -> float:
        return float(len(text))


# A decorated function is called as the plain one, with its types.
assert_type(clean("x"), str)
assert_type(clean(text="x", strip=False), str)
assert_type(split("a b"), tuple[list[str], int])
assert_type(lines("a"), Iterator[str])
assert_type(tokens("a"), AsyncIterator[str])
assert_type(node("score")(Model().predict)("x"), float)

clean(1)  # type: ignore[arg-type]
clean()  # type: ignore[call-arg]
clean("x", trim=True)  # type: ignore[call-arg]


async def awaited() -> None:
    assert_type(await embed("x"), list[float])


# What it says about itself.
assert_type(clean.name, str)
assert_type(clean.outputs, tuple[str, ...])
assert_type(clean.output_name, str | tuple[str, ...])
assert_type(clean.inputs, Mapping[str, Input])


def takes_any_node(some: Node[..., Any]) -> None: ...


takes_any_node(clean)
takes_any_node(embed)

# What it refuses.
node("x", run_in="gpu")  # type: ignore[call-overload]
node("x", max_concurrency="8")  # type: ignore[call-overload]
node("x", cache="disk")  # type: ignore[call-overload]
node(1)  # type: ignore[call-overload]


retry_one = RetryPolicy(on=ConnectionError)
assert_type(retry_one.on, tuple[type[Exception], ...])
RetryPolicy(on="ConnectionError")  # type: ignore[arg-type]  # an exception type, not its name
