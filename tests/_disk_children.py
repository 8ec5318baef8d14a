"""What the processes do that tests of the disk cache start, and kill."""

import hashlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from hypernodes.cache import DiskCache
from hypernodes.cache._envelope import seal, unseal

STEPS = ("open", "write", "replace", "mkdir", "rename", "unlink", "rmdir", "utime")
"""The calls of the system that change a directory, by their names in `os`."""


def key(of):
    """A key as pipelines have them."""
    return hashlib.sha256(repr(of).encode()).hexdigest()


def entry(of, version=0, size=300, secret=None):
    """A sealed entry; its payload tells whose it is and which version."""
    text = f"{of} {version} ".encode()
    payload = text + random.Random(f"{of} {version}").randbytes(max(size - len(text), 0))
    return b"".join(seal(key(of), 1, b'{"node": "f"}', [payload], secret))


def version_of(of, data, secret=None):
    """Which version of an entry this is; fails unless it is one, to the last byte."""
    payload = bytes(unseal(key(of), data, secret)[1])
    whose, version = payload.split(b" ")[:2]
    assert whose == str(of).encode()
    expected = unseal(key(of), entry(of, int(version), len(payload), secret), secret)[1]
    assert payload == expected
    return int(version)


def many_packs(path, count=14):
    """Leave packs that the next write will merge."""
    for number in range(count):
        DiskCache(path).write({key(f"packed{number}"): entry(f"packed{number}")})


def age(folder, seconds):
    """Make all that is in a folder look as if it had last been used this long ago."""
    for file in (*Path(folder).rglob("*"), Path(folder)):
        os.utime(file, (time.time() - seconds,) * 2)


def damage(path):
    """Flip a byte in the payloads of `old` and `large`."""
    for found in (*Path(path).rglob("*.pack"), *Path(path).rglob(key("large") + "-*")):
        data = bytearray(found.read_bytes())
        data[-1] ^= 1
        found.write_bytes(data)


def tell(*words):
    """Say something to the process that waits for this one."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


# What is there before, and what is killed. `old` and `large` are there before each.

BEFORE = {
    "merge": many_packs,
    "repair": damage,
    "first": lambda path: DiskCache(path).clear() and os.rmdir(Path(path) / "incoming"),
    "prune": lambda path: age(Path(path) / "packs", 7200),
}


def _write(path, **versions):
    sizes = {"large": 100_000, "grows": 100_000}
    DiskCache(path).write({key(of): entry(of, version, sizes.get(of, 300)) for of, version in versions.items()})


ACTIONS = {
    "small": lambda path: _write(path, old=1, new=1),
    "large": lambda path: _write(path, large=1),
    "both": lambda path: _write(path, old=1, large=1, new=1),
    "grows": lambda path: DiskCache(path).write({key("old"): entry("old", 1, 100_000)}),
    "shrinks": lambda path: DiskCache(path).write({key("large"): entry("large", 1, 300)}),
    "merge": lambda path: _write(path, new=1),
    "first": lambda path: _write(path, new=1),
    "prune": lambda path: DiskCache(path).prune(100_200),
    "clear": lambda path: DiskCache(path).clear(),
    "repair": lambda path: DiskCache(path).verify(repair=True),
}


def _kill_at(step):
    """Let this process kill itself before a certain call of the system, in the middle of it if it writes."""
    left = step

    def counted(name, call):
        def stopping(*args, **options):
            nonlocal left
            left -= name != "open" or bool(args[1] & os.O_CREAT)
            if left < 0:
                if name == "write":
                    call(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return stopping

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))


def killed_at(path, action, step):
    """Act in a process that is killed at a step; say whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            _kill_at(step)
            ACTIONS[action](path)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, (action, step)
    return False


def kill_everywhere(folder, action):
    """Kill the action at each of its steps in turn, and look at what is left each time."""
    step = 0
    while True:
        path = str(Path(folder) / str(step))
        _write(path, kept=0, old=0, large=0)
        BEFORE.get(action, lambda path: None)(path)
        before = DiskCache(path).find([key("old"), key("large")])
        died = killed_at(path, action, step)
        _check(path, action, before)
        if not died:
            return tell(step)
        step += 1


def _check(path, action, before):
    may_go = action in ("prune", "clear", "repair")
    cache = DiskCache(path)
    found = cache.read([key(of) for of in ("old", "large", "new")])
    for of in ("old", "large", "new"):
        if action == "repair" and key(of) in found:
            continue  # not looked at yet; whoever reads finds out
        if key(of) in found:
            assert version_of(of, found[key(of)]) in (0, 1), of
        assert may_go or key(of) in found or key(of) not in before, of
    if action not in ("prune", "clear", "first"):
        assert version_of("kept", cache.read([key("kept")])[key("kept")]) == 0
    if action == "merge":
        packed = [f"packed{number}" for number in range(14)]
        found = cache.read([key(of) for of in packed])
        assert [version_of(of, found[key(of)]) for of in packed] == [0] * 14
    if action != "repair":
        assert cache.verify().findings == ()
    # The next one is not in its way, and sweeps up.
    for left in (*Path(path).glob("incoming"), *Path(path).glob("trash-*")):
        age(left, 7200)
    again = DiskCache(path)
    again.write({key("after"): entry("after", 5), key("old"): entry("old", 7)})
    again.prune()
    assert version_of("old", DiskCache(path).read([key("old")])[key("old")]) == 7
    assert version_of("after", DiskCache(path).read([key("after")])[key("after")]) == 5
    left = [str(file) for file in Path(path).rglob("*") if "trash" in str(file) or file.parent.name == "incoming"]
    assert left == []
    assert again.verify(repair=True).repaired == 0 or action == "repair"
    assert again.verify().findings == ()


def race(path, seed, rounds, kind):
    """Read and write the same keys as others do; nothing that is found may ever be wrong.

    What was written is found at once ("steady"), unless its size changes with each write ("mixed"), or others clear
    and prune ("cleared").
    """
    pick = random.Random(seed)
    cache = DiskCache(path)
    for turn in range(rounds):
        some = pick.sample(range(60), 12)
        large = {of for of in some if (of < 2 if kind == "steady" else pick.random() < 0.03)}
        version = seed * 1000 + turn
        cache.write({key(of): entry(of, version, 70_000 if of in large else 300) for of in some})
        asked = pick.sample(range(60), 30)
        found = cache.read([key(of) for of in asked])
        for of in asked:
            if key(of) in found:
                version_of(of, found[key(of)])
        if kind == "steady":
            mine = cache.read([key(of) for of in some])
            assert len(mine) == len(some), f"lost {len(some) - len(mine)} of {len(some)}"
            assert len(cache.find([key(of) for of in some])) == len(some)
        elif kind == "cleared" and turn % 7 == seed:
            cache.clear()
        elif kind == "cleared" and turn % 5 == 0:
            cache.prune(200_000)


def use_after_fork(path):
    """Use a cache in a forked child while threads of the parent are in the middle of using it."""
    cache = DiskCache(path)
    cache.write({key("old"): entry("old")})
    stop = threading.Event()

    def busy():
        number = 0
        while not stop.is_set():
            number += 1
            cache.write({key(("busy", number)): entry("busy", number)})
            cache.read([key("old")])

    threads = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a deadlock
            cache.write({key(("child", number)): entry("child", number)})
            version_of("old", cache.read([key("old")])[key("old")])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    for thread in threads:
        thread.join()
    tell(len(DiskCache(path).find([key(("child", number)) for number in range(40)])))


def write_open_to_all(path):
    """Write with a umask that forbids nothing."""
    os.umask(0)
    cache = DiskCache(path)
    cache.write({key("old"): entry("old"), key("large"): entry("large", size=100_000)})
    cache.prune()


def write_limited(path, limit, count):
    """Write more than a limit of this process allows, and say what comes of it."""
    import resource

    cache = DiskCache(path)
    cache.write({key("old"): entry("old")})
    for each in limit.split(","):
        name, value = each.split("=")
        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (int(value), resource.getrlimit(kind)[1]))
    for sizes in (200, 300_000):
        try:
            cache.write({key(of): entry(of, 0, sizes) for of in range(int(count))})
        except OSError as error:
            tell(type(error).__name__, error.errno)
    version_of("old", cache.read([key("old")])[key("old")])
    assert os.listdir(Path(path) / "incoming") == []


def read_without_descriptors(path):
    """Read while this process may open no more files, and then when it may again."""
    import resource

    cache = DiskCache(path)
    used, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    errors = []
    for of in ("old", "large"):
        try:
            cache.read([key(of)])
        except OSError as error:
            errors.append(error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, most))
    assert len(cache.read([key("old"), key("large")])) == 2
    tell(*errors)


if __name__ == "__main__":
    globals()[sys.argv[1]](*[int(each) if each.isdecimal() else each for each in sys.argv[2:]])
