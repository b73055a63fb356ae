"""Real corpora that every machine with Phidias has, and a tokenizer trained on them: `python -m data_prep.demo <directory>`.

Nothing is downloaded. Four sources in the four formats data_prep reads, with documents of one line to a megabyte:

    raw/code/*.jsonl.gz        modules of Python's standard library
    raw/reference/*.jsonl.zst  Python's reference manual topics, and the docstrings of the standard library and numpy
    raw/prose/*.txt            licences, readmes and news of Python and of the installed packages
    raw/long/*.parquet         the standard library's long modules, none of which is in `code`
"""

import ast
import glob
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.errors import DataError
from data_prep.indexed import partial
from data_prep.readers import Rejects, RowCount, find_inputs, read_documents
from data_prep.spec import Source

EOD = "<|endoftext|>"
SPECIAL_TOKENS = (EOD, "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|pad|>")  # phi-4's chat tokens among them
VOCAB_SIZE = 4096
LONG_CHARACTERS = 24_000
SHORTEST_CHARACTERS = 200
CODE_FILES = 4
FORMATS: dict[str, Literal["jsonl", "parquet", "text"]] = {
    "code": "jsonl",
    "reference": "jsonl",
    "prose": "text",
    "long": "parquet",
}
TABLE = "corpora.json"
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# Tests, and modules that are tables of numbers: pydoc_data is in `reference`, read as text.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|stringprep\.py")
PROSE_FILES = re.compile(
    r"(licen[cs]e|copying|notice|readme|authors|news|changelog|changes|history|credits|help)[^/]*", re.IGNORECASE
)
PROSE_SUFFIXES = {"", ".txt", ".md", ".rst", ".apache", ".bsd", ".mit"}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Text(NamedTuple):
    """A document and where it comes from, the same on every run on one machine."""

    origin: str
    text: str


class Corpus(NamedTuple):
    """A line of the table."""

    source: str
    files: int
    documents: int
    megabytes: float


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m data_prep.demo <directory>", file=sys.stderr)
        return 2
    try:
        print(table(build_demo(Path(arguments[0]))))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def build_demo(directory: Path) -> list[Corpus]:
    """Writes `directory`/raw and `directory`/tokenizer.json, each whole or not at all; what is there stays as it is.

    DataError: `raw` is there and is not the demo's."""
    raw, tokenizer = directory / "raw", directory / "tokenizer.json"
    if raw.exists() and not (raw / TABLE).exists():
        raise DataError(f"{raw} is there and was not written by the demo (no {TABLE} in it); choose another directory")
    if not raw.exists():
        _write_raw(raw, corpora=collect())
    if not tokenizer.exists():
        partial(tokenizer).write_text(train_tokenizer(read_raw(raw)), encoding="utf-8")
        partial(tokenizer).rename(tokenizer)
    return [Corpus(*row) for row in json.loads((raw / TABLE).read_text(encoding="utf-8"))]


def collect() -> dict[str, list[Text]]:
    """The documents of each source, without exact copies."""
    modules = list(_modules(STANDARD_LIBRARY))
    numpy = [Text(f"numpy/{origin}", text) for origin, text in _modules(Path(np.__file__).parent)]
    corpora = {
        "code": [module for module in modules if len(module.text) <= LONG_CHARACTERS],
        "reference": [*_manual_topics(), *_docstrings(modules), *_docstrings(numpy), *_builtin_docstrings()],
        "prose": [*_python_prose(), *_package_prose()],
        "long": [module for module in modules if len(module.text) > LONG_CHARACTERS],
    }
    return {name: _without_copies(texts) for name, texts in corpora.items()}


def read_raw(raw: Path) -> Iterator[str]:
    """Every document on disk, source by source."""
    for name, format in FORMATS.items():
        source = Source(inputs=(f"{glob.escape(str(raw))}/{name}/*",), format=format, share=1.0)
        rejects = Rejects(raw / "rejects.jsonl", tolerance=0)
        rows = read_documents(find_inputs(source, name=name), source=source, counts=RowCount(), rejects=rejects)
        yield from (text for text, _ in rows)


def train_tokenizer(texts: Iterable[str]) -> str:
    """tokenizer.json of a byte-level BPE with VOCAB_SIZE tokens, SPECIAL_TOKENS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=False))


def table(corpora: Iterable[Corpus]) -> str:
    """The corpora as aligned text."""
    rows = [f"{c.source:<12}{c.files:>7,}{c.documents:>12,}{c.megabytes:>10.2f}" for c in corpora]
    return "\n".join([f"{'source':<12}{'files':>7}{'documents':>12}{'MB text':>10}", *rows])


def _modules(root: Path) -> Iterator[Text]:
    """The source of every module below `root`, by path."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not SKIPPED_FILES.fullmatch(path.name):
            yield from _text_of(path, origin=relative.as_posix())


def _manual_topics() -> Iterator[Text]:
    """The language reference that `help("topic")` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Text(f"topics/{name}", topics[name].strip())


def _docstrings(modules: Iterable[Text]) -> Iterator[Text]:
    """A page a module: its docstring, and the signature and docstring of each documented class and function."""
    for origin, source in modules:
        tree = ast.parse(source)
        entries = [(origin.removesuffix(".py").replace("/", "."), ast.get_docstring(tree))]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                entries.append((f"{node.name}({ast.unparse(node.args)})", ast.get_docstring(node)))
            elif isinstance(node, ast.ClassDef):
                entries.append((f"class {node.name}", ast.get_docstring(node)))
        yield Text(f"docstrings/{origin}", _page(entries))


def _builtin_docstrings() -> Iterator[Text]:
    """The same for the modules written in C."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        members = [(member, getattr(module, member)) for member in sorted(vars(module)) if not member.startswith("__")]
        documented = [(member, value) for member, value in members if callable(value)]
        entries = [
            (name, module.__doc__),
            *((m + (getattr(v, "__text_signature__", "") or ""), v.__doc__) for m, v in documented),
        ]
        yield Text(f"docstrings/{name}", ADDRESS.sub("", _page(entries)))


def _page(entries: Iterable[tuple[str, Any]]) -> str:
    return "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in entries if isinstance(text, str) and text.strip())


def _python_prose() -> Iterator[Text]:
    for path in sorted(STANDARD_LIBRARY.rglob("*")):
        relative = path.relative_to(STANDARD_LIBRARY)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and _is_prose(path):
            yield from _text_of(path, origin=f"python/{relative.as_posix()}")


def _package_prose() -> Iterator[Text]:
    """Licences, readmes and the long description of each installed package; Phidias' own change with every commit."""
    packages = {
        package.name: package for package in importlib.metadata.distributions() if package.name not in (None, "phidias")
    }
    for name in sorted(packages):
        metadata = packages[name].read_text("METADATA") or packages[name].read_text("PKG-INFO") or ""
        yield Text(f"{name}/description", metadata.partition("\n\n")[2].strip())
        for file in sorted(packages[name].files or (), key=str):
            path = Path(str(file.locate()))
            if _is_prose(path):
                yield from _text_of(path, origin=f"{name}/{file}")


def _is_prose(path: Path) -> bool:
    return bool(PROSE_FILES.fullmatch(path.name)) and path.suffix.lower() in PROSE_SUFFIXES and path.is_file()


def _text_of(path: Path, *, origin: str) -> Iterator[Text]:
    """The file's text, or nothing where it is not UTF-8."""
    try:
        yield Text(origin, path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, FileNotFoundError):
        return


def _without_copies(texts: Iterable[Text]) -> list[Text]:
    """The first of equal documents, and none of a few words. Lone surrogates, which Python's strings may hold, are no text."""
    kept: dict[bytes, Text] = {}
    for text in texts:
        content = text.text.encode("utf-8", errors="replace")
        if len(text.text) >= SHORTEST_CHARACTERS:
            kept.setdefault(hashlib.sha256(content).digest(), Text(text.origin, content.decode()))
    return list(kept.values())


def _write_raw(raw: Path, *, corpora: dict[str, list[Text]]) -> None:
    work = raw.with_name(f"{raw.name}.partial")  # the same for every process: what a killed one left is removed
    shutil.rmtree(work, ignore_errors=True)
    for name, texts in corpora.items():
        (work / name).mkdir(parents=True)
        WRITERS[name](work / name, texts)
    (work / TABLE).write_text(json.dumps(_measure(work, corpora=corpora)), encoding="utf-8")
    work.rename(raw)


def _write_gz(folder: Path, texts: list[Text]) -> None:
    for index in range(CODE_FILES):
        with (folder / f"code_{index}.jsonl.gz").open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as stream:
            stream.write(_jsonl(texts[index::CODE_FILES]))


def _write_zst(folder: Path, texts: list[Text]) -> None:
    (folder / "reference.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=6).compress(_jsonl(texts)))


def _write_text(folder: Path, texts: list[Text]) -> None:
    for index, (origin, text) in enumerate(texts):
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", origin)[-80:]
        (folder / f"{index:04d}_{name}.txt").write_text(text, encoding="utf-8")


def _write_parquet(folder: Path, texts: list[Text]) -> None:
    columns = {"path": [origin for origin, _ in texts], "text": [text for _, text in texts]}
    pq.write_table(pa.table(columns), folder / "long.parquet", compression="zstd", row_group_size=32)


def _jsonl(texts: Iterable[Text]) -> bytes:
    return b"".join(json.dumps({"path": origin, "text": text}).encode() + b"\n" for origin, text in texts)


def _measure(work: Path, *, corpora: dict[str, list[Text]]) -> list[Corpus]:
    return [
        Corpus(name, len(list((work / name).iterdir())), len(texts), sum(len(text.encode()) for _, text in texts) / 1e6)
        for name, texts in corpora.items()
    ]


WRITERS: dict[str, Callable[[Path, list[Text]], None]] = {
    "code": _write_gz,
    "reference": _write_zst,
    "prose": _write_text,
    "long": _write_parquet,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
