def bottom(text):
    return lowest(text)


def lowest(text):
    from .numbers import WIDTH as width

    return text, width, "lowest"
