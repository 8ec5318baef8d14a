"""Helpers."""

BASE = 100
seen = []


def helper(words):
    """Help."""
    seen.append(words)
    return [*leaf(words), BASE]


def leaf(words):
    return [word + "leaf" for word in words]


def scaled(x):
    return x * 2


def shrunk(x):
    return x / 2


def build():
    return "built"


def tag(number, text, *, mark):
    return f"{number}{text}{mark}"


def multiplier(factor):
    def multiply(x):
        return x * factor

    return multiply
