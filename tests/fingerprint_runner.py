"""Runs in a process of its own: prints the fingerprints of `job.job` in each folder named, as JSON."""

import importlib
import json
import sys
import traceback

from hypernodes._signature.code import fingerprint


def evaluated(folder):
    """The fingerprint of a project, whose modules are forgotten afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        found = fingerprint(importlib.import_module("job").job)
    except Exception:  # noqa: BLE001 - the test that reads it tells
        return {"error": traceback.format_exc()}
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
    parts = {name: digest.hex() for name, digest in found.parts.items()}
    return {"digest": found.digest.hex(), "parts": parts, "opaque": found.opaque}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({folder: evaluated(folder) for folder in sys.argv[1:]}))
