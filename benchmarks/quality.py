"""The quality steps of data_prep/curate beside datatrove's blocks: `python -m benchmarks.quality CORPUS`.

CORPUS is jsonl, plain or zstd, with the text in `text`; `--every N` takes each Nth document. MB (10^6 bytes of UTF-8) a
CPU-second of one process, datatrove's after ours in the same run, both from an empty table of words and with their words' rules
loaded; and the documents of which decision, reason or text differ (goal: 0). Goal: 5 times datatrove's speed for the Gopher
rules. `gopher` is both Gopher steps, one after the other on each document: words are split once, by ours and by datatrove's.
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import zstandard
from pydantic import TypeAdapter

from benchmarks.machine import write_result
from data_prep.curate.blocks import theirs
from data_prep.curate.document import Document, Step
from data_prep.curate.spec import StepSpec
from data_prep.curate.steps import build_step
from data_prep.curate.words import splitter_of

KINDS = {
    "gopher_repetition": ("gopher_repetition",),
    "gopher_quality": ("gopher_quality",),
    "gopher": ("gopher_repetition", "gopher_quality"),
    "fineweb": ("fineweb",),
    "c4": ("c4",),
    "pii": ("pii",),
}

Outcome = tuple[list[str | None], str]  # the reason of every step, and the text in the end


def read_texts(corpus: Path, *, every: int) -> list[str]:
    with zstandard.open(corpus, "rt") if corpus.suffix in {".zst", ".zstd"} else corpus.open() as lines:
        return [orjson.loads(line)["text"] for line in itertools.islice(lines, 0, None, every)]


def pii_of_datatrove() -> Step:
    from datatrove.pipeline.formatters import PIIFormatter

    block = PIIFormatter()

    def replace(document: Document) -> None:
        block.emails_replacer._replace_i = block.ip_replacer._replace_i = 0  # as ours: each document for itself
        document.text = block.format(document.text)

    return replace


def steps_of(kinds: Sequence[str]) -> Iterator[tuple[Step, Step]]:
    """Ours and datatrove's of each kind."""
    for kind in kinds:
        spec: Any = TypeAdapter(StepSpec).validate_python({"kind": kind})
        yield build_step(spec, place=kind), pii_of_datatrove() if kind == "pii" else theirs(spec)


def run(steps: Sequence[Callable[[Document], str | None]], texts: Sequence[str]) -> tuple[list[Outcome], float]:
    """What the steps say of every document, and CPU seconds."""
    documents = [Document(text=text, id="", metadata={}) for text in texts]
    for step in steps:
        step(Document(text="Nothing is imported while the clock runs.\n" * 9, id="", metadata={}))
    splitter_of("eng").clear()
    began = time.process_time()
    reasons = [[step(document) for step in steps] for document in documents]
    seconds = time.process_time() - began
    return [(said, document.text) for said, document in zip(reasons, documents, strict=True)], seconds


def compare(kinds: Sequence[str], texts: Sequence[str], *, megabytes: float) -> dict[str, Any]:
    ours, datatroves = zip(*steps_of(kinds), strict=True)
    found, seconds = run(ours, texts)
    expected, their_seconds = run(datatroves, texts)
    reasons = Counter(reason or "kept" for said, _ in found for reason in said)
    return {
        "mb_per_cpu_s": round(megabytes / seconds, 2),
        "datatrove_mb_per_cpu_s": round(megabytes / their_seconds, 2),
        "times_as_fast": round(their_seconds / seconds, 1),
        "documents_that_differ": sum(one != other for one, other in zip(found, expected, strict=True)),
        "reasons": dict(reasons.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-result", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    if not arguments.corpus.is_file():
        raise SystemExit(f"skipped: there is no corpus {arguments.corpus}")
    texts = read_texts(arguments.corpus, every=arguments.every)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    figures: dict[str, Any] = {"documents": len(texts), "mb": round(megabytes, 2)}
    for name in arguments.kinds:
        figures[name] = compare(KINDS[name], texts, megabytes=megabytes)
        print(name, figures[name], flush=True)
    if not arguments.no_result:
        write_result("quality", figures)


if __name__ == "__main__":
    main()
