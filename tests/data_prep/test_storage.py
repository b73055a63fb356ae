"""Shards read through maps, system calls and a remote store give the same tokens; what changes under a reader is an error, not
a dead process; open files and the local cache stay within bounds."""

import errno
import os
import resource
import subprocess
import sys
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cache as cache_module
from data_prep import remote, storage
from data_prep.cache import BLOCK, BlockCache
from data_prep.errors import DataError
from data_prep.manifest import damaged_shards, read_manifest
from data_prep.remote import RemoteFolder
from data_prep.storage import FileState, LocalFolder, Reading, open_folder
from data_prep.stream import SourceStream
from tests.data_prep.test_stream import write_source


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing open, nothing cached in memory, no waiting between attempts."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    storage.OPEN_SHARDS.clear()
    cache_module.block_cache.cache_clear()
    yield
    storage.OPEN_SHARDS.clear()
    MemoryFileSystem.store.clear()


def upload(directory):
    """The folder in fsspec's memory store, under the URL that is given back (data_dir)."""
    for path in directory.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/data/{directory.name}/{path.name}", path.read_bytes())
    return "memory://data"


def document(count, *, seed=0):
    return np.random.default_rng(seed).integers(0, 999, size=count).astype(np.int32)


def big_source(directory, *, shards=2, tokens=100_000, dtype="int32"):
    """Shards of several cache blocks, and their tokens end to end."""
    train = [[document(tokens, seed=seed)] for seed in range(shards)]
    return write_source(directory, train=train, dtype=dtype), np.concatenate([shard[0] for shard in train])


def open_stream(data_dir, reading=storage.DEFAULT_READING):
    return SourceStream(open_folder(data_dir, "web", reading=reading), name="web")


class Calls:
    """Counts what is read from the memory store."""

    def __init__(self, monkeypatch):
        self.reads, self.bytes = 0, 0
        read = MemoryFileSystem.cat_file

        def counted(system, path, start=None, end=None, **kwargs):
            data = read(system, path, start, end, **kwargs)
            if str(path).endswith(".bin"):
                self.reads, self.bytes = self.reads + 1, self.bytes + len(data)
            return data

        monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)


# The same tokens however they are read


def folders(directory, cache):
    reading = Reading(cache_dir=str(cache))
    url = upload(directory)
    return {
        "mmap": LocalFolder(directory),
        "pread": LocalFolder(directory, reader="pread"),
        "memory": open_folder(url, "web"),
        "memory, cached": open_folder(url, "web", reading=reading),
        "file": open_folder(f"file://{directory.parent}", "web"),
    }


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=5).filter(sum),
    dtype=st.sampled_from(["int32", "uint16"]),
    data=st.data(),
)
def test_every_reader_gives_the_same_tokens(tmp_path_factory, sizes, dtype, data):
    root = tmp_path_factory.mktemp("data")
    MemoryFileSystem.store.clear()
    train = [[document(size, seed=seed)] if size else [] for seed, size in enumerate(sizes)]
    directory = write_source(root / "web", train=train, dtype=dtype)
    tokens = np.concatenate([shard[0] for shard in train if shard])
    length = data.draw(st.integers(1, len(tokens)))
    offsets = data.draw(st.lists(st.integers(0, len(tokens) - length), min_size=1, max_size=12))
    wanted = np.stack([tokens[offset : offset + length] for offset in offsets])
    for reader, folder in folders(directory, root / "cache").items():
        stream = SourceStream(folder, name="web")
        for _ in range(2):  # the second time from the cache, and announced where the first was slow
            assert np.array_equal(stream.read_windows(offsets, length), wanted), reader


@pytest.mark.parametrize("reader", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_a_shard_alone(tmp_path, reader, dtype):
    directory, tokens = big_source(tmp_path / "web", shards=1, tokens=1000, dtype=dtype)
    folder = LocalFolder(directory, reader=reader)
    state = folder.states(["shard_00000.bin"])["shard_00000.bin"]
    shard = folder.open_shard("shard_00000.bin", dtype=dtype, state=state)
    out = np.zeros(100, dtype=np.int32)
    shard.read_into(out, 900)
    assert np.array_equal(out, tokens[900:]) and shard.state() == state
    with pytest.raises(DataError, match="asked for tokens 901 to 1001, it holds 1000"):
        shard.read_into(out, 901)


def test_short_reads_are_completed(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web")
    stream = SourceStream(LocalFolder(directory, reader="pread"), name="web")
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [memoryview(buffers[0]).cast("B")[:1001]], offset))
    assert np.array_equal(stream.read_windows([5, 70_000], 9000), np.stack([tokens[5:9005], tokens[70_000:79_000]]))


def test_a_cold_folder_announces_what_it_reads(tmp_path, monkeypatch):
    _, tokens = big_source(tmp_path / "web")
    asked = []
    monkeypatch.setattr(storage, "COLD_NS_PER_TOKEN", 0.0)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    stream = open_stream(tmp_path)
    assert np.array_equal(stream.read_windows([100, 0], 10), np.stack([tokens[100:110], tokens[:10]]))
    assert asked == [(0, 40), (400, 40)]
    monkeypatch.setattr(storage, "COLD_NS_PER_TOKEN", 1e12)
    stream.read(0, 10)
    stream.read(0, 10)
    assert len(asked) == 3


def test_thousands_of_files_are_listed_once(tmp_path, monkeypatch):
    directory = write_source(tmp_path / "web", train=[[document(3, seed=seed)] for seed in range(40)])
    listings = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(path) or scan(path))
    monkeypatch.setattr(LocalFolder, "_few", None)
    assert len(open_stream(tmp_path).states) == 40
    assert listings == [directory]


# What changes under a reader


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_truncated_file_is_an_error_and_not_the_end_of_the_process(tmp_path, reader):
    """In a process of its own: a bus error would end this one."""
    big_source(tmp_path / "web")
    script = f"""if True:
        import os
        from data_prep.errors import DataError
        from data_prep.storage import Reading, open_folder
        from data_prep.stream import SourceStream
        stream = SourceStream(open_folder({str(tmp_path)!r}, "web", reading=Reading(reader={reader!r})), name="web")
        stream.read(0, 1000)
        os.truncate({str(tmp_path / "web/shard_00000.bin")!r}, 4096)
        try:
            stream.read(90_000, 1000)
        except DataError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "shard_00000.bin is truncated" in done.stdout and "400,000 bytes" in done.stdout and "4,096 bytes" in done.stdout


def test_a_file_that_ends_during_a_read(tmp_path, monkeypatch):
    directory, _ = big_source(tmp_path / "web")
    stream = open_stream(tmp_path, Reading(reader="pread"))
    stream.read(0, 10)
    monkeypatch.setattr(storage.LocalShard, "_check", lambda shard: None)  # it was whole when it was looked at
    os.truncate(directory / "shard_00000.bin", 4096)
    with pytest.raises(DataError, match=r"shard_00000\.bin is truncated: it ends at byte 4096"):
        stream.read(1000, 100)


def test_a_failing_disk_names_the_file(tmp_path, monkeypatch):
    big_source(tmp_path / "web")
    stream = open_stream(tmp_path, Reading(reader="pread"))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"cannot read .*shard_00000\.bin at byte 40: Input/output error"):
        stream.read(10, 100)


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_file_changed_in_place(tmp_path, reader):
    directory, _ = big_source(tmp_path / "web")
    stream = open_stream(tmp_path, Reading(reader=reader))
    stream.read(0, 10)
    with (directory / "shard_00000.bin").open("r+b") as file:
        file.write(b"other")
    os.utime(directory / "shard_00000.bin", ns=(0, 1))
    with pytest.raises(DataError, match=r"shard_00000\.bin changed: it was 400,000 bytes changed at"):
        stream.read(0, 10)


def test_a_file_replaced_is_found_when_it_is_opened_next(tmp_path):
    directory, tokens = big_source(tmp_path / "web")
    stream = open_stream(tmp_path)
    stream.read(0, 10)
    path = directory / "shard_00000.bin"
    (tmp_path / "new").write_bytes(bytes(path.stat().st_size))
    os.utime(tmp_path / "new", ns=(0, 1))
    (tmp_path / "new").replace(path)
    assert np.array_equal(stream.read(0, 10), tokens[:10])  # the file that is open
    storage.OPEN_SHARDS.clear()
    with pytest.raises(DataError, match=r"shard_00000\.bin changed: .*phidias data action=verify"):
        stream.read(0, 10)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot open .*shard_00000\.bin: No such file"):
        stream.read(0, 10)


# Bounds on what is open


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_no_more_shards_are_open_than_may_be(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(storage.OPEN_SHARDS, "limit", 8)
    write_source(tmp_path / "web", train=[[document(7, seed=seed)] for seed in range(300)])
    stream = open_stream(tmp_path, Reading(reader=reader))
    before = open_files()
    wanted = np.concatenate([document(7, seed=seed) for seed in range(300)])
    assert np.array_equal(stream.read(0, 2100), wanted)
    assert np.array_equal(stream.read_windows(np.arange(2090), 10)[:, 0], wanted[:2090])
    assert len(storage.OPEN_SHARDS) == 8 and open_files() <= before + 16
    storage.OPEN_SHARDS.clear()
    assert open_files() == before


def test_threads_may_close_what_others_read(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.OPEN_SHARDS, "limit", 2)
    write_source(tmp_path / "web", train=[[document(500, seed=seed)] for seed in range(20)])
    wanted = np.concatenate([document(500, seed=seed) for seed in range(20)])
    streams = [open_stream(tmp_path, Reading(reader=reader)) for reader in ("mmap", "pread")]
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            offsets = rng.integers(0, 9_900, size=12)
            found = streams[seed % 2].read_windows(offsets, 100)
            if not all(np.array_equal(row, wanted[o : o + 100]) for row, o in zip(found, offsets, strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"), [(1024, 1024, 128), (1024, 4096, 512), (1024, 10**6, 4096), (10**6, 10**6, 4096), (8, 8, 1)]
)
def test_the_limit_follows_from_the_system(monkeypatch, soft, hard, wanted):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert storage.open_limit() == wanted
    assert all(soft < new <= hard and kept == hard for new, kept in raised)


def test_a_limit_that_may_not_be_raised(monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert storage.open_limit() == 128


# Elsewhere


def test_a_manifest_elsewhere(tmp_path):
    directory, _ = big_source(tmp_path / "web")
    folder = open_folder(upload(directory), "web")
    manifest = read_manifest(folder)
    assert manifest == read_manifest(directory) and damaged_shards(folder, manifest=manifest) == []
    fsspec.filesystem("memory").rm("/data/web/shard_00001.bin")
    assert damaged_shards(folder, manifest=manifest) == [
        "memory://data/web/shard_00001.bin is missing, the manifest says 400000"
    ]
    with pytest.raises(DataError, match=r"source web: memory://data/web/shard_00001\.bin is missing"):
        open_stream("memory://data")
    with pytest.raises(DataError, match=r"no data for source 'other': memory://data/other/manifest\.json is missing"):
        read_manifest(open_folder("memory://data", "other"))


def test_documents_are_read_in_local_folders(tmp_path):
    stream = open_stream(upload(big_source(tmp_path / "web")[0]))
    with pytest.raises(DataError, match=r"documents were asked of memory://data/web; .*copy the source here"):
        next(stream.documents())


def test_listings_and_single_requests_agree(tmp_path, monkeypatch):
    directory = write_source(tmp_path / "web", train=[[document(3, seed=seed)] for seed in range(5)])
    folder, files = open_folder(upload(directory), "web"), [f"shard_{number:05d}.bin" for number in range(5)]
    single = folder.states(files)
    monkeypatch.setattr(remote, "FEW_FILES", 0)
    assert folder.states([*files, "absent"]) == single and len(single) == 5


@pytest.mark.parametrize(("key", "value"), [("ETag", '"abc"'), ("mtime", 1.5), ("absent", "")])
def test_the_version_of_an_object(key, value):
    assert remote.remote_state({"size": 3, key: value}) == FileState(3, str(value))


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"s3://bucket/web needs fsspec.*pip install 'phidias\[data\]'"):
        open_folder("s3://bucket", "web")


def test_an_unknown_protocol():
    with pytest.raises(DataError, match=r"fsspec cannot open nonsense://bucket/web: .*correct run\.data_dir"):
        open_folder("nonsense://bucket", "web")


def test_an_object_replaced_before_it_is_opened(tmp_path):
    directory, _ = big_source(tmp_path / "web")
    stream = open_stream(upload(directory))
    fsspec.filesystem("memory").pipe_file("/data/web/shard_00000.bin", bytes(400_000))
    with pytest.raises(DataError, match=r"memory://data/web/shard_00000\.bin changed: it was 400,000 bytes of version"):
        stream.read(0, 10)
    fsspec.filesystem("memory").rm("/data/web/shard_00000.bin")
    with pytest.raises(DataError, match=r"shard_00000\.bin changed: .*it is missing"):
        stream.read(0, 10)


def test_an_object_truncated_under_the_stream(tmp_path):
    stream = open_stream(upload(big_source(tmp_path / "web")[0]))
    stream.read(0, 10)
    fsspec.filesystem("memory").pipe_file("/data/web/shard_00000.bin", bytes(2000))
    with pytest.raises(DataError, match=r"shard_00000\.bin gave 1200 of the 4000 bytes from 800 on: it is truncated"):
        stream.read(200, 1000)


def test_failures_that_pass_are_tried_again(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web")
    stream, failures = open_stream(upload(directory)), [ConnectionResetError("reset"), TimeoutError("slow")]
    read = MemoryFileSystem.cat_file

    def flaky(system, *args, **kwargs):
        if failures:
            raise failures.pop()
        return read(system, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert np.array_equal(stream.read(0, 10), tokens[:10]) and not failures
    failures += [ConnectionResetError("reset")] * 3
    with pytest.raises(DataError, match=r"cannot read .*shard_00000\.bin: ConnectionResetError: reset; tried 3 times"):
        stream.read(0, 10)


# The cache


def test_what_was_read_once_is_not_read_again(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web")
    url, reading = upload(directory), Reading(cache_dir=str(tmp_path / "cache"))
    calls, offsets = Calls(monkeypatch), np.array([0, 5, 99_990, 150_000])
    wanted = np.stack([tokens[offset : offset + 4097] for offset in offsets])
    assert np.array_equal(open_stream(url, reading).read_windows(offsets, 4097), wanted)
    assert 0 < calls.reads <= 4 and calls.bytes <= 5 * BLOCK
    again = open_stream(url, reading)
    calls.reads = 0
    storage.OPEN_SHARDS.clear()
    monkeypatch.setattr(MemoryFileSystem, "info", None)  # nor is it asked for
    assert np.array_equal(again.read_windows(offsets, 4097), wanted) and calls.reads == 0


def test_a_changed_object_is_not_served_from_the_cache(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web")
    url, reading = upload(directory), Reading(cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(open_stream(url, reading).read(0, 100), tokens[:100])
    other = np.zeros(100_000, dtype=np.int32)
    fsspec.filesystem("memory").pipe_file("/data/web/shard_00000.bin", other.tobytes())
    assert np.array_equal(open_stream(url, reading).read(0, 100), other[:100])


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web", shards=1, tokens=10 * BLOCK // 4)
    url, reading = upload(directory), Reading(cache_dir=str(tmp_path / "cache"), cache_gib=3.2 * BLOCK / 2**30)
    calls, stream = Calls(monkeypatch), open_stream(url, reading)
    for _ in range(2):
        for offset in range(0, len(tokens), 1000):
            count = min(1000, len(tokens) - offset)
            assert np.array_equal(stream.read(offset, count), tokens[offset : offset + count])
    held = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").iterdir())
    assert 2 * BLOCK <= held <= 5 * BLOCK
    assert calls.bytes > 2 * 5 * BLOCK  # the rest went straight through, twice


def test_a_full_disk_ends_the_storing_and_not_the_run(tmp_path, monkeypatch):
    directory, tokens = big_source(tmp_path / "web")
    stream = open_stream(upload(directory), Reading(cache_dir=str(tmp_path / "cache")))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stream.read(0, 10)
    monkeypatch.setattr(os, "pwrite", full)
    assert np.array_equal(stream.read(50_000, 10), tokens[50_000:50_010])
    assert not cache_module.block_cache(str(tmp_path / "cache"), 100.0).has_room()
    assert np.array_equal(stream.read(120_000, 10), tokens[120_000:120_010])


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write the cache .*correct data\.cache_dir"):
        open_folder("memory://data", "web", reading=Reading(cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("damage", ["longer", "shorter", "empty", "another boot"])
def test_a_torn_cache_file_is_thrown_away(tmp_path, damage):
    cache = BlockCache(tmp_path, limit_bytes=1 << 30)
    whole = cache.open("url", size=3 * BLOCK + 5, version="1")
    whole.write(1, b"x" * BLOCK)
    assert whole.read(BLOCK, BLOCK + 5) == b"x" * 5 and whole.read(BLOCK - 1, BLOCK + 5) is None
    (path,) = tmp_path.glob("*.blocks")
    size = path.stat().st_size
    if damage == "another boot":
        with path.open("r+b") as file:
            file.seek(size - 10)
            file.write(b"0123456789")
    else:
        os.truncate(path, {"longer": size + 1, "shorter": size - 1, "empty": 0}[damage])
    assert BlockCache(tmp_path, limit_bytes=1 << 30).open("url", size=3 * BLOCK + 5, version="1").read(BLOCK, BLOCK + 5) is None


def test_processes_share_a_cache(tmp_path):
    """Four of them fetch the same object at once, each from a file store; all read the right bytes, and one cache remains."""
    directory, _ = big_source(tmp_path / "web", shards=3)
    script = f"""if True:
        import sys
        import numpy as np
        from data_prep.storage import Reading, open_folder
        from data_prep.stream import SourceStream
        folder = open_folder("file://{tmp_path}", "web", reading=Reading(cache_dir={str(tmp_path / "cache")!r}))
        stream = SourceStream(folder, name="web")
        rng = np.random.default_rng(int(sys.argv[1]))
        whole = np.concatenate([np.fromfile(f"{directory}/shard_0000{{i}}.bin", dtype=np.int32) for i in range(3)])
        for _ in range(40):
            offsets = rng.integers(0, stream.num_tokens - 5000, size=6)
            found = stream.read_windows(offsets, 5000)
            assert all(np.array_equal(row, whole[o : o + 5000]) for row, o in zip(found, offsets))
    """
    running = [subprocess.Popen([sys.executable, "-c", script, str(seed)], stderr=subprocess.PIPE) for seed in range(4)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in running] == [(b"", 0)] * 4
    assert len(list((tmp_path / "cache").glob("*.blocks"))) == 3


# Over a socket


class RangeHandler(BaseHTTPRequestHandler):
    """Serves `server.files` by byte ranges."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        data = self.server.files.get(self.path)
        low, _, high = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        body = b"" if data is None else data[int(low) : int(high) + 1 if high else None]
        self.send_response(404 if data is None else 206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Size", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class SocketStore(AbstractFileSystem):
    """As little of a store as there can be: single requests, and no listing that says a size."""

    protocol = "testsocket"

    _strip_protocol = classmethod(lambda cls, path: path)

    def _ask(self, method, path, headers=None):
        url = urlsplit(path)
        connection = HTTPConnection(url.netloc, timeout=10)
        try:
            connection.request(method, url.path, headers=headers or {})
            answer = connection.getresponse()
            if answer.status == 404:
                raise FileNotFoundError(path)
            return answer.headers, answer.read()
        finally:
            connection.close()

    def info(self, path, **_):
        return {"name": path, "type": "file", "size": int(self._ask("HEAD", path)[0]["X-Size"]), "etag": "one"}

    def ls(self, path, detail=True, **_):
        return []

    def cat_file(self, path, start=None, end=None, **_):
        return self._ask("GET", path, {} if start is None else {"Range": f"bytes={start}-{end - 1}"})[1]


def test_over_a_socket(tmp_path):
    directory, tokens = big_source(tmp_path / "web", shards=20, tokens=20_000)
    fsspec.register_implementation("testsocket", SocketStore, clobber=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    server.files = {f"/web/{path.name}": path.read_bytes() for path in directory.iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reading = Reading(cache_dir=str(tmp_path / "cache"))
        stream = open_stream(f"testsocket://127.0.0.1:{server.server_port}", reading)
        assert isinstance(stream.folder, RemoteFolder)
        offsets = np.random.default_rng(0).integers(0, len(tokens) - 4097, size=30)
        wanted = np.stack([tokens[offset : offset + 4097] for offset in offsets])
        assert np.array_equal(stream.read_windows(offsets, 4097), wanted)
        server.shutdown()
        assert np.array_equal(stream.read_windows(offsets, 4097), wanted)
    finally:
        server.shutdown()
        server.server_close()
