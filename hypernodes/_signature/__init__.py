"""Signatures: what identifies a call across processes. It hashes values and code, and acts on nothing."""

from hypernodes._signature.values import hash_value

__all__ = ["hash_value"]
