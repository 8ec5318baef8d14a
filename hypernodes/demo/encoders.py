"""Encoders: one text in, one vector of length 1 out, so that a dot product is the cosine similarity.

An encoder is a plain object with ``encode(text)``; the pipeline takes it as an input like any other.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Encoder", "HashingEncoder", "SentenceTransformerEncoder", "Vector"]

Vector = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What the pipeline asks of an encoder."""

    def encode(self, text: str) -> Vector:
        """A float32 vector of length 1; all zeros for a text with nothing to encode."""
        ...


_PRIME = np.uint32(0x01000193)
_MIX = np.uint32(0x9E3779B1)
_FINAL_FORMS = str.maketrans("ךםןףץ", "כמנפצ")


@dataclass(frozen=True)
class HashingEncoder:
    """Counts the text's letter n-grams in hashed buckets; needs no model and no training.

    The hash is arithmetic on character codes: the same text gives the same vector in every process.
    Counts go in as their square roots, and a final letter (ך) counts as its normal form (כ).

    Args:
        dimensions: length of the vectors.
        smallest, largest: lengths of the n-grams, in characters; a word's edge counts as one.
    """

    dimensions: int = 512
    smallest: int = 2
    largest: int = 4

    def encode(self, text: str) -> Vector:
        """Return the vector; all zeros for an empty text."""
        padded = f" {text.translate(_FINAL_FORMS)} "
        codes = np.frombuffer(padded.encode("utf-32-le"), dtype="<u4").astype(np.uint32)
        grams, hashes = codes, []
        for size in range(2, min(self.largest, len(text) + 2) + 1):
            grams = grams[:-1] * _PRIME + codes[size - 1 :]  # wraps at 32 bits, as a hash should
            if size >= self.smallest:
                hashes.append(grams)
        if not text or not hashes:
            return np.zeros(self.dimensions, np.float32)
        buckets = (np.concatenate(hashes) * _MIX >> np.uint32(16)) % np.uint32(self.dimensions)
        vector = np.sqrt(np.bincount(buckets, minlength=self.dimensions)).astype(np.float32)
        return vector / np.float32(np.sqrt(vector @ vector))


@dataclass(frozen=True)
class SentenceTransformerEncoder:
    """A sentence-transformers model, by name or folder (``pip install sentence-transformers``).

    Only the name travels to other processes; each process loads the model once, when it first needs it.
    """

    model: str

    def load(self) -> None:
        """Load the model now, to find out early that it is missing.

        Raises:
            ModuleNotFoundError: sentence-transformers is not installed.
            OSError, ValueError: there is no such model.
        """
        _loaded(self.model)

    def encode(self, text: str) -> Vector:
        """Return the model's vector, scaled to length 1."""
        vector = _loaded(self.model).encode(text, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vector, np.float32)


_loading = threading.Lock()


def _loaded(name: str) -> Any:
    with _loading:  # several threads may ask first
        return _load(name)


@functools.cache
def _load(name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name)
