"""How fast text becomes Megatron shards, beside what else does it, in one run:

    python -m benchmarks.data_prep CORPUS.jsonl[.zst] --ranks cl100k_base.tiktoken

    ours             `phidias data`'s own path: jsonl to shuffled shards with held-out documents, buckets and checksums
    bare             gigatoken's encode_batch alone, on texts that are in memory
    megatron         megatron-core's IndexedDatasetBuilder fed by a Hugging Face tokenizer, one process: the classic preprocess
    datatrove        datatrove's JsonlReader and MegatronDocumentTokenizer

Each is a process of its own, run in turn, median of several; what it takes with sixteen documents is its start-up, which is
subtracted: imports, and building tokenizers. MB are 10^6 bytes of UTF-8 text. Peak memory is the largest process's. The slow
ones read every eighth document. The tokenizer keeps the words it has met, and its first 80 MB are its slowest: the corpus six
times over shows the speed of a long task, where texts are as if seen before. All use cl100k; the Hugging Face tokenizer is made
from the ranks file.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import zstandard

from benchmarks.machine import write_result

EOD = "<|endoftext|>"
FEW, PART, PARTS = 16, 8, 8
REPEATS = {"ours_1_worker": 5, "ours_2_workers": 5, "bare": 5, "megatron": 3, "datatrove": 3}
SLOW = ("megatron", "datatrove")
QUICK = ("ours_1_worker", "ours_2_workers", "bare")
TIMES = 6

Figures = dict[str, Any]


# What a process of its own does


def ours(corpus: Path, *, ranks: Path, out: Path, workers: int) -> None:
    from data_prep.build import prepare_source
    from data_prep.spec import DataSettings, Source, TokenizerSpec

    settings = DataSettings(
        held_out_fraction=0.0005,
        shard_tokens=max(1, corpus.stat().st_size // 32),  # eight tasks, so that two workers end together
        length_buckets=(8192, 16384),
        chunk_tokens=131_072,
        group_tokens=2**31,
        num_workers=workers,
        num_machines=1,
        max_rejected_rows=0,
        max_row_mib=32,
        shuffle_mib=32,
        oracle_fraction=0.0005,
        dropped_samples=0,
        reader="mmap",
        cache_dir=None,
        cache_gib=1.0,
        prefetch_batches=0,
        trace=False,
    )
    prepare_source(
        "corpus",
        Source(inputs=(f"{corpus.parent}/part_*.jsonl",), format="jsonl", share=1.0),
        tokenizer=TokenizerSpec(kind="cl100k", ranks_file=str(ranks), file=None, eod=EOD),
        settings=settings,
        seed=1,
        data_dir=out,
    )


def bare(corpus: Path, *, ranks: Path, out: Path) -> float:
    """The CPU seconds of the calls alone."""
    import gigatoken

    texts = [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    engine = gigatoken.Tokenizer.from_tiktoken(str(ranks), pretokenizer="cl100k", special_tokens={})
    began = time.process_time()
    for batch in batches(texts):
        engine.encode_batch(batch, parallel=False)
    return time.process_time() - began


def batches(texts: list[str], *, characters: int = 1 << 21) -> list[list[str]]:
    """As ours: about so much text a call."""
    found: list[list[str]] = [[]]
    size = 0
    for text in texts:
        found[-1].append(text)
        size += len(text)
        if size >= characters:
            found.append([])
            size = 0
    return found


def megatron(corpus: Path, *, tokenizer: Path, out: Path) -> None:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.int32)
    with corpus.open() as lines:
        for line in lines:
            ids = encode(json.loads(line)["text"], add_special_tokens=False).ids
            builder.add_document(torch.IntTensor([*ids, 100257]), [len(ids) + 1])
    builder.finalize(str(out / "text.idx"))


def datatrove(corpus: Path, *, tokenizer: Path, out: Path) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    writer = MegatronDocumentTokenizer(str(out), "text", tokenizer_name_or_path=str(tokenizer), eos_token=EOD)
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=str(out / "logs")).run()


def work(name: str, corpus: Path, *, ranks: Path, tokenizer: Path, out: Path) -> None:
    """Prints what the task took, its children included."""
    tasks: dict[str, Callable[[], Any]] = {
        "ours_1_worker": lambda: ours(corpus, ranks=ranks, out=out, workers=1),
        "ours_2_workers": lambda: ours(corpus, ranks=ranks, out=out, workers=2),
        "bare": lambda: bare(corpus, ranks=ranks, out=out),
        "megatron": lambda: megatron(corpus, tokenizer=tokenizer, out=out),
        "datatrove": lambda: datatrove(corpus, tokenizer=tokenizer, out=out),
    }
    alone = tasks[name]()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = alone if alone is not None else sum(usage.ru_utime + usage.ru_stime for usage in used)
    own = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    # ru_maxrss of a process counts what its parent held at the fork; of the children that is this small one.
    print(json.dumps({"cpu_s": cpu, "peak_rss_mb": max(own, used[1].ru_maxrss) * 1024 / 1e6}))


# The processes


def run(name: str, corpus: Path, *, ranks: Path, tokenizer: Path) -> Figures:
    with tempfile.TemporaryDirectory(prefix="phidias-data-") as out:
        words = [name, str(corpus), "--ranks", str(ranks), "--tokenizer", str(tokenizer), "--out", out]
        began = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.data_prep", "--work", *words], capture_output=True, text=True, check=True
        )
        wall = time.perf_counter() - began
    return {"wall_s": wall, **json.loads(ended.stdout.splitlines()[-1])}


def measure(name: str, *, whole: Path, few: Path, **files: Path) -> Figures:
    """Speeds over the start-up; the medians of several rounds."""
    starts = [run(name, few, **files) for _ in range(3)]
    taken = [run(name, whole, **files) for _ in range(REPEATS[name])]
    start_cpu, start_wall = (statistics.median(start[key] for start in starts) for key in ("cpu_s", "wall_s"))
    megabytes = (text_bytes(whole) - text_bytes(few)) / 1e6
    cpu = statistics.median(figures["cpu_s"] for figures in taken) - (0.0 if name == "bare" else start_cpu)
    wall = statistics.median(figures["wall_s"] for figures in taken) - start_wall
    return {
        "text_mb": round(megabytes, 2),
        "mb_per_cpu_s": round(megabytes / cpu, 2),
        "mb_per_wall_s": round(megabytes / wall, 2) if name != "bare" else None,
        "start_up_cpu_s": round(start_cpu, 2),
        "start_up_wall_s": round(start_wall, 2),
        "peak_rss_mb": round(max(figures["peak_rss_mb"] for figures in taken)),
    }


def text_bytes(corpus: Path) -> int:
    return sum(len(orjson.loads(line)["text"].encode()) for line in corpus.read_bytes().splitlines())


def compare_with_tiktoken(corpus: Path, *, ranks: Path) -> Figures:
    """Every document's ids beside tiktoken's."""
    from data_prep.tokenizers import Cl100k

    tokenizer = Cl100k(ranks.read_bytes(), eod=EOD)
    texts = [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    found = [ids for batch in batches(texts) for ids in tokenizer.encode_documents(batch)]
    differ = sum(ids.tolist() != tokenizer.encode_reference(text).tolist() for text, ids in zip(texts, found, strict=True))
    return {"documents": len(texts), "tokens": sum(map(len, found)), "documents_that_differ": differ}


def write_corpora(corpus: Path, folder: Path) -> dict[str, Path]:
    """The whole of it, a part for the slow, and a few documents for what a start takes."""
    data = corpus.read_bytes()
    lines = (zstandard.ZstdDecompressor().decompress(data) if corpus.suffix == ".zst" else data).splitlines(keepends=True)
    found = {}
    for name, part in (
        ("whole", lines),
        ("many", lines * TIMES),
        ("part", lines[::PART]),
        ("few", sorted(lines, key=len)[:FEW]),
    ):
        (folder / name).mkdir()
        found[name] = folder / name / "corpus.jsonl"
        found[name].write_bytes(b"".join(part))
        for number in range(PARTS):
            (folder / name / f"part_{number}.jsonl").write_bytes(b"".join(part[number::PARTS]))
    return found


def write_hf_tokenizer(ranks: Path, path: Path) -> Path:
    """cl100k as a tokenizer.json, by transformers' converter."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from data_prep.tokenizers import CL100K_PATTERN

    TikTokenConverter(vocab_file=str(ranks), pattern=CL100K_PATTERN, extra_special_tokens=[EOD]).converted().save(str(path))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="rows with a field `text`")
    parser.add_argument("--ranks", type=Path, required=True, help="cl100k_base.tiktoken")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="phidias-corpus-") as folder:
        corpora = write_corpora(arguments.corpus, Path(folder))
        files = {"ranks": arguments.ranks, "tokenizer": write_hf_tokenizer(arguments.ranks, Path(folder) / "tokenizer.json")}
        figures = {
            name: measure(name, whole=corpora["part" if name in SLOW else "whole"], few=corpora["few"], **files)
            for name in REPEATS
        }
        many = {name: measure(name, whole=corpora["many"], few=corpora["few"], **files) for name in QUICK}
        exact = compare_with_tiktoken(corpora["whole"], ranks=arguments.ranks)
    warm = {**many, "ratios": ratios(many)}
    write_result("data_prep", {**figures, "ratios": ratios(figures), f"corpus_{TIMES}_times": warm, "beside_tiktoken": exact})


def ratios(figures: Figures) -> Figures:
    speed = {name: found["mb_per_cpu_s"] for name, found in figures.items()}
    walls = [figures[name]["mb_per_wall_s"] for name in ("ours_1_worker", "ours_2_workers")]
    return {
        "of_the_bare_tokenizer": round(speed["ours_1_worker"] / speed["bare"], 3),
        "two_workers_wall": round(walls[1] / walls[0], 2),
        **{f"of_{name}": round(speed["ours_1_worker"] / speed[name], 1) for name in SLOW if name in speed},
    }


def work_main(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    for flag in ("corpus", "--ranks", "--tokenizer", "--out"):
        parser.add_argument(flag, type=Path)
    arguments = parser.parse_args(words)
    work(arguments.name, arguments.corpus, ranks=arguments.ranks, tokenizer=arguments.tokenizer, out=arguments.out)


if __name__ == "__main__":
    if "--work" in sys.argv:
        work_main([word for word in sys.argv[1:] if word != "--work"])
    else:
        main()
