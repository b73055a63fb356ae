"""The tokenizer of an exported folder: the run's own, with phi-4's chat template where it has the chat tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.spec import TokenizerSpec
from data_prep.tokenizers import CL100K_PATTERN, CL100K_SPECIALS, build_tokenizer
from training.interop.families import TokenIds

# phi-4's ids above cl100k's ranks (config.json and tokenizer of the release); holes are filled with dummies, because
# tokenizer.json numbers added tokens without gaps.
PHI4_SPECIALS = {**CL100K_SPECIALS, "<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266}
CL100K_RANKS, PHI4_VOCAB, PHI4_PAD = 100256, 100352, 100349
CHAT_TOKENS = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """The ids that config.json names, and the tokens they are."""

    ids: TokenIds
    eod: str
    pad: str


def write_tokenizer(spec: TokenizerSpec, directory: Path, *, max_length: int) -> ExportedTokenizer:
    """Writes tokenizer.json and tokenizer_config.json. DataError where the run's tokenizer file is gone."""
    text = cl100k_json(spec) if spec.kind == "cl100k" else Path(spec.file or "").read_text(encoding="utf-8")
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    tokens = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    eod_id = build_tokenizer(spec).eod_id
    by_id = {number: token for token, number in tokens.items()}
    pad_id = PHI4_PAD if spec.kind == "cl100k" else tokens.get("<|pad|>", eod_id)
    exported = ExportedTokenizer(TokenIds(bos=eod_id, eos=eod_id, pad=pad_id), spec.eod, by_id.get(pad_id, spec.eod))
    has_chat = all(token in tokens for token in CHAT_TOKENS)
    write_config(directory, exported, max_length=max_length, chat_template=CHAT_TEMPLATE if has_chat else None)
    return exported


def write_config(directory: Path, exported: ExportedTokenizer, *, max_length: int, chat_template: str | None) -> None:
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": exported.eod,
        "eos_token": exported.eod,
        "pad_token": exported.pad,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        fields["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def cl100k_json(spec: TokenizerSpec) -> str:
    """tiktoken's cl100k ranks as a tokenizer.json with phi-4's special tokens at their ids."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    build_tokenizer(spec)  # refuses a ranks file that is missing or another
    names = {number: token for token, number in PHI4_SPECIALS.items()}
    holes = iter(range(PHI4_VOCAB))
    specials = [names.get(number) or f"<|dummy_{next(holes)}|>" for number in range(CL100K_RANKS, PHI4_VOCAB)]
    converter = TikTokenConverter(str(spec.ranks_file), pattern=CL100K_PATTERN, extra_special_tokens=specials)
    tokenizer = converter.converted()
    for token, number in PHI4_SPECIALS.items():
        if tokenizer.token_to_id(token) != number:
            raise DataError(f"{token} came out as {tokenizer.token_to_id(token)}, phi-4 has it at {number}")
    return str(tokenizer.to_str())
