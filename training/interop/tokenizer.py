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
# phi-4's class, by which llama.cpp tells its BPE from the Phi3s of SentencePiece; transformers takes a Phi3's tokenizer.json as
# it is, whatever the class.
PHI4_CLASS, ANY_CLASS = "GPT2Tokenizer", "PreTrainedTokenizerFast"
PROBE = "It's 12345 words:\n\n\treturn naïve_café(漢字)  # WE'LL see"


@dataclass(frozen=True)
class ExportedTokenizer:
    """The ids that config.json names, and the tokens they are. `chat_end`: the id of what ends a turn, None where the tokenizer
    has no chat tokens."""

    ids: TokenIds
    eod: str
    pad: str
    chat_end: int | None


def write_tokenizer(spec: TokenizerSpec, directory: Path, *, max_length: int, family: str | None) -> ExportedTokenizer:
    """Writes tokenizer.json and tokenizer_config.json. DataError where the run's tokenizer file is gone."""
    text = cl100k_json(spec) if spec.kind == "cl100k" else Path(spec.file or "").read_text(encoding="utf-8")
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    tokens = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    eod_id = build_tokenizer(spec).eod_id
    by_id = {number: token for token, number in tokens.items()}
    pad_id = PHI4_PAD if spec.kind == "cl100k" else tokens.get("<|pad|>", eod_id)
    chat_end = tokens[CHAT_TOKENS[-1]] if all(token in tokens for token in CHAT_TOKENS) else None
    exported = ExportedTokenizer(TokenIds(eod_id, eod_id, pad_id), spec.eod, by_id.get(pad_id, spec.eod), chat_end)
    is_gpt2s = family == "phi3" and json.loads(text)["model"].get("type") == "BPE"
    write_config(directory, exported, max_length=max_length, kind=PHI4_CLASS if is_gpt2s else ANY_CLASS)
    return exported


def write_config(directory: Path, exported: ExportedTokenizer, *, max_length: int, kind: str) -> None:
    fields: dict[str, Any] = {
        "tokenizer_class": kind,
        "bos_token": exported.eod,
        "eos_token": exported.eod,
        "pad_token": exported.pad,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if exported.chat_end is not None:
        fields["chat_template"] = CHAT_TEMPLATE
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


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a folder, as its tokenizer.json says: AutoTokenizer may take that of the model's family."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def is_misread(directory: Path) -> bool:
    """Whether transformers' AutoTokenizer makes other ids of text than the folder's tokenizer.json: of a Qwen2 it takes Qwen's
    own rules for words."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return bool(found(PROBE)["input_ids"] != load_tokenizer(directory)(PROBE)["input_ids"])
