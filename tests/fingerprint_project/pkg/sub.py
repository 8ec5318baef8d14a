from . import numbers  # noqa: TID252 - as in deep.py


def trim(text):
    return text[: numbers.WIDTH]
