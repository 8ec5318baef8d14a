"""Functions that the tests of the loopback run in containers. They need nothing but the standard library and modal."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path


def echo(data):
    print("echo of", len(data), "bytes")  # noqa: T201 - for the app's log
    return data


async def async_echo(data):
    await asyncio.sleep(0)
    return data


def where(_):
    return os.getpid(), os.environ["MODAL_TASK_ID"], sys.path, os.getcwd(), dict(os.environ)


class OddError(Exception):
    pass


def fails(data):
    raise OddError(f"no: {data!r}")


def sleeps(seconds):
    time.sleep(seconds)
    return os.getpid()


async def waits(path):
    """Waits for ever; says in a file when it starts, when it is cancelled, and how it ends."""
    mark(path, "started")
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        mark(path, "cancelled")
        raise
    finally:
        mark(path, "ended")


def mark(path, name):
    Path(path, name).touch()


def holds_on(path):
    """Runs for ever, will not be interrupted, and has a child that would outlive it."""
    subprocess.Popen(["sleep", "3600"])
    mark(path, "started")
    while True:
        try:
            time.sleep(3600)
        except BaseException:  # noqa: BLE001 - an interrupt too
            mark(path, "refused")


def dies_on(code):
    if code is not None:
        os._exit(code)
    return "alive"


def meets(queue, mine, other):
    """Ends when another call is there too."""
    queue.put(os.getpid(), partition=mine)
    queue.get(partition=other, timeout=20)
    return os.getpid()


def imports(name):
    module = __import__(name)
    return module.__file__


def tells(queue, count):
    for number in range(count):
        queue.put(number)
        time.sleep(0.05)
    return queue.get(partition="answers", timeout=20)


def remembers(mapping, key):
    mapping[key] = os.getpid()
    return mapping["given"]


def counts(upto):
    for number in range(upto):
        yield number
        time.sleep(0.01)


def writes(path, text):
    Path(path).write_text(text)


def commits(volume, path, text):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(text)
    volume.commit()


def reads(path):
    return Path(path).read_text() if Path(path).exists() else None


def reloads(volume, path):
    volume.reload()
    return reads(path)


async def answers(data, size):
    """Takes some bytes and gives others, as many as it is told."""
    return bytes(size)
