"""Synthetic shards for tests of training: learnable token streams, written through data_prep's own writer."""

from pathlib import Path

import numpy as np

from data_prep.indexed import ShardWriter
from data_prep.manifest import Manifest, SplitEntry, TokenizerEntry, split_of, write_manifest

VOCAB, EOD = 250, 249


def write_sources(data_dir: Path, names: tuple[str, ...] = ("a", "b", "c"), *, num_tokens: int = 6000) -> None:
    """One source a name, with a train and a held-out shard; half of the tokens follow from the one before."""
    for seed, name in enumerate(names):
        directory = data_dir / name
        directory.mkdir(parents=True)
        train, held_out = (write_split(directory, stem, n, seed=seed * 2 + i) for i, (stem, n) in
                           enumerate([("shard_00000", num_tokens), ("held_out_00000", 600)]))  # fmt: skip
        write_manifest(
            directory,
            manifest=Manifest(
                format_version=1, source=name, dtype="uint16", text_bytes=0, train=train, held_out=held_out, settings={},
                tokenizer=TokenizerEntry(kind="huggingface", fingerprint="tiny", vocab_size=VOCAB, eod_id=EOD),
                rejected_rows=0, empty_documents=0,
            ),
        )  # fmt: skip


def write_split(directory: Path, stem: str, num_tokens: int, *, seed: int) -> SplitEntry:
    generator = np.random.default_rng(seed)
    lengths = np.full(num_tokens // 50, 50)
    writer = ShardWriter(directory / stem, dtype=np.dtype(np.uint16))
    for length in lengths:
        tokens = generator.integers(0, EOD, length)
        tokens[1::2] = (tokens[:-1:2] * 7 + 3) % EOD
        tokens[-1] = EOD
        writer.add_document(tokens.astype(np.uint16))
    return split_of([writer.close()])
