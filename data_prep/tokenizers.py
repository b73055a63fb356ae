"""Text to token ids, offline: tiktoken's cl100k_base from its ranks file, or a Hugging Face tokenizer.json.

No special token ever comes out of text: a document that says `<|endoftext|>` is a document about tokenizers. cl100k's ids are
tiktoken's, whichever engine makes them; `Oracle` checks that on a sample of what is tokenized.
"""

import base64
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.indexed import Ids, IdsType
from data_prep.manifest import TokenizerEntry, dtype_for
from data_prep.spec import TokenizerSpec
from data_prep.unicode_differences import VERSIONS, utf8_if_alike

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
CL100K_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# tiktoken 0.14's pattern; its possessive quantifiers keep a megabyte of spaces from overflowing the stack.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


MEMORY_BYTES = 480 << 20  # of a process, above which gigatoken's cache is dropped; building it anew takes 0.1 s
REST_BYTES = 32 << 20  # of text between two builds, where the rest of the process is what takes the memory


class Encoded(NamedTuple):
    """Token ids of texts: `ids` [tokens], end to end, in the dtype of the shards, without EOD; `lengths` [texts], in tokens.
    `utf8` [texts] is there where the tokenizer had to make it, so that nobody makes it again."""

    ids: Ids
    lengths: NDArray[np.int64]
    utf8: list[bytes] | None = None

    def documents(self) -> list[Ids]:
        """The ids of each text: views."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.ids[start:end] for start, end in itertools.pairwise([0, *ends])]


def joined(documents: Sequence[Ids], *, dtype: IdsType) -> Encoded:
    return Encoded(
        np.concatenate([np.empty(0, dtype=dtype), *documents]), np.array([len(ids) for ids in documents], dtype=np.int64)
    )


class TextTokenizer(Protocol):
    """`fingerprint` is equal where equal text gets equal ids and documents the same EOD."""

    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The ids of `texts`. No id of a special token among them."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """The ids [tokens] of each text, in the dtype of the shards, without EOD."""
        return self.encode_batch(texts).documents()

    def encode_reference(self, text: str) -> Ids:
        """What `encode_batch` must give for `text`, by the reference implementation alone: for checks, slow."""
        ...

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        ...


def build_tokenizer(spec: TokenizerSpec) -> TextTokenizer:
    """The tokenizer of the config. DataError: its file is missing or another, or it has no such EOD token."""
    if spec.kind == "cl100k":
        return Cl100k(_read(spec.ranks_file, field="ranks_file", fix=f"download {CL100K_URL}"), eod=spec.eod)
    content = _read(spec.file, field="file", fix="copy the model's tokenizer.json")
    return HuggingFace(content, file=str(spec.file), eod=spec.eod)


def tokenizer_entry(tokenizer: TextTokenizer, *, kind: str) -> TokenizerEntry:
    """What the manifest says of it."""
    return TokenizerEntry(
        kind=kind, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id
    )


class Cl100k(TextTokenizer):
    """tiktoken's cl100k_base, from `ranks`: the content of cl100k_base.tiktoken."""

    def __init__(self, ranks: bytes, *, eod: str):
        found = hashlib.sha256(ranks).hexdigest()
        if found != CL100K_SHA256:
            raise DataError(
                f"tokenizer.ranks_file has sha256 {found}; cl100k_base has {CL100K_SHA256}; download {CL100K_URL} again"
            )
        if eod not in CL100K_SPECIALS:
            raise DataError(f"tokenizer.eod is '{eod}'; cl100k has {', '.join(CL100K_SPECIALS)}; choose one of them")
        self._bpe = ExactBpe(ranks, specials=CL100K_SPECIALS)
        self.vocab_size = self._bpe.vocab_size
        self.eod_id = CL100K_SPECIALS[eod]
        self.fingerprint = _fingerprint("cl100k", ranks, eod=eod)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        return self._bpe.encode(texts)

    def encode_reference(self, text: str) -> Ids:
        return self._bpe.reference(text)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self._bpe.decode(ids)


class ExactBpe:
    """Byte-level BPE over cl100k's pattern, with any `ranks` (the content of a .tiktoken file): tiktoken's ids at the speed of
    gigatoken, which gets every text that it is known to treat as tiktoken does. One thread: processes are the parallelism."""

    def __init__(self, ranks: bytes, *, specials: Mapping[str, int], memory_bytes: int = MEMORY_BYTES):
        import tiktoken

        self._tiktoken = tiktoken.Encoding(
            "cl100k_base", pat_str=CL100K_PATTERN, mergeable_ranks=_parse_ranks(ranks), special_tokens=dict(specials)
        )
        self.vocab_size: int = self._tiktoken.n_vocab
        self._dtype = np.dtype(dtype_for(self.vocab_size))
        self._gigatoken = _Gigatoken(ranks, dtype=self._dtype, memory_bytes=memory_bytes) if _has_known_versions() else None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of `texts`, special tokens spelled out in them as text. DataError: gigatoken lost a text."""
        if not self._gigatoken:
            return self._joined([self.reference(text) for text in texts])
        data = [utf8_if_alike(text) for text in texts]
        alike = [text for text in data if text is not None]
        encoded = self._gigatoken.encode(alike)
        if len(alike) == len(data):
            return encoded._replace(utf8=alike)
        ids = iter(encoded.documents())
        return self._joined(
            [self.reference(text) if utf8 is None else next(ids) for text, utf8 in zip(texts, data, strict=True)]
        )

    def reference(self, text: str) -> Ids:
        """tiktoken's ids of `text`."""
        return np.array(self._tiktoken.encode_ordinary(text), dtype=self._dtype)

    def gigatoken_alone(self, text: str) -> Ids:
        """gigatoken's ids of `text`, right or wrong. DataError: these versions have no RANGES, so it is not in use."""
        if not self._gigatoken:
            raise DataError(f"gigatoken is not in use; it is with {VERSIONS}; to derive RANGES for others, set VERSIONS first")
        return self._gigatoken.encode([text.encode()]).ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._tiktoken.decode([int(token) for token in ids]))

    def _joined(self, documents: list[Ids]) -> Encoded:
        return joined(documents, dtype=self._dtype)


class _Gigatoken:
    """gigatoken, on this thread. It keeps the ids of every new word and forgets none, so it is dropped and built again once the
    process is larger than `memory_bytes`. What it keeps changes no id."""

    def __init__(self, ranks: bytes, *, dtype: IdsType, memory_bytes: int):
        self._ranks, self._dtype, self._memory_bytes = ranks, dtype, memory_bytes
        self._build()

    def encode(self, texts: list[bytes]) -> Encoded:
        """The ids of texts in UTF-8."""
        if self.encoded_bytes > REST_BYTES and _resident_bytes() > self._memory_bytes:
            self._build()
        self.encoded_bytes += sum(map(len, texts))
        rows = self._engine.encode_batch(texts, parallel=False).layout
        lengths = np.diff(rows.offsets.data)
        if len(lengths) != len(texts):
            raise DataError(
                f"gigatoken made {len(lengths):,} documents of {len(texts):,} texts; each text is one; "
                "uninstall gigatoken (tiktoken alone is slower, and exact), and report this"
            )
        return Encoded(rows.content.data.astype(self._dtype, copy=False), lengths)

    def _build(self) -> None:
        import gigatoken

        self._engine: Any = None  # before there is another: two caches at once would be the peak
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:  # it reads ranks from a path only
            file.write(self._ranks)
            file.flush()
            self._engine = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="cl100k", special_tokens={})
        self.encoded_bytes = 0  # since then


def _resident_bytes() -> int:
    """Memory of this process. 0 where the system does not say (not Linux): the cache is then unbounded."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def _has_known_versions() -> bool:
    """Whether what differs between the two packages as installed is known. Warns where not."""
    found = {name: _version(name) for name in VERSIONS}
    if found != VERSIONS:
        warnings.warn(
            f"cl100k runs on tiktoken alone, exact and ten times slower: found {found}; what differs is known of {VERSIONS}; "
            "install these, or derive it again with `python -m data_prep.unicode_differences`",
            stacklevel=4,
        )
    return found == VERSIONS


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class HuggingFace(TextTokenizer):
    """A tokenizer.json. Padding, truncation and the tokens a chat template would add are off; normalisation is the file's."""

    def __init__(self, content: bytes, *, file: str, eod: str):
        import tokenizers

        try:
            fields = _with_special(json.loads(content), token=eod)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"tokenizer.file {file} is not a tokenizer.json ({error}); the rule is a Hugging Face fast tokenizer; "
                "copy the file from the model, or save it with save_pretrained"
            ) from error
        eod_id = self._tokenizer.token_to_id(eod)
        if eod_id is None:
            raise DataError(f"tokenizer.file {file} has no token '{eod}'; documents end in one; correct tokenizer.eod")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # special tokens in text are encoded as text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
        self.eod_id = int(eod_id)
        self.fingerprint = _fingerprint("huggingface", content, eod=eod)
        self._dtype = np.dtype(dtype_for(self.vocab_size))
        self._check_specials(fields, file=file, eod=eod)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return joined([np.array(encoding.ids, dtype=self._dtype) for encoding in encodings], dtype=self._dtype)

    def encode_reference(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=self._dtype)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    def _check_specials(self, fields: dict[str, Any], *, file: str, eod: str) -> None:
        """A model that holds whole words (WordLevel, or BPE with ignore_merges) can still spell a special token."""
        specials = {token["content"]: token["id"] for token in fields["added_tokens"] if token["special"]} | {eod: self.eod_id}
        for text, ids in zip(specials, self.encode_documents(list(specials)), strict=True):
            found = sorted(set(ids.tolist()) & set(specials.values()))
            if found:
                raise DataError(
                    f"tokenizer.file {file} turns the text '{text}' into the special token {found[0]}; text must never become "
                    "one; split it in the pre-tokenizer, or take it out of the model's vocabulary"
                )


class Oracle:
    """Tokenizes some documents a second time, with the reference, and compares. A document is in the sample by its content and
    `seed`, wherever it stands: a second run checks the same ones. Costs `fraction` of the reference's time."""

    def __init__(self, tokenizer: TextTokenizer, *, fraction: float, seed: int):
        self._tokenizer = tokenizer
        self._below = int(fraction * 2**64)
        # A key of its own: with `seed` itself the sample would be the documents that are held out.
        self._key = xxhash.xxh3_64_intdigest(f"oracle\0{seed}".encode())

    def samples(self, text: str) -> bool:
        return self._below > 0 and self._hash(text) < self._below

    def check(self, texts: Sequence[str], encoded: Encoded, *, places: Sequence[object] = ()) -> None:
        """DataError: a sampled text has other ids than the reference gives it, or there is not one length a text.

        `places` [texts] say in the error where a text is from; the order in the batch does where they are left out."""
        counted = int(encoded.lengths.sum())
        if len(encoded.lengths) != len(texts) or counted != len(encoded.ids):
            raise DataError(
                f"{len(texts):,} texts came out as {len(encoded.lengths):,} lengths that count {counted:,} ids, with "
                f"{len(encoded.ids):,} ids; every text has one length and every id is counted; this is a fault of data_prep: "
                "report it, with the inputs"
            )
        for index, (text, found) in enumerate(zip(texts, encoded.documents(), strict=True)):
            if self.samples(text):
                self._compare(text, found=found, place=places[index] if places else f"document {index} of the batch")

    def _compare(self, text: str, *, found: Ids, place: object) -> None:
        wanted = self._tokenizer.encode_reference(text)
        if np.array_equal(found, wanted):
            return
        both = min(len(found), len(wanted))
        first = int(np.argmax(np.append(found[:both] != wanted[:both], True)))  # where one ends is a difference, too
        start = len(self._tokenizer.decode(wanted[:first]))
        raise DataError(
            f"{place}: token {first:,} of document {self._hash(text):016x} is {_token(found, first)}, and "
            f"{_token(wanted, first)} in the reference, near character {start:,}: {text[max(0, start - 20) : start + 20]!r}; "
            "ids are the reference's, or the model reads another language; if the tokenizer is cl100k, uninstall "
            "gigatoken (tiktoken alone is slower, and exact), and report the text"
        )

    def _hash(self, text: str) -> int:
        return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), seed=self._key)


def _token(ids: Ids, position: int) -> str:
    return str(ids[position]) if position < len(ids) else "missing"


def _read(file: str | None, *, field: str, fix: str) -> bytes:
    if file is None:
        raise DataError(
            f"tokenizer.{field} is not set; this kind of tokenizer is read from it; {fix} and set tokenizer.{field}"
        )
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read tokenizer.{field} {file}: {error.strerror}; {fix} and set tokenizer.{field}") from error


def _parse_ranks(ranks: bytes) -> dict[bytes, int]:
    """Lines of base64 token and rank."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in ranks.splitlines())}


def _with_special(fields: dict[str, Any], *, token: str) -> dict[str, Any]:
    """Marks `token` special, whatever the file says, so that it is text in text; every id stays as it is."""
    added = [{**entry, "special": entry["special"] or entry["content"] == token} for entry in fields["added_tokens"]]
    return {**fields, "added_tokens": added}


def _fingerprint(kind: str, content: bytes, *, eod: str) -> str:
    """sha256 over kind, eod and file, each closed by a byte that is in neither name."""
    return hashlib.sha256(b"\0".join([kind.encode(), eod.encode(), content])).hexdigest()
