"""P13: what a value costs that goes into a signature: a large array, and a small dict."""

from hashlib import sha256

import numpy as np

from benchmarks._harness import Options, Report, Target, compared, main, measure, timed
from hypernodes._signature.values import hash_value

SMALL = {"model": "multilingual-e5", "top_k": 10, "threshold": 0.5, "normalize": True}


def run(options: Options) -> Report:
    """Beside sha256 of the same bytes."""
    array = np.arange(options.pick(25_000_000, 10_000), dtype=np.float32)
    large = measure(
        {
            "hash_value": timed(lambda: hash_value(array)),
            "sha256 of its bytes": timed(lambda: sha256(array.data).digest()),
        },
        options.n,
    )
    encoded = repr(SMALL).encode()
    times = options.pick(10_000, 50)
    small = measure(
        {
            "hash_value": timed(lambda: hash_value(SMALL), times),
            "sha256 of its repr": timed(lambda: sha256(encoded).digest(), times),
        },
        options.n,
    )
    megabytes = array.nbytes / 1e6
    return Report(
        [
            compared(
                f"an array of {megabytes:,.3g} MB",
                "ms",
                large,
                figure=lambda seconds: seconds * 1e3,
                target=Target("≤ 1.1 ×", "ratio", at_most=1.1),
            ),
            compared(
                "a dict of four settings",
                "µs",
                small,
                figure=lambda seconds: seconds * 1e6,
                target=Target("≤ 10 µs", "median", at_most=10),
            ),
        ]
    )


if __name__ == "__main__":
    main("P13", "Hashing values", run)
