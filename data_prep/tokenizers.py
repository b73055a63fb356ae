"""Text to token ids, offline: tiktoken's cl100k_base from its ranks file, or a Hugging Face tokenizer.json.

No special token ever comes out of text: a document that says `<|endoftext|>` is a document about tokenizers.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import Ids
from data_prep.manifest import TokenizerEntry, dtype_for
from data_prep.spec import TokenizerSpec

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


class TextTokenizer(Protocol):
    """`fingerprint` is equal where equal text gets equal ids and documents the same EOD."""

    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """The ids [tokens] of each text, in the dtype of the shards, without EOD. No id of a special token among them."""
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


class Cl100k:
    """tiktoken's cl100k_base, from `ranks`: the content of cl100k_base.tiktoken."""

    def __init__(self, ranks: bytes, *, eod: str):
        import tiktoken

        found = hashlib.sha256(ranks).hexdigest()
        if found != CL100K_SHA256:
            raise DataError(
                f"tokenizer.ranks_file has sha256 {found}; cl100k_base has {CL100K_SHA256}; download {CL100K_URL} again"
            )
        if eod not in CL100K_SPECIALS:
            raise DataError(f"tokenizer.eod is '{eod}'; cl100k has {', '.join(CL100K_SPECIALS)}; choose one of them")
        self._encoding = tiktoken.Encoding(
            "cl100k_base", pat_str=CL100K_PATTERN, mergeable_ranks=_parse_ranks(ranks), special_tokens=CL100K_SPECIALS
        )
        self.vocab_size: int = self._encoding.n_vocab
        self.eod_id = CL100K_SPECIALS[eod]
        self.fingerprint = _fingerprint("cl100k", ranks, eod=eod)
        self._dtype = np.dtype(dtype_for(self.vocab_size))

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._encoding.encode_ordinary(text), dtype=self._dtype) for text in texts]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return str(self._encoding.decode([int(token) for token in ids]))


class HuggingFace:
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

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]

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
