def bottom(text):
    return lowest(text)


def lowest(text):
    from .numbers import WIDTH  # noqa: TID252 - relative imports are a form that is tested

    return text, WIDTH, "lowest"
