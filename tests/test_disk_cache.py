"""A cache in a directory: what is whole is found, what is not is a miss, whatever anybody does to it."""

import concurrent.futures
import contextlib
import os
import pickle
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest

import hypernodes.cache
from hypernodes import CacheError
from hypernodes.cache import DiskCache
from hypernodes.cache._envelope import Refused, seal, unseal
from tests._disk_children import ACTIONS, age, entry, key, version_of

pytestmark = pytest.mark.usefixtures("no_leaks")

LARGE = 100_000
OTHERS_ARE_SEEN_AFTER_S = 0.6


def start(function, *arguments):
    """Run a function of `_disk_children` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests._disk_children", function, *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child):
    """Wait for such a process; return what it printed, as words."""
    out, errors = child.communicate(timeout=50)
    assert child.returncode == 0, errors
    return out.split()


def read(cache, *whose):
    """The versions of those entries that are found and whole."""
    found = cache.read([key(of) for of in whose])
    return {of: version_of(of, found[key(of)], cache.key) for of in whose if key(of) in found}


def write(cache, size=300, **versions):
    """Store versions of entries."""
    cache.write({key(of): entry(of, version, size, cache.key) for of, version in versions.items()})


def files(path, pattern="*"):
    """The files below a directory, without the marker and the note of the last pruning."""
    return [file for file in Path(path).rglob(pattern) if file.is_file() and len(file.relative_to(path).parts) > 1]


@pytest.fixture
def path(tmp_path):
    """Where the cache will be."""
    return str(tmp_path / "cache")


@pytest.fixture
def cache(path):
    """An empty cache."""
    return DiskCache(path)


# Options


def test_nothing_is_created_before_the_first_write(tmp_path):
    """To make a cache, to read, to look into it and to clear it leave no trace."""
    cache = DiskCache(tmp_path / "missing" / "cache")
    assert (read(cache, "old"), cache.find([key("old")]), list(cache.entries())) == ({}, set(), [])
    assert cache.stats().entries == cache.verify().entries == cache.prune(1).files == cache.clear().files == 0
    assert not (tmp_path / "missing").exists()
    write(cache, old=1)
    assert read(cache, "old") == {"old": 1}


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    """`~` is expanded, and a relative path stays what it was where the cache was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert DiskCache("~/cache").path == DiskCache("cache").path == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("said", "meant"),
    [(1, 1), (10**12, 10**12), ("10GB", 10**10), ("512 MiB", 512 << 20), ("1.5k", 1500), ("7 b", 7), ("2TiB", 2 << 40)],
)
def test_sizes_are_bytes_or_text(path, said, meant):
    """`max_size` takes bytes, or a number with a unit of 1000 or of 1024."""
    assert DiskCache(path, max_size=said).max_size == meant


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "GB", "10 XB", "-1GB", "0", b"1GB", "1e3"])
def test_a_wrong_size_is_refused(path, wrong):
    """An error says what a size may be."""
    with pytest.raises(CacheError, match=r'max_size= is .* "10GB"'):
        DiskCache(path, max_size=wrong)


@pytest.mark.parametrize("wrong", ["", b"", 5, bytearray(b"x")])
def test_a_wrong_key_is_refused(path, wrong):
    """A key is bytes or text; an empty one would sign for everyone."""
    with pytest.raises(CacheError, match=r"key= must be bytes or text, and not empty"):
        DiskCache(path, key=wrong)


def test_the_key_comes_from_the_environment_too(path, monkeypatch):
    """Without `key=` the variable HYPERNODES_CACHE_KEY counts, if it is not empty."""
    assert DiskCache(path).key is None
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "")
    assert DiskCache(path).key is None
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "sesame")
    assert DiskCache(path).key == b"sesame"
    assert DiskCache(path, key="mine").key == b"mine"


def test_the_key_is_never_shown(path):
    """Neither `repr` nor an error message holds the key."""
    cache = DiskCache(path, key=b"sesame", max_size=100)
    assert repr(cache) == f"DiskCache({path!r}, key=..., max_size=100)"
    assert "sesame" not in f"{cache} {cache!r} {[cache]}"
    Path(path).write_text("a file")
    with pytest.raises(CacheError) as raised:
        DiskCache(path, key=b"sesame")
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_it_travels_to_another_process_with_its_key(path, pickler, monkeypatch):
    """A pickled cache is the same cache, whatever the environment there says."""
    cache = DiskCache(path, key=b"sesame", max_size="1GB", allow_shared_directory=True)
    unsigned = pickler.dumps(DiskCache(path))
    write(cache, old=1)
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "another")
    other = pickle.loads(pickler.dumps(cache))
    assert (other.key, other.max_size, other.allow_shared_directory) == (b"sesame", 10**9, True)
    assert read(other, "old") == {"old": 1}
    assert pickle.loads(unsigned).key is None


def test_caches_of_one_place_are_equal(path, tmp_path):
    """Path and key say whether two caches are one."""
    assert DiskCache(path) == DiskCache(path, max_size=5)
    assert hash(DiskCache(path)) == hash(DiskCache(path + "/"))
    assert len({DiskCache(path), DiskCache(path, key=b"x"), DiskCache(tmp_path / "b"), DiskCache(path)}) == 3
    assert DiskCache(path) != path


@pytest.mark.parametrize("wrong", ["", "x", "../" * 20 + "0" * 4, "A" * 64, "0" * 63, "0" * 65, "x-" + "0" * 64])
@pytest.mark.parametrize("size", [10, LARGE])
def test_only_digests_are_keys(cache, path, tmp_path, wrong, size):
    """Whatever could name a file elsewhere is refused, and nothing is written."""
    with pytest.raises(ValueError, match="keys are 64 hexadecimal digits"):
        cache.write({key("old"): b"x" * LARGE, wrong: b"x" * size})
    assert not Path(path).exists()


def test_public_names_are_there():
    """Every name that the package says it has can be imported, but for what needs another package."""
    for name in set(hypernodes.cache.__all__) - {"AiocacheStore"}:
        assert getattr(hypernodes.cache, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        hypernodes.cache.nothing


# Directories that are no cache


def test_a_directory_with_other_files_is_refused(tmp_path):
    """Neither made, nor cleared, nor pruned: what is not a cache's is left alone."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds other files .* a directory of its own"):
        DiskCache(tmp_path)
    (tmp_path / "cache").mkdir()
    cache = DiskCache(tmp_path / "cache")
    (tmp_path / "cache" / "thesis.txt").write_text("more of it")
    for use in (cache.clear, lambda: cache.prune(1), lambda: write(cache, old=1), lambda: read(cache, "old")):
        with pytest.raises(CacheError, match="holds other files"):
            use()
    assert (tmp_path / "cache" / "thesis.txt").read_text() == "more of it"


def test_an_empty_directory_becomes_a_cache(path):
    """Hidden files, and what every new volume holds, are no other files."""
    os.mkdir(path, 0o700)
    os.mkdir(f"{path}/lost+found")
    Path(path, ".gitignore").write_text("*")
    write(DiskCache(path), old=1)
    assert read(DiskCache(path), "old") == {"old": 1}


def test_clear_and_prune_leave_the_files_of_others(cache, path):
    """What somebody put into a cache's directory stays there."""
    write(cache, old=1)
    write(cache, LARGE, large=1)
    theirs = [Path(path, "thesis.txt"), Path(path, "packs", "thesis.txt"), Path(path, "entries", "thesis.txt")]
    for file in theirs:
        file.write_text("years of work")
    cache.prune(1)
    assert [file.read_text() for file in theirs] == ["years of work"] * 3
    cache.clear()
    assert theirs[0].read_text() == "years of work"


def test_a_file_is_no_cache(path):
    """A path that names a file is refused."""
    Path(path).write_text("a file")
    with pytest.raises(CacheError, match="not a directory"):
        DiskCache(path)


def test_a_cache_in_another_format_is_refused(cache, path):
    """A later version's directory is not touched."""
    write(cache, old=1)
    Path(path, "hypernodes-cache-1").rename(Path(path, "hypernodes-cache-2"))
    with pytest.raises(CacheError, match="another format"):
        DiskCache(path)


# Who may write


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_is_refused(cache, path, mode):
    """Loading runs code, so it must be one's own; the error says what to do."""
    write(cache, old=1)
    os.chmod(path, mode)
    with pytest.raises(CacheError, match=r"other users may write it, .*chmod go-w .*allow_shared_directory=True"):
        DiskCache(path)
    assert read(DiskCache(path, allow_shared_directory=True), "old") == {"old": 1}


def test_a_directory_that_others_may_read_is_fine(cache, path):
    """Reading is no danger to whoever owns it."""
    write(cache, old=1)
    os.chmod(path, 0o755)
    assert read(DiskCache(path), "old") == {"old": 1}


def test_a_directory_opened_to_others_later_is_refused_too(cache, path):
    """It is looked at again when it is first used."""
    write(DiskCache(path), old=1)
    os.chmod(path, 0o777)
    for use in (lambda: read(cache, "old"), lambda: write(cache, old=2)):
        with pytest.raises(CacheError, match="other users may write it"):
            use()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_of_another_user_is_refused(cache, path):
    """Its owner could write what this process would run."""
    write(cache, old=1)
    os.chown(path, 12345, -1)
    with pytest.raises(CacheError, match=r"belongs to another user \(uid 12345\)"):
        DiskCache(path)
    assert read(DiskCache(path, allow_shared_directory=True), "old") == {"old": 1}


def test_others_get_no_access_whatever_the_umask(tmp_path):
    """Directories, missing parents too, are for the user alone, and so are files."""
    end(start("write_open_to_all", tmp_path / "new" / "cache"))
    modes = {stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "new").rglob("*") if each.is_dir()}
    assert modes | {stat.S_IMODE((tmp_path / "new").stat().st_mode)} == {0o700}
    inside = [each for each in (tmp_path / "new").rglob("*") if each.is_file()]
    assert len(inside) == 4
    assert {stat.S_IMODE(each.stat().st_mode) for each in inside} == {0o600}


# Files


def test_small_entries_share_a_file_and_large_ones_have_their_own(cache, path):
    """One write of a thousand small entries and two large ones makes three files."""
    write(cache, **{f"n{n}": n for n in range(1000)})
    assert len(files(path)) == 1
    write(cache, LARGE, large=1, larger=2)
    assert len(files(path)) == 3
    assert read(cache, "n7", "large", "larger", "n999") == {"n7": 7, "large": 1, "larger": 2, "n999": 999}


@pytest.mark.parametrize(("writes", "each"), [(3000, 1), (300, 100)])
def test_the_number_of_files_stays_small(cache, path, writes, each):
    """Small packs are merged into larger ones, and nothing gets lost."""
    for turn in range(writes):
        cache.write({key((turn, n)): b"x" * 50 for n in range(each)})
        if turn % 100 == 0:
            assert len(files(path)) <= 80
    assert len(files(path)) <= 80
    everything = [key((turn, n)) for turn in range(writes) for n in range(each)]
    assert len(cache.read(everything)) == len(everything)
    assert len(DiskCache(path).find(everything)) == len(everything)


def test_a_large_map_leaves_few_files(cache, path):
    """Three hundred thousand small entries, two thousand a write, take less than two hundred files."""
    for turn in range(150):
        cache.write({f"{turn * 2000 + n:064x}": b"x" * 50 for n in range(2000)})
    assert len(files(path)) < 100
    fresh = DiskCache(path)
    assert fresh.stats().entries == 300_000
    assert len(fresh.read([f"{n:064x}" for n in range(0, 300_000, 1000)])) == 300


def test_merging_drops_what_was_replaced(cache, path):
    """An entry that is written again and again takes the room of a few."""
    for version in range(400):
        write(cache, old=version, kept=version)
    assert len(files(path)) < 32
    assert sum(file.stat().st_size for file in files(path)) < 40 * 1000
    assert read(cache, "old", "kept") == read(DiskCache(path), "old", "kept") == {"old": 399, "kept": 399}


def test_the_last_one_wins_where_a_clock_is_behind(cache, path, monkeypatch):
    """Times of entries never go back for a key, so that a refresh counts on every machine."""
    now = time.time_ns()
    for turn, (size, clock) in enumerate([(300, 0), (300, -3600), (LARGE, -7200), (LARGE, -9000), (300, -9999)]):
        monkeypatch.setattr(time, "time_ns", lambda clock=clock: now + clock * 10**9)
        write(cache, size, old=turn)
        assert read(cache, "old") == read(DiskCache(path), "old") == {"old": turn}


def test_no_file_is_held_open(cache):
    """However much is read and written, no descriptor stays, also while the cache is in use."""
    before = len(os.listdir("/dev/fd"))
    for turn in range(50):
        write(cache, **{f"n{turn}": turn})
        write(cache, LARGE, large=turn)
        read(cache, f"n{turn}", "large")
        cache.stats()
        cache.verify()
        next(iter(cache.entries()))
    assert len(os.listdir("/dev/fd")) <= before


# Others


def test_what_others_write_is_noticed(cache, path):
    """A cache in use finds what another one has stored, replaced and deleted, within a second."""
    write(cache, old=0)
    write(cache, LARGE, large=0)
    assert read(cache, "old", "new", "large", "huge") == {"old": 0, "large": 0}
    other = DiskCache(path)
    write(other, old=1, new=1)
    write(other, LARGE, large=1, huge=1)
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert read(cache, "old", "new", "large", "huge") == {"old": 1, "new": 1, "large": 1, "huge": 1}
    write(other, LARGE, old=2)
    write(other, large=2)
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert read(cache, "old", "large") == {"old": 2, "large": 2}
    other.clear()
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert cache.find([key("old"), key("large"), key("huge")]) == set()


def test_threads_that_look_first_at_one_moment_all_find(cache, path, monkeypatch):
    """A lookup that comes while another thread reads the folder waits for it, and is no miss."""
    from hypernodes.cache import _index

    write(cache, one=1)
    looking, go_on = threading.Event(), threading.Event()
    load = _index.load

    def slow(*arguments):
        looking.set()
        assert go_on.wait(30)
        return load(*arguments)

    monkeypatch.setattr(_index, "load", slow)
    fresh = DiskCache(path)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, fresh, "one")
        assert looking.wait(30)
        second = pool.submit(read, fresh, "one")
        done, _ = concurrent.futures.wait([second], timeout=0.2)
        go_on.set()
        assert first.result(30) == second.result(30) == read(cache, "one") != {}
    assert not done


def test_what_others_delete_is_a_miss_at_once(cache, path):
    """An entry that seemed to be there a moment ago is a miss, not an error."""
    write(cache, old=1)
    write(cache, LARGE, large=1)
    assert read(cache, "old", "large") == {"old": 1, "large": 1}
    DiskCache(path).clear()
    assert read(cache, "old", "large") == {}
    write(cache, old=2)
    write(cache, LARGE, large=2)
    assert read(cache, "old", "large") == {"old": 2, "large": 2}


def test_what_others_merge_is_found_at_once(cache, path):
    """A pack that another process has merged away is looked for where its entries are now."""
    for turn in range(15):
        write(cache, **{f"n{turn}": turn})
    assert len(read(cache, *(f"n{turn}" for turn in range(15)))) == 15
    write(DiskCache(path), last=15)
    assert len(files(path)) == 1
    assert len(read(cache, *(f"n{turn}" for turn in range(15)))) == 15


@pytest.mark.parametrize("size", [300, LARGE])
def test_what_others_replace_is_found_at_once(cache, path, size):
    """An entry that has moved between a pack and a file of its own is found where it is now."""
    write(cache, LARGE + 300 - size, old=1)
    assert read(cache, "old") == {"old": 1}
    other = DiskCache(path)
    write(other, size, old=2)
    for turn in range(15):
        write(other, **{f"n{turn}": 1})
    assert read(cache, "old")["old"] in (1, 2)
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert read(cache, "old") == {"old": 2}


@pytest.mark.parametrize(("before", "after"), [(LARGE, LARGE), (LARGE, 300), (300, LARGE)])
def test_a_replaced_large_entry_takes_no_room(cache, path, before, after):
    """The file of a large entry goes when it is replaced, and a merge drops what was replaced in packs."""
    write(cache, before, old=1)
    write(cache, after, old=2)
    assert len(files(path, f"{key('old')}-*")) == (after == LARGE)
    cache._packs.rewrite(cache._packs.packs)
    assert len(files(path)) == 1
    assert read(cache, "old") == read(DiskCache(path), "old") == {"old": 2}


def test_of_several_files_for_a_key_the_newest_counts(cache, path):
    """A writer that was killed may leave the file that it has replaced: it is not read, not counted, and pruned."""
    write(cache, LARGE, old=1)
    (earlier,) = files(path)
    data = earlier.read_bytes()
    write(cache, LARGE, old=2)
    earlier.write_bytes(data)
    fresh = DiskCache(path)
    assert read(fresh, "old") == {"old": 2}
    assert (fresh.stats().entries, fresh.stats().files, fresh.verify().entries, len([*fresh.entries()])) == (1, 2, 1, 1)
    assert (fresh.prune().entries, len(files(path))) == (0, 1)
    assert read(fresh, "old") == {"old": 2}


def test_two_changes_at_one_moment_are_both_seen(cache, path):
    """A folder that was listed a moment ago is listed again, though its mtime, which is coarse, is the same."""
    one, two = [of for of in range(3000) if key(of).endswith("00")][:2]
    other = DiskCache(path)
    other.write({key(one): entry(one, 1, LARGE)})
    assert read(cache, one, two) == {one: 1}
    folder = f"{path}/entries/00"
    mtime_ns = os.stat(folder).st_mtime_ns
    other.write({key(two): entry(two, 1, LARGE)})
    os.utime(folder, ns=(mtime_ns, mtime_ns))
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert read(cache, one, two) == {one: 1, two: 1}


def test_what_is_cleared_during_a_merge_does_not_come_back(cache, path, monkeypatch):
    """A merged pack is not put in place when those that it is made of have been deleted meanwhile."""
    for turn in range(3):
        write(cache, **{f"n{turn}": turn})
    write_file = cache._root.write

    def write_and_clear(buffers):
        temporary = write_file(buffers)
        DiskCache(path).clear()
        return temporary

    monkeypatch.setattr(cache._root, "write", write_and_clear)
    with pytest.raises(FileNotFoundError):
        cache._packs.rewrite(cache._packs.packs)
    assert read(cache, "n0", "n1", "n2") == read(DiskCache(path), "n0", "n1", "n2") == {}
    assert os.listdir(f"{path}/incoming") == files(path) == []


@pytest.mark.parametrize("first", [True, False])
def test_what_two_processes_have_merged_is_there_twice(cache, path, first):
    """Entries that are in two packs are found as long as one of them is there, whichever it is."""
    write(cache, old=1, new=1)
    write(cache, old=2)
    (_, pack) = sorted(files(path, "*.pack"))
    shutil.copy(pack, pack.with_name("f" + pack.name[1:]))
    cache.close()
    assert read(cache, "old", "new") == {"old": 2, "new": 1}
    (min if first else max)(pack, pack.with_name("f" + pack.name[1:])).unlink()
    assert read(cache, "old", "new") == {"old": 2, "new": 1}
    time.sleep(OTHERS_ARE_SEEN_AFTER_S)
    assert read(cache, "old", "new") == {"old": 2, "new": 1}


@pytest.mark.parametrize("kind", ["steady", "mixed", "cleared"])
def test_eight_processes_on_the_same_keys(path, kind):
    """Nothing that is found is wrong, while others write, merge, clear and prune; what nobody deletes is found."""
    for child in [start("race", path, seed, 40, kind) for seed in range(8)]:
        end(child)
    cache = DiskCache(path)
    assert cache.verify().findings == ()
    assert os.listdir(f"{path}/incoming") == []
    if kind != "cleared":
        assert len(read(cache, *range(60))) == 60


def test_many_threads_on_the_same_keys(cache, path):
    """One cache may be used by any number of threads."""

    def use(thread):
        for turn in range(60):
            write(cache, LARGE if thread == turn % 8 == 0 else 300, **{f"n{turn % 9}": thread, f"own{thread}": turn})
            found = read(cache, *(f"n{n}" for n in range(9)), f"own{thread}")
            assert found[f"own{thread}"] == turn

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert len(read(DiskCache(path), *(f"n{n}" for n in range(9)))) == 9


def test_forked_children_can_use_it(path):
    """A child forked while other threads were in the middle of using the cache reads and writes."""
    assert end(start("use_after_fork", path)) == ["40"]


# Damage


def everywhere(path):
    """A cache with a pack and a file, and the bytes of both."""
    cache = DiskCache(path)
    cache.write({key(of): entry(of, 1, size=10) for of in ("one", "two", "three")})
    return {file: file.read_bytes() for file in files(path)}


def found_after(path, damaged, whole):
    """What a new cache finds in a damaged file: only what is right, and never an error."""
    damaged_file, data = damaged
    damaged_file.write_bytes(data)
    found = DiskCache(path).read([key(of) for of in ("one", "two", "three", "large")])
    right = set()
    for of in ("one", "two", "three", "large"):
        with contextlib.suppress(Refused, KeyError):
            assert version_of(of, found[key(of)]) == 1
            right.add(of)
    damaged_file.write_bytes(whole)
    return right


def test_every_flipped_byte_of_a_pack_is_a_miss_at_most(path):
    """Whichever byte of a pack changes, what is found is right; all else is a miss."""
    ((pack, whole),) = everywhere(path).items()
    found = []
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 0x55
        found.append(found_after(path, (pack, bytes(data)), whole))
    # Most of it is entries: a byte in one of them costs that one alone.
    assert sum(len(right) == 2 for right in found) == sum(len(entry(of, 1, size=10)) for of in ("one", "two", "three"))
    assert found_after(path, (pack, whole), whole) == {"one", "two", "three"}


def test_every_truncation_of_a_pack_is_a_miss_at_most(path):
    """A pack that ends too soon gives the entries that it holds whole."""
    ((pack, whole),) = everywhere(path).items()
    length = len(entry("one", 1, size=10))
    for size in range(len(whole)):
        kept = max(3 - -(-(len(whole) - size) // length), 0)
        assert len(found_after(path, (pack, whole[:size]), whole)) == kept
    assert found_after(path, (pack, whole + b"more"), whole) == {"one", "two", "three"}


@pytest.mark.parametrize("size", [0, 1, 40, LARGE // 2, LARGE])
def test_a_truncated_file_is_a_miss(cache, path, size):
    """A large entry that ends too soon is refused by its envelope."""
    write(cache, LARGE, large=1)
    (file,) = files(path)
    assert found_after(path, (file, file.read_bytes()[:size]), file.read_bytes()) == set()
    assert read(DiskCache(path), "large") == {"large": 1}


def test_a_pack_that_is_cut_short_while_in_use_is_a_miss(cache, path):
    """No crash, no wrong bytes: entries behind the end are not there."""
    write(cache, old=1, new=1)
    assert len(read(cache, "old", "new")) == 2
    (pack,) = files(path)
    os.truncate(pack, pack.stat().st_size - 10)
    assert read(cache, "old", "new") == {"old": 1}
    os.truncate(pack, 0)
    assert read(cache, "old", "new") == {}


def test_swapped_entries_are_misses(cache, path):
    """Files that were given each other's names are refused, signed or not."""
    for each in (cache, DiskCache(path, key=b"secret")):
        write(each, LARGE, large=1, other=1)
        one, two = files(f"{path}/entries")
        data = one.read_bytes(), two.read_bytes()
        one.write_bytes(data[1])
        two.write_bytes(data[0])
        assert {finding.damaged for finding in each.verify(repair=True).findings} == {False}
        for of, value in each.read([key("large"), key("other")]).items():
            with pytest.raises(Refused):
                unseal(of, value, each.key)
        each.clear()


def test_verify_names_what_is_damaged_and_repair_drops_it(cache, path):
    """A damaged entry in a pack, a damaged file, a damaged index and a pack cut short are each found and dropped."""
    write(cache, kept=1, flipped=1)
    write(cache, LARGE, large=1, sound=1)
    write(cache, whole=1, short=1)
    write(cache, indexed=1)
    flipped, short, indexed = sorted(files(path, "*.pack"))
    (large,) = files(path, f"{key('large')}-*")
    for file in (flipped, large):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    os.truncate(short, short.stat().st_size - 1)
    indexed.write_bytes(b"hnp\x01" + bytes(100))
    cache.close()
    report = cache.verify()
    assert {(finding.key, Path(finding.file).name) for finding in report.findings} == {
        (key("flipped"), flipped.name),
        (key("large"), large.name),
        (None, short.name),
        (None, indexed.name),
    }
    assert all(finding.damaged and finding.reason for finding in report.findings)
    assert (report.repaired, cache.verify().findings) == (0, report.findings)
    assert cache.verify(repair=True).repaired == 4
    assert cache.verify().findings == ()
    assert not indexed.exists()
    everything = ("kept", "flipped", "large", "sound", "whole", "short", "indexed")
    assert read(cache, *everything) == read(DiskCache(path), *everything) == {"kept": 1, "sound": 1, "whole": 1}


def test_repair_does_not_bring_back_what_was_replaced(cache, path):
    """When the newer of two entries is damaged, the older one stays replaced."""
    write(cache, old=0, beside=0)
    write(cache, old=1)
    newest = max(files(path))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert cache.verify(repair=True).repaired == 1
    assert read(cache, "old", "beside") == read(DiskCache(path), "old", "beside") == {"beside": 0}


def test_what_is_signed_with_another_key_is_kept(path):
    """Neither a signed entry in a cache without a key, nor an unsigned one in a cache with one, is damaged."""
    mine, theirs, nobodys = DiskCache(path, key=b"mine"), DiskCache(path, key=b"theirs"), DiskCache(path)
    for cache, name in ((mine, "mine"), (theirs, "theirs"), (nobodys, "nobodys")):
        write(cache, **{name: 1})
        write(cache, LARGE, **{f"large_{name}": 1})
    for cache, name in ((mine, "mine"), (theirs, "theirs"), (nobodys, "nobodys")):
        cache.close()
        report = cache.verify(repair=True)
        assert (report.entries, len(report.findings), report.repaired) == (6, 4, 0)
        assert not any(finding.damaged for finding in report.findings)
        assert read(cache, name, f"large_{name}") == {name: 1, f"large_{name}": 1}


# Kills


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_each_step(tmp_path, action):
    """SIGKILL between any two calls of the system, or within a write, leaves old values or new ones, all whole.

    What was there before is still found, unless it was being deleted; the next one works, and sweeps up.
    """
    (steps,) = end(start("kill_everywhere", tmp_path, action))
    assert int(steps) >= 3


def test_orphans_are_swept_when_they_are_old(cache, path):
    """Temporary files of killed writers go after an hour; those of living ones stay, whatever their clocks say."""
    write(cache, old=1)
    for name, seconds in (("killed", 7200), ("alive", 60), ("ahead", -7200)):
        file = Path(path, "incoming", name)
        file.write_bytes(b"partial")
        os.utime(file, (time.time() - seconds,) * 2)
    cache.prune()
    assert sorted(os.listdir(f"{path}/incoming")) == ["ahead", "alive"]
    assert abs(Path(path, "incoming", "ahead").stat().st_mtime - time.time()) < 60


def test_orphans_are_swept_by_the_next_user(cache, path):
    """Whoever writes sweeps first."""
    write(cache, old=1)
    Path(path, "incoming", "killed").write_bytes(b"partial")
    Path(path, "trash-killed", "packs").mkdir(parents=True)
    age(f"{path}/incoming", 7200)
    age(f"{path}/trash-killed", 7200)
    write(DiskCache(path), new=1)
    assert os.listdir(f"{path}/incoming") == []
    assert not os.path.exists(f"{path}/trash-killed")


# Disks


@pytest.fixture
def volume(tmp_path):
    """Mounts a small file system; skips the test where that is not permitted."""
    mounted = []

    def mount(options):
        folder = tmp_path / "volume"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(volume):
    """A write that finds no room raises, leaves nothing partial, and what was there is still found."""
    path = volume("size=1m") / "cache"
    cache = DiskCache(path)
    write(cache, old=1)
    for size, count in ((LARGE, 20), (2_000_000, 1), (60_000, 20)):
        with pytest.raises(OSError, match="No space left"):
            write(cache, size, **{f"n{n}": n for n in range(count)})
        assert os.listdir(path / "incoming") == []
        assert cache.verify().findings == ()
    assert read(cache, "old") == read(DiskCache(path), "old") == {"old": 1}
    cache.prune(1000)
    write(cache, LARGE, large=1, old=2)
    assert read(DiskCache(path), "old", "large") == {"old": 2, "large": 1}


@pytest.mark.parametrize("inodes", range(3, 12))
def test_no_inodes_left(volume, inodes):
    """Wherever the last inode goes, a write succeeds or raises, and leaves nothing partial."""
    path = volume(f"size=4m,nr_inodes={inodes}") / "cache"
    cache = DiskCache(path)
    stored = {}
    with pytest.raises(OSError, match="No space left"):
        for turn in range(20):
            write(cache, LARGE if turn % 2 else 300, **{f"n{turn}": turn})
            stored[f"n{turn}"] = turn
    assert read(DiskCache(path), *stored) == stored
    assert not [file for file in files(path) if file.parent.name == "incoming"]
    with contextlib.suppress(OSError):
        cache.clear()
    assert DiskCache(path).verify().findings == ()


def test_a_read_only_directory(volume):
    """What is there is found, old files too, and a write raises."""
    folder = volume("size=4m")
    path = folder / "cache"
    write(DiskCache(path), old=1)
    write(DiskCache(path), LARGE, large=1)
    age(path, 7200)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    cache = DiskCache(path, max_size=1)
    assert read(cache, "old", "large") == {"old": 1, "large": 1}
    assert cache.stats().entries == cache.verify().entries == 2
    for use in (lambda: write(cache, new=1), lambda: write(cache, LARGE, new=1), cache.clear, cache.prune):
        with pytest.raises(OSError, match="Read-only"):
            use()
    assert read(cache, "old", "large") == {"old": 1, "large": 1}
    with pytest.raises(OSError, match="Read-only"):
        write(DiskCache(folder / "another"), old=1)


def test_files_that_may_not_grow(path):
    """A limit on the size of files is like a full disk: an error, nothing partial."""
    assert end(start("write_limited", path, "FSIZE=20000", 200)) == ["OSError", "27"] * 2
    assert read(DiskCache(path), "old") == {"old": 0}


def test_too_many_open_files(cache, path):
    """Reading where no file can be opened raises; once one can, everything is found."""
    write(cache, old=0)
    write(cache, LARGE, large=0)
    assert end(start("read_without_descriptors", path)) == ["24", "24"]


@pytest.mark.skipif("HYPERNODES_LARGE" not in os.environ, reason="takes 7 GB and a minute: set HYPERNODES_LARGE=1")
@pytest.mark.timeout(600)
def test_more_than_two_gigabytes(cache):
    """An entry larger than one call of the system can read or write is stored and found whole."""
    size = (2 << 30) + 5000
    payload = bytearray(size)
    payload[-4:] = b"last"
    cache.write({key("large"): seal(key("large"), 1, b"", [payload], None)})
    opened = unseal(key("large"), cache.read([key("large")])[key("large")], None)[1]
    assert (len(opened), bytes(opened[-4:])) == (size, b"last")
    assert opened == payload


def test_what_the_system_does_in_several_calls(cache, path, monkeypatch):
    """What is written and read piece by piece, as it is beyond two gigabytes, is whole."""
    call, readv, pread = os.write, os.readv, os.pread
    monkeypatch.setattr(os, "write", lambda file, data: call(file, data[:30_000]))
    monkeypatch.setattr(os, "readv", lambda file, into: readv(file, [into[0][:30_000]]))
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 30_000), at))
    write(cache, LARGE, large=1)
    write(cache, **{f"n{n}": n for n in range(3000)})
    cache = DiskCache(path)
    assert len(read(cache, "large", *(f"n{n}" for n in range(3000)))) == 3001
    assert cache.verify().findings == ()


# Pruning


def used(path, seconds):
    """Make the newest file look as if it had last been used this long ago."""
    newest = max(files(path), key=lambda file: file.stat().st_mtime_ns)
    os.utime(newest, (time.time() - seconds,) * 2)


def test_prune_keeps_what_was_used_last(cache, path):
    """Files go in the order in which they were last used, small ones and large ones alike, until there is room."""
    for turn, size in enumerate([LARGE, 40_000, LARGE, 40_000]):
        write(cache, size, **{f"n{turn}": turn})
        used(path, 100_000 - turn * 10_000)
    report = cache.prune(150_000)
    assert (report.entries, report.files) == (2, 2)
    assert report.bytes_left == sum(file.stat().st_size for file in files(path)) <= 150_000
    everything = [f"n{turn}" for turn in range(4)]
    assert read(cache, *everything) == read(DiskCache(path), *everything) == {"n2": 2, "n3": 3}


def test_reading_counts_as_use(cache, path):
    """What was read lately outlives what was stored later, in packs and files, though it is not noted each time."""
    for turn, size in enumerate([40_000, LARGE, 40_000, LARGE]):
        write(cache, size, **{f"n{turn}": turn})
        used(path, 100_000 - turn * 10_000)
    fresh = DiskCache(path)
    assert read(fresh, "n0", "n1") == {"n0": 0, "n1": 1}
    noted = [file.stat().st_mtime_ns for file in sorted(files(path))]
    time.sleep(0.02)
    assert read(DiskCache(path), "n0", "n1") == {"n0": 0, "n1": 1}
    assert [file.stat().st_mtime_ns for file in sorted(files(path))] == noted
    fresh.prune(150_000)
    assert read(DiskCache(path), "n0", "n1", "n2", "n3") == {"n0": 0, "n1": 1}


def test_merging_does_not_count_as_use(cache, path):
    """A merged pack is as old as the youngest of those that it is made of."""
    for turn in range(15):
        write(cache, **{f"n{turn}": turn})
    age(f"{path}/packs", 50_000)
    cache.close()
    cache.find([])
    cache._packs.refresh()
    cache._packs.rewrite(cache._packs.packs)
    (pack,) = files(path)
    assert 49_000 < time.time() - pack.stat().st_mtime < 51_000
    assert len(read(cache, *(f"n{turn}" for turn in range(15)))) == 15


def test_files_from_the_future_grow_old_as_well(cache, path):
    """An mtime ahead of the clock does not keep a file for ever: it counts as used now, once."""
    write(cache, 40_000, future=1)
    used(path, -10 * 365 * 86400)
    write(cache, LARGE, large=1)
    used(path, -10 * 365 * 86400)
    cache.prune("1GB")
    assert all(file.stat().st_mtime <= time.time() for file in files(path))
    age(f"{path}/packs", 100)
    assert cache.prune(110_000).entries == 1
    assert read(DiskCache(path), "future", "large") == {"large": 1}


def test_pruning_does_not_bring_back_what_was_replaced(cache, path):
    """When the newer of two entries is deleted, the older one stays replaced."""
    write(cache, 40_000, old=0, beside=0)
    write(cache, 40_000, old=1)
    used(path, 50_000)
    assert cache.prune(100_000).entries == 1
    assert read(cache, "old", "beside") == read(DiskCache(path), "old", "beside") == {"beside": 0}
    write(cache, old=2)
    assert read(DiskCache(path), "old") == {"old": 2}


def test_a_cache_prunes_itself_once_a_day(path):
    """The first write of the day deletes down to `max_size`; the next ones do not, nor does any without one."""
    write(DiskCache(path), LARGE, one=1, two=1)
    assert len(files(path)) == 2
    write(DiskCache(path, max_size=150_000), three=1)
    assert sum(file.stat().st_size for file in files(path)) <= 150_000
    write(DiskCache(path, max_size=150_000), LARGE, four=1, five=1)
    assert len(files(path)) >= 3
    os.utime(Path(path, "pruned"), (time.time() - 90_000,) * 2)
    write(DiskCache(path), six=1)
    assert len(files(path)) >= 3
    write(DiskCache(path, max_size=150_000), seven=1)
    assert sum(file.stat().st_size for file in files(path)) <= 150_000


def test_a_note_of_pruning_from_the_future_does_not_stop_it(path):
    """A clock that was ahead once does not put pruning off for years."""
    write(DiskCache(path), LARGE, one=1, two=1)
    Path(path, "pruned").touch()
    os.utime(Path(path, "pruned"), (time.time() + 10 * 365 * 86400,) * 2)
    write(DiskCache(path, max_size=150_000), three=1)
    assert sum(file.stat().st_size for file in files(path)) <= 150_000


def test_clear_deletes_everything(cache, path):
    """Nothing is found any more, by anyone, and the report says what has gone."""
    write(cache, old=1, new=1)
    write(cache, LARGE, large=1)
    size = sum(file.stat().st_size for file in files(path))
    report = cache.clear()
    assert (report.entries, report.files, report.file_bytes, report.bytes_left) == (3, 2, size, 0)
    assert files(path) == []
    assert read(cache, "old", "large") == read(DiskCache(path), "old", "large") == {}
    write(cache, old=2)
    assert read(DiskCache(path), "old") == {"old": 2}


# Inspection


def test_entries_tell_about_each(cache, path):
    """Keys, sizes, times, places and meta blocks are read without the values; what was replaced is left out."""
    before = time.time()
    write(cache, old=0, replaced=0)
    write(cache, LARGE, large=0, replaced=1)
    write(cache, old=1)
    cache.write({f"ledger-{key('l')}": b"no envelope", key("deep"): entry("deep", size=10) + b""})
    told = {info.key: info for info in DiskCache(path).entries()}
    assert told.keys() == {key(of) for of in ("old", "replaced", "large", "deep")} | {f"ledger-{key('l')}"}
    assert (told[key("old")].size, told[key("old")].place) == (len(entry("old", 1)), "pack")
    assert (told[key("large")].size, told[key("large")].place) == (len(entry("large", 0, LARGE)), "file")
    assert {told[key(of)].meta for of in ("old", "replaced", "large")} == {b'{"node": "f"}'}
    assert told[f"ledger-{key('l')}"].meta == b""
    assert all(before - 1 <= info.stored_at <= time.time() + 1 for info in told.values())


def test_a_long_meta_block_is_read_whole(cache):
    """A meta block may be longer than what is read at first."""
    cache.write({key(size): seal(key(size), 1, b"m" * size, [b"x" * 10], None) for size in (5, 2000, 90_000)})
    assert {info.key: len(info.meta) for info in cache.entries()} == {key(size): size for size in (5, 2000, 90_000)}


def test_stats_count(cache, path):
    """Entries, their bytes, the files' bytes and the times of the first and the last; what cannot be read is told."""
    assert cache.stats().oldest is cache.stats().newest is None
    write(cache, old=0)
    write(cache, LARGE, large=0)
    write(cache, old=1)
    stats = cache.stats()
    assert (stats.entries, stats.files, stats.unreadable) == (2, 3, 0)
    assert stats.entry_bytes == len(entry("old", 1)) + len(entry("large", 0, LARGE))
    assert stats.file_bytes == sum(file.stat().st_size for file in files(path)) > stats.entry_bytes
    assert time.time() - 50 < stats.oldest < stats.newest < time.time() + 1
    min(files(path, "*.pack")).write_bytes(b"nonsense")
    again = DiskCache(path).stats()
    assert (again.entries, again.files, again.unreadable) == (2, 3, 1)


def test_inspection_agrees_with_itself(cache):
    """After many writes of all kinds, `entries`, `stats`, `verify` and `find` see the same."""
    for turn in range(100):
        write(cache, LARGE if turn % 17 == 0 else 300, **{f"n{turn % 40}": turn, f"m{turn % 7}": turn})
    keys = {info.key for info in cache.entries()}
    assert keys == cache.find([key(f"{letter}{n}") for letter in "nm" for n in range(50)])
    assert cache.stats().entries == cache.verify().entries == len(keys) == 47
