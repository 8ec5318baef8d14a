"""Hebrew retrieval: which verse of the Bible does a misspelled quotation come from?

This is the whole job in one file. Each function below works on single items; the pipelines say what is done
for each passage and for each query. Names tie it together: a parameter is an input, or the output of the node
that carries its name::

    passages ── encode each passage ── index ──┐
        └────── queries ── encode each query ──┴── search with each query ── flatten ── evaluate

Run it on the first 200 verses, on 2,000 or on all: the definition stays the same.

>>> from hypernodes.demo.encoders import HashingEncoder
>>> metrics = retrieval.run(encoder=HashingEncoder(), num_passages=200, num_queries=50, output_name="metrics")
>>> metrics["recall@10"] > 0.9
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hypernodes import Pipeline, node
from hypernodes.demo.corpus import Passage, Query, known_item_queries, letters_only, read_bible
from hypernodes.demo.encoders import Encoder, Vector

__all__ = ["Hit", "Index", "encode_text", "retrieval", "search"]


class Index(NamedTuple):
    """The vectors of all passages, one a row, and whose they are."""

    passage_ids: list[str]
    vectors: npt.NDArray[np.float32]


class Hit(NamedTuple):
    """A passage found for a query; rank 1 is the best."""

    query_id: int
    rank: int
    passage_id: str
    score: float


# -- Data


@node("passages")
def load_passages(num_passages: int | None = None) -> list[Passage]:
    """The first verses of the Bible, or all of them."""
    return read_bible()[:num_passages]


@node("queries")
def load_queries(passages: Sequence[Passage], num_queries: int = 1_000, seed: int = 0) -> list[Query]:
    """Misspelled quotations, each with the passage that a good search finds."""
    return known_item_queries(passages, num_queries, seed)


# -- One text in, one vector out: used for passages and for queries


@node("letters")
def clean(source: Passage | Query) -> str:
    return letters_only(source.text)


@node("vector")
def encode(letters: str, encoder: Encoder) -> Vector:
    return encoder.encode(letters)


encode_text = Pipeline([clean, encode], name="encode_text")


# -- One query in, its best passages out


@node("index")
def build_index(passages: Sequence[Passage], passage_vectors: Sequence[Vector]) -> Index:
    return Index([passage.id for passage in passages], np.stack(passage_vectors))


@node("best")
def retrieve(query: Query, query_vector: Vector, index: Index, top_k: int = 10) -> list[Hit]:
    """The ``top_k`` passages whose vectors are closest to the query's, best first."""
    # Not `@`: its threads, times those of other queries at the same time, would fight over the cores.
    scores = np.einsum("rd,d->r", index.vectors, query_vector)
    top_k = min(top_k, len(scores))
    best = np.argpartition(scores, -top_k)[-top_k:]
    best = best[np.argsort(-scores[best], kind="stable")]
    return [Hit(query.id, rank, index.passage_ids[row], float(scores[row])) for rank, row in enumerate(best, start=1)]


search = Pipeline([retrieve], name="search")


# -- How good it was


@node("hits")
def flatten(hits_per_query: Sequence[Sequence[Hit]]) -> list[Hit]:
    return [hit for hits in hits_per_query for hit in hits]


@node("metrics")
def evaluate(queries: Sequence[Query], hits: Sequence[Hit], top_k: int = 10) -> dict[str, float]:
    """The share of queries whose passage was among the ``top_k`` found, and the mean of 1 / its rank."""
    wanted = {query.id: query.passage_id for query in queries}
    ranks = [hit.rank for hit in hits if hit.passage_id == wanted[hit.query_id]]
    return {
        f"recall@{top_k}": len(ranks) / len(queries),
        "MRR": sum(1 / rank for rank in ranks) / len(queries),
    }


# -- The whole job

retrieval = Pipeline(
    [
        load_passages,
        load_queries,
        encode_text.as_node(
            name="encode_passages",
            input_mapping={"passages": "source"},
            output_mapping={"letters": "passage_letters", "vector": "passage_vectors"},
            map_over="passages",
        ),
        encode_text.as_node(
            name="encode_queries",
            input_mapping={"queries": "source"},
            output_mapping={"letters": "query_letters", "vector": "query_vectors"},
            map_over="queries",
        ),
        build_index,
        search.as_node(
            input_mapping={"queries": "query", "query_vectors": "query_vector"},
            output_mapping={"best": "hits_per_query"},
            map_over=["queries", "query_vectors"],
        ),
        flatten,
        evaluate,
    ],
    name="retrieval",
)
