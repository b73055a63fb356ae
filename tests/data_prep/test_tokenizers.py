"""Tokenizers: exact, offline, and text never becomes a special token."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_prep.errors import DataError
from data_prep.manifest import dtype_for
from data_prep.spec import TokenizerSpec
from data_prep.tokenizers import CL100K_PATTERN, CL100K_SPECIALS, Oracle, build_tokenizer, tokenizer_entry

EOD = "<|endoftext|>"
SPECIALS = [EOD, "<|im_start|>", "<|late|>", "<|fim_prefix|>", "<|endofprompt|>"]
HARD = [
    f"a literal {EOD} in text",
    "".join(SPECIALS),
    f" {EOD}\n\n{EOD}",
    "ünïcödé 🎉 中文 \u2028 \x00 \ufeff",
    "tabs\t\tand    spaces\r\n",
    "don't 12345 a_b",
]
RANKS = [
    Path(path)
    for path in (
        os.environ.get("PHIDIAS_CL100K", ""),
        Path(__file__).resolve().parents[3] / "shared" / "data" / "cl100k_base.tiktoken",
    )
    if path and Path(path).is_file()
]
needs_ranks = pytest.mark.skipif(not RANKS, reason="needs cl100k_base.tiktoken: set PHIDIAS_CL100K to its path")


def spec(*, file=None, ranks_file=None, kind="huggingface", eod=EOD):
    text = {"file": str(file) if file else None, "ranks_file": str(ranks_file) if ranks_file else None}
    return TokenizerSpec(kind=kind, eod=eod, **text)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS[:2],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to learn merges from, " * 20], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tokenizer.json with all that can get between text and its ids."""
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("    ", special=False), AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|late|>", special=True)])
    tokenizer.add_tokens([AddedToken("</tool>", special=False)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    eod = tokenizer.token_to_id(EOD)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, eod)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(file):
    return build_tokenizer(spec(file=file))


@pytest.fixture(scope="module")
def cl100k():
    return build_tokenizer(spec(kind="cl100k", ranks_file=RANKS[0]))


def encode(tokenizer, text):
    (ids,) = tokenizer.encode_documents([text])
    return ids


@pytest.mark.parametrize("text", HARD)
def test_special_tokens_in_text_are_text(bpe, file, text):
    specials = {entry["id"] for entry in json.loads(file.read_text())["added_tokens"] if entry["special"]}
    ids = encode(bpe, text)
    assert specials.isdisjoint(ids.tolist())
    assert bpe.decode(ids) == text


def test_other_added_tokens_keep_their_ids(bpe, file):
    original = Tokenizer.from_file(str(file))
    for token in ("    ", "<tool>", "</tool>"):
        assert encode(bpe, token).tolist() == [original.token_to_id(token)]
    assert bpe.eod_id == original.token_to_id(EOD) == 0
    assert bpe.vocab_size == max(original.get_vocab().values()) + 1


def test_nothing_is_added_cut_or_padded(bpe):
    text = "some text " * 500
    assert bpe.decode(encode(bpe, text)) == text
    assert [len(ids) for ids in bpe.encode_documents(["", "a", ""])] == [0, 1, 0]
    assert bpe.encode_documents([]) == []
    assert bpe.decode([0, 1]) == "<|endoftext|><|im_start|>"


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(bpe, text):
    assert bpe.decode(encode(bpe, text)) == text


def assert_batches_are_documents(tokenizer, texts):
    """One flat array of ids, in the dtype of the shards, and what the reference gives text by text."""
    encoded = tokenizer.encode_batch(texts)
    alone = [tokenizer.encode_reference(text) for text in texts]
    assert encoded.ids.dtype == dtype_for(tokenizer.vocab_size) and encoded.lengths.dtype == np.int64
    assert encoded.lengths.tolist() == [len(ids) for ids in alone]
    assert encoded.ids.tolist() == [token for ids in alone for token in ids.tolist()]
    for documents in (encoded.documents(), tokenizer.encode_documents(texts)):
        assert [ids.tolist() for ids in documents] == [ids.tolist() for ids in alone]


def test_a_batch_is_its_documents(bpe):
    assert_batches_are_documents(bpe, ["", *HARD, "", "a"])
    assert_batches_are_documents(bpe, [])
    assert_batches_are_documents(bpe, ["", ""])


def test_dtype_follows_the_vocabulary(bpe):
    assert encode(bpe, "text").dtype == np.uint16
    assert tokenizer_entry(bpe, kind="huggingface").vocab_size == bpe.vocab_size


def test_an_eod_not_marked_special_is_text_too(tmp_path):
    fields = json.loads(byte_level_bpe().to_str())
    for entry in fields["added_tokens"]:
        entry["special"] = False
    (tmp_path / "t.json").write_text(json.dumps(fields))
    tokenizer = build_tokenizer(spec(file=tmp_path / "t.json"))
    assert tokenizer.eod_id not in encode(tokenizer, HARD[0])


def test_a_model_that_spells_its_special_token_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({EOD: 0, "word": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOD])
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"turns the text '<\|endoftext\|>' into the special token 0"):
        build_tokenizer(spec(file=tmp_path / "t.json"))


def test_fingerprint_covers_kind_file_and_eod(bpe, file, tmp_path):
    same = tmp_path / "copy.json"
    same.write_bytes(file.read_bytes())
    assert build_tokenizer(spec(file=same)).fingerprint == bpe.fingerprint
    assert build_tokenizer(spec(file=same, eod="<|im_start|>")).fingerprint != bpe.fingerprint
    same.write_bytes(file.read_bytes() + b"\n")
    assert build_tokenizer(spec(file=same)).fingerprint != bpe.fingerprint


def test_unusable_files_are_named(file, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.file is not set"):
        build_tokenizer(spec())
    with pytest.raises(DataError, match=r"cannot read tokenizer\.file .*gone\.json: No such file"):
        build_tokenizer(spec(file=tmp_path / "gone.json"))
    with pytest.raises(DataError, match=r"has no token '<eos>'; documents end in one; correct tokenizer\.eod"):
        build_tokenizer(spec(file=file, eod="<eos>"))
    for content in ("not json", "{}", '{"added_tokens": []}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json"):
            build_tokenizer(spec(file=tmp_path / "bad.json"))
    with pytest.raises(DataError, match=r"tokenizer\.ranks_file is not set"):
        build_tokenizer(spec(kind="cl100k"))
    (tmp_path / "ranks").write_bytes(b"IQ== 0\n")
    with pytest.raises(DataError, match=r"ranks_file has sha256 .*; cl100k_base has 223921b7"):
        build_tokenizer(spec(kind="cl100k", ranks_file=tmp_path / "ranks"))


@needs_ranks
@pytest.mark.parametrize("text", HARD)
def test_cl100k_keeps_specials_as_text(cl100k, text):
    ids = encode(cl100k, text)
    assert ids.dtype == np.int32 and set(CL100K_SPECIALS.values()).isdisjoint(ids.tolist())
    assert cl100k.decode(ids) == text


@needs_ranks
def test_a_batch_of_cl100k_is_its_documents(cl100k):
    assert_batches_are_documents(cl100k, ["", *HARD, "\u088f", "", "a"])
    assert_batches_are_documents(cl100k, [])
    assert_batches_are_documents(cl100k, ["", ""])
    Oracle(cl100k, fraction=1.0, seed=1).check(HARD, cl100k.encode_batch(HARD))


@needs_ranks
def test_cl100k_is_cl100k(cl100k):
    assert (cl100k.vocab_size, cl100k.eod_id) == (100_277, 100_257)
    assert encode(cl100k, "hello world").tolist() == [15339, 1917]
    assert encode(cl100k, "  don't 12345\n\n").tolist() == [*encode(cl100k, "  don't 12345").tolist(), 271]
    assert cl100k.decode([100_257]) == EOD
    assert len(encode(cl100k, " " * 1_000_000)) < 10_000  # no stack overflow


@needs_ranks
def test_cl100k_knows_no_other_eod():
    with pytest.raises(DataError, match=r"tokenizer\.eod is '<eos>'; cl100k has <\|endoftext\|>"):
        build_tokenizer(spec(kind="cl100k", ranks_file=RANKS[0], eod="<eos>"))


def test_pattern_and_specials_are_tiktokens(monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    fields = public.cl100k_base()
    assert (fields["pat_str"], fields["special_tokens"]) == (CL100K_PATTERN, CL100K_SPECIALS)
