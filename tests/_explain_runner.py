"""Runs in a process of its own: `run CACHE FOLDER` runs the pipeline in a folder, `explain CACHE FOLDERS` explains it.

The pipeline has one node, which refers to all of the fingerprint project, and is imported anew from each folder.
Prints as JSON what is said of the node in each folder: its status and reasons.
"""

import importlib
import json
import sys

import anyio

from hypernodes import DiskCache, Pipeline, node

ENTRY = """
import job


def use(text):
    return job.job(text) if text is None else len(text)
"""


def imported(folder):
    """The pipeline of a folder, and what to call when done with it."""
    known = set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    use = importlib.import_module("entry").use

    def forget():
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]

    return Pipeline([node("length")(use)]), forget


async def main(what, path, folders):
    told = {}
    for folder in folders:
        pipeline, forget = imported(folder)
        pipeline = pipeline.with_cache(DiskCache(path))
        if what == "run":
            await pipeline.arun(text="abc")
        explained = (await pipeline.explain(text="abc"))["use"]
        told[folder] = explained.status, explained.reasons
        forget()
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3:])
