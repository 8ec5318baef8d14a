"""Constants."""

import pkg.numbers as nested

RATE = 0.25
OTHER = 1
