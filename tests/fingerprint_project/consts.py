"""Constants."""

import pkg.numbers as nested  # noqa: F401 - for `consts.nested.DEPTH`

RATE = 0.25
OTHER = 1
