"""Text from a bucket, shards to a bucket: through a local S3-compatible server, over a real socket."""

import json

import fsspec
import pytest

from data_prep.build import prepare_source, verify_source
from data_prep.errors import DataError
from data_prep.prepare.place import open_place
from data_prep.prepare.remote_place import RemotePlace
from data_prep.spec import DataSettings, Source
from data_prep.storage import open_folder
from data_prep.stream import SourceStream
from tests.data_prep.test_build import SETTINGS, Lab, snapshot, some_texts, tokenizer_file  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def s3():
    """The URL of a server, with the credentials that its clients read from the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(key, value)
        fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}"}
        yield
        fsspec.config.conf.pop("s3", None)
    server.stop()


@pytest.fixture
def bucket(s3, request):
    """A bucket of the test's own."""
    name = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def lab(tmp_path, tokenizer_file):  # noqa: F811
    lab = Lab(tmp_path, tokenizer_file)
    for number in range(6):
        lab.texts(f"{number}.jsonl", [f"file {number}: {text}" for text in some_texts(60)])
    return lab


def upload(lab, bucket):
    system = fsspec.filesystem("s3")
    for path in lab.folder.glob("*.jsonl"):
        system.put_file(str(path), f"{bucket}/raw/{path.name}")


def prepare(lab, *, inputs, data_dir, steps=(), **changes):
    return prepare_source(
        "web",
        Source(inputs=(inputs,), format="jsonl", share=1.0, steps=steps),
        tokenizer=lab.tokenizer,
        settings=DataSettings(**(SETTINGS | {"shuffle_mib": 1} | changes)),
        seed=1,
        data_dir=data_dir,
    )


def objects(url):
    system = fsspec.filesystem("s3")
    return {path.partition("/web/")[2]: system.cat_file(path) for path in system.find(f"{url}/web")}


STEPS = ({"kind": "exact_dedup"},)


@pytest.mark.parametrize("steps", [(), STEPS], ids=["plain", "dedup"])
def test_a_bucket_to_a_bucket_gives_the_bytes_of_a_folder(lab, bucket, steps):
    upload(lab, bucket)
    there = prepare(lab, inputs=f"{bucket}/raw/*.jsonl", data_dir=f"{bucket}/data", steps=steps)
    here = prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=lab.data_dir, steps=steps)
    assert (there.train, there.held_out) == (here.train, here.held_out)
    local, remote = snapshot(lab.data_dir / "web"), objects(f"{bucket}/data")
    assert local.keys() == remote.keys()
    assert all(local[name] == remote[name] for name in local if name.startswith(("shard", "held_out")))
    folder = open_folder(f"{bucket}/data", "web")
    assert verify_source(folder) == []
    stream = SourceStream(folder, name="web")
    assert stream.num_tokens == here.train.tokens
    assert (stream.read(0, 100) == SourceStream(lab.data_dir / "web", name="web").read(0, 100)).all()


def test_a_second_run_does_nothing_and_a_damaged_object_is_found(lab, bucket):
    data = f"{bucket}/data"
    first = prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data)
    before = objects(data)
    assert prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data, num_workers=2) == first and objects(data) == before
    system, shard = fsspec.filesystem("s3"), first.train.shards[0].file
    content = before[f"{shard}.bin"]
    system.pipe_file(f"{data}/web/{shard}.bin", content[:-2] + b"\5\0")
    found = verify_source(open_folder(data, "web"))
    assert len(found) == 1 and "bin_xxh3" in found[0] and bucket in found[0]
    system.rm(f"{data}/web/{shard}.bin")
    with pytest.raises(DataError, match=rf"{shard}\.bin is missing"):
        prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data)


def test_what_was_begun_in_a_bucket_is_ended(lab, bucket):
    data = f"{bucket}/data"
    whole = prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data)
    before = objects(data)
    system = fsspec.filesystem("s3")
    system.rm(f"{data}/web/manifest.json")
    system.rm(f"{data}/web/receipts/tokenize_00001.json")
    assert prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data) == whole and objects(data) == before
    system.rm(f"{data}/web/manifest.json")
    with pytest.raises(DataError, match=r"begun with other settings"):
        prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir=data, shard_tokens=999)


def test_claims_in_a_bucket(bucket):
    place = open_place(f"{bucket}/data", "web")
    assert isinstance(place, RemotePlace)
    with place.claim("a") as claim:
        assert claim and place.claim("a") is None
        with place.claim("b") as other:
            assert other
    with place.claim("a") as again:
        assert again
    place.write("claims/c", json.dumps({"by": "a dead machine", "at": 0}).encode())
    assert place.claim("c") is not None


def test_a_store_that_is_not_there_is_named(lab, s3, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.remote_place.RETRY_SECONDS", (0.01,))
    with pytest.raises(
        DataError, match=r"cannot write s3://no-such-bucket/web/plan\.json after 2 attempts: .*look at the store"
    ):
        prepare(lab, inputs=f"{lab.folder}/*.jsonl", data_dir="s3://no-such-bucket")
