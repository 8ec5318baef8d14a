from . import numbers


def trim(text):
    return text[: numbers.WIDTH]
