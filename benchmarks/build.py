"""P8: build 1,000 nodes, and nest 100 levels, against signatures and a topological order by hand."""

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Target, compared, main, measure, timed
from hypernodes import Pipeline, node

NODES = 1_000
LEVELS = 100


def built(functions: list[work.Function]) -> Pipeline:
    """Decorate and build."""
    return Pipeline([node(function.__name__)(function) for function in functions])


def nested(functions: list[work.Function]) -> Pipeline:
    """Each level is one node and the pipeline of the levels below it."""
    *above, last = functions
    pipeline = Pipeline([node(last.__name__)(last)])
    for function in reversed(above):
        pipeline = Pipeline([node(function.__name__)(function), pipeline])
    return pipeline


def milliseconds(seconds: float) -> float:
    """From seconds."""
    return seconds * 1e3


def run(options: Options) -> Report:
    """Both include decorating the functions."""
    many, levels = work.chain(options.pick(NODES, 50)), work.chain(options.pick(LEVELS, 10))
    assert nested(levels).run(n0=0)[levels[-1].__name__] == len(levels)
    building = measure(
        {
            "Pipeline": timed(lambda: built(many)),
            "signatures and graphlib by hand": timed(lambda: work.order_by_hand(many)),
        },
        options.n,
    )
    nesting = measure(
        {
            "Pipeline": timed(lambda: nested(levels)),
            "signatures and graphlib by hand, a graph a level": timed(
                lambda: [work.order_by_hand([function]) for function in levels]
            ),
        },
        options.n,
    )
    return Report(
        [
            compared(
                "build 1,000 nodes",
                "ms",
                building,
                figure=milliseconds,
                target=Target("≤ 20 ms", "median", at_most=20),
            ),
            compared(
                "nest 100 levels",
                "ms",
                nesting,
                figure=milliseconds,
                target=Target("≤ 5 ms", "median", at_most=5),
            ),
        ]
    )


if __name__ == "__main__":
    main("P8", "Build and nest", run)
