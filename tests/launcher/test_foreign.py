"""What is wrong with a Hugging Face folder, by value: each on a folder made by hand, and all of it at once."""

import base64
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.spec import TokenizerSpec
from launcher.config.check import check_run
from launcher.config.check_mixture import check_replays
from launcher.config.compose import compose_run
from launcher.config.errors import ConfigError
from launcher.config.reading import replay_sample
from launcher.jobs.stages import refuse_headless
from launcher.plan.foreign import FAMILY_NAMES, Shape, check_folder, expected_tensors, read_folder
from launcher.rundir.paths import RunDir
from tests.training.tiny import MODEL, run_config, stage_config

SHAPE = Shape(
    num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, kv_channels=2, ffn_hidden_size=6, vocab_size=16,
    tied_embeddings=False, layernorm_epsilon=1e-5,
)  # fmt: skip
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<|endoftext|>"}]}
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
QKV = "model.layers.1.self_attn.qkv_proj.weight"
ONE = "stage=demo_pretrain"


def write_file(path, tensors, *, dtypes=None):
    """A safetensors file of zeros."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        dtype = (dtypes or {}).get(name, "BF16")
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_folder(folder, *, family="phi3", shape=SHAPE, files=2, edit=dict, dtypes=None, **said):
    """A folder of `files` files; `edit` changes the tensors, `said` config.json (None: a key left out)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(
        model_type=family, num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_query_groups,
        intermediate_size=shape.ffn_hidden_size, vocab_size=shape.vocab_size, rms_norm_eps=shape.layernorm_epsilon,
        tie_word_embeddings=shape.tied_embeddings, rope_theta=10000.0, rope_scaling=None, sliding_window=None,
    )  # fmt: skip
    config = {key: value for key, value in (config | said).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    tensors = edit(expected_tensors(FAMILY_NAMES.get(family, FAMILY_NAMES["llama"]), shape))
    if files == 1:
        write_file(folder / "model.safetensors", tensors, dtypes=dtypes)
        return folder
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    where = {tensor: names[index % files] for index, tensor in enumerate(tensors)}
    for name in names:
        write_file(folder / name, {key: shape for key, shape in tensors.items() if where[key] == name}, dtypes=dtypes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def config_for(folder, *, seq_length=32, rotary_base=10000, rope_scaling=None, **model):
    """A run of the folder's shape that starts from it."""
    fields = {key: value for key, value in vars(SHAPE).items() if key in MODEL} | dict(padded_vocab_size=16) | model
    rotary = {"rotary_base": rotary_base, "rope_scaling": rope_scaling}
    stage = stage_config(stage={"init_from": str(folder), "seq_length": seq_length, **rotary})
    config = run_config(folder.parent, stages=[stage], model=fields)
    Path(config.tokenizer.file).write_text(json.dumps({**TOKENIZER, "padding": {"strategy": "BatchLongest"}}))
    return config


def refusals(config):
    return [(problem.path, problem.found, str(problem)) for problem in check_folder(config.stages[0], config=config)[1]]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", ["phi3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sound_folder_passes(family, files, tied, tmp_path):
    folder = write_folder(tmp_path / "hf", family=family, files=files, shape=replace(SHAPE, tied_embeddings=tied))
    assert refusals(config_for(folder, family=family, tied_embeddings=tied)) == []
    assert refusals(config_for(folder, family="llama", tied_embeddings=tied)) == []  # what a run exports is its own affair


def test_what_transformers_leaves_unread_passes(tmp_path):
    tied, name = replace(SHAPE, tied_embeddings=True), "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_folder(tmp_path / "hf", shape=tied, edit=lambda held: held | {"lm_head.weight": (16, 8), name: (1,)})
    assert refusals(config_for(folder, tied_embeddings=True)) == []


def test_qwen2s_bias_is_the_models(tmp_path):
    folder = write_folder(tmp_path / "hf", family="qwen2", use_sliding_window=False, sliding_window=8)
    assert refusals(config_for(folder, family=None, attention_bias=True)) == []
    [(path, found, text)] = refusals(config_for(folder))
    assert (path, found) == ("model.attention_bias", "false") and "with model.family=qwen2" in text
    phi3 = write_folder(tmp_path / "phi3")
    [(path, found, text)] = refusals(config_for(phi3, family=None, attention_bias=True))
    assert (path, found) == ("model.attention_bias", "true") and text.endswith("Fix: model.attention_bias=false")


def test_the_base_is_raised_where_sequences_become_longer(tmp_path):
    folder = write_folder(tmp_path / "hf", max_position_embeddings=32)
    assert refusals(config_for(folder, seq_length=64, rotary_base=250000)) == []
    for words in ({"seq_length": 32, "rotary_base": 250000}, {"seq_length": 64, "rotary_base": 5000}):
        assert refusals(config_for(folder, **words))[0][0] == "stage.rotary_base"


def test_transformers_5_writes_rotary_in_one_object(tmp_path):
    rotary = {"rope_theta": 250000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    folder = write_folder(tmp_path / "hf", rope_theta=None, rope_parameters=rotary)
    assert refusals(config_for(folder, rotary_base=250000)) == []
    assert refusals(config_for(folder))[0][:2] == ("stage.rotary_base", "10000")


LINEAR = dict(rope_type="linear", factor=4.0, original_max_position_embeddings=32, beta_fast=None, beta_slow=None)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)
SHORT = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        (dict(rope_scaling=SHORT), YARN),  # the paper's betas
        (dict(rope_scaling=YARN | {"attention_factor": 1.138629436111989}), YARN),
        (dict(rope_scaling=YARN | {"original_max_position_embeddings": 7}, original_max_position_embeddings=32), YARN),
        (dict(rope_parameters=YARN | {"rope_theta": 10000.0}, rope_theta=None), YARN),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), LINEAR),
        (dict(max_position_embeddings=32), YARN),  # the stage lengthens it
        (dict(max_position_embeddings=32), LINEAR),
    ],
)
def test_scaled_angles_are_the_folders_or_the_stage_is_longer(said, ours, tmp_path):
    assert refusals(config_for(write_folder(tmp_path / "hf", **said), seq_length=128, rope_scaling=ours)) == []


@pytest.mark.parametrize(
    ("said", "ours", "path", "parts"),
    [
        (dict(rope_scaling=SHORT), None, "stage.rope_scaling", ["found null", '"factor": 4', "other angles"]),
        (dict(rope_scaling=SHORT), YARN | {"factor": 8.0}, "stage.rope_scaling", ['found {"rope_type": "yarn", "factor": 8.0']),
        (dict(rope_scaling=SHORT | {"beta_fast": 16}), YARN, "stage.rope_scaling", ['"beta_fast": 16']),
        (dict(rope_scaling=SHORT), LINEAR, "stage.rope_scaling", ['found {"rope_type": "linear"']),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), LINEAR, "stage.rope_scaling", ['"factor": 2.0']),
        (dict(max_position_embeddings=128), YARN, "stage.rope_scaling", ["outgrow max_position_embeddings (128)"]),
        ({}, YARN, "stage.rope_scaling", ["(None)", "Fix: stage.rope_scaling=null"]),
        (dict(max_position_embeddings=64), YARN, "stage.rope_scaling.original_max_position_embeddings", ["found 32", "=64"]),
        (dict(rope_scaling=SHORT | {"attention_factor": 1.0}), YARN, "stage.init_from", ["'attention_factor=1.0'"]),
        (dict(rope_scaling=SHORT | {"mscale": 1.0, "mscale_all_dim": 0.5}), YARN, "stage.init_from", ["'mscale=1.0'"]),
        (dict(rope_scaling=SHORT | {"truncate": False}), YARN, "stage.init_from", ["'truncate=false'"]),
        *(
            (dict(rope_scaling={"rope_type": kind, "factor": 4.0}), YARN, "stage.init_from", [f"rope_scaling '{kind}'"])
            for kind in ("llama3", "longrope", "dynamic", "made up")
        ),
    ],
)  # fmt: skip
def test_other_angles_are_refused(said, ours, path, parts, tmp_path):
    found = refusals(config_for(write_folder(tmp_path / "hf", **said), seq_length=128, rope_scaling=ours))
    assert [row[0] for row in found] == [path], found
    assert all(part in found[0][2] for part in parts), found[0][2]


def without(*names):
    return lambda held: {name: shape for name, shape in held.items() if name not in names}


# what config.json says or the folder holds, what the run says, the refusal's path, parts of it
OTHER = [
    (dict(family="gpt2"), {}, "stage.init_from", ["model_type 'gpt2'", "phi3, llama, qwen2"]),
    (dict(hidden_act="gelu"), {}, "stage.init_from", ['hidden_act="gelu"', 'hidden_act="silu"']),
    (dict(partial_rotary_factor=0.75), {}, "stage.init_from", ["partial_rotary_factor=0.75"]),
    (dict(quantization_config={"bits": 4}), {}, "stage.init_from", ['quantization_config={"bits": 4}']),
    (dict(attention_bias=True), {}, "stage.init_from", ["attention_bias=true"]),
    (dict(rope_scaling={"type": "longrope"}), {}, "stage.init_from", ["rope_scaling 'longrope'"]),
    (dict(rope_theta=250000.0), {}, "stage.rotary_base", ["found 10000", "rope_theta 250000.0", "stage.rotary_base=250000"]),
    (dict(sliding_window=31), {}, "stage.seq_length", ["found 32", "sliding_window=31", "stage.seq_length=31 or less"]),
    (dict(rms_norm_eps=1e-6), {}, "model.layernorm_epsilon", ["found 1e-05", "rms_norm_eps 1e-06", "=1e-06"]),
    ({}, dict(num_layers=4), "model.num_layers", ["found 4", "num_hidden_layers 2", "Fix: model.num_layers=2"]),
    ({}, dict(hidden_size=16), "model.hidden_size", ["found 16", "hidden_size 8"]),
    ({}, dict(num_attention_heads=2), "model.num_attention_heads", ["found 2", "num_attention_heads 4"]),
    ({}, dict(num_query_groups=4), "model.num_query_groups", ["found 4", "num_key_value_heads 2"]),
    ({}, dict(kv_channels=4), "model.kv_channels", ["found 4", "head_dim 2"]),
    ({}, dict(ffn_hidden_size=12), "model.ffn_hidden_size", ["found 12", "intermediate_size 6"]),
    ({}, dict(vocab_size=17, padded_vocab_size=18), "model.vocab_size", ["found 17", "vocab_size 16", "would have no row"]),
    ({}, dict(vocab_size=14, padded_vocab_size=15), "model.padded_vocab_size", ["found 15", "padded_vocab_size=128"]),
    ({}, dict(tied_embeddings=True), "model.tied_embeddings", ["found true", "tie_word_embeddings false"]),
    ({}, dict(activation="gelu", family=None), "model.activation", ["found gelu", "Fix: model.activation=swiglu"]),
    ({}, dict(normalization="layernorm", family=None), "model.normalization", ["Fix: model.normalization=rmsnorm"]),
    ({}, dict(mlp_bias=True, family=None), "model.mlp_bias", ["found true", "Fix: model.mlp_bias=false"]),
    (dict(edit=without(QKV)), {}, "stage.init_from", [f"without {QKV};", "a Phi3ForCausalLM"]),
    (dict(edit=lambda held: held | {"score.weight": (2, 8)}), {}, "stage.init_from", ["with score.weight;", "no such tensor"]),
    (dict(edit=lambda held: held | {QKV: (8, 16)}), {}, "stage.init_from", [f"with {QKV} [8, 16]", "makes that [16, 8]"]),
    (dict(dtypes={QKV: "F8_E4M3"}), {}, "stage.init_from", [f"with {QKV} (F8_E4M3)", "F64, F32, F16, BF16"]),
    (
        dict(hidden_size=None, rms_norm_eps="small"), {}, "stage.init_from",
        ["config.json without a number for hidden_size, head_dim, rms_norm_eps"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("said", "asked", "path", "parts"), OTHER)
def test_another_model_is_refused(said, asked, path, parts, tmp_path):
    found = refusals(config_for(write_folder(tmp_path / "hf", **said), **asked))
    assert [row[0] for row in found] == [path], found
    assert all(part in found[0][2] for part in parts), found[0][2]


def cut(path, change):
    path.write_bytes(change(path.read_bytes()))


SECOND = "model-00002-of-00002.safetensors"


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))


# what is done to a sound folder of two files, parts of the refusal
DAMAGES = [
    (lambda f: cut(f / SECOND, lambda b: b[:-3]), [f"{SECOND}: ", "bytes of weights, where its header says"]),
    (lambda f: cut(f / SECOND, lambda b: b + b"12"), ["bytes of weights, where its header says"]),
    (lambda f: cut(f / SECOND, lambda b: b[:40]), ["40 bytes, with a header of"]),
    (lambda f: cut(f / SECOND, lambda b: b""), ["0 bytes, with a header of 0"]),
    (lambda f: cut(f / SECOND, lambda b: (2**60).to_bytes(8, "little") + b[8:]), [f"with a header of {2**60}"]),
    (lambda f: cut(f / SECOND, lambda b: b[:8] + b"[" + b[9:]), ["a header that is not safetensors'"]),
    (lambda f: cut(f / SECOND, lambda b: b.replace(b'"shape": [16, 8]', b'"shape": [16, 9]', 1)), ["[16, 9] at bytes"]),
    (lambda f: (f / SECOND).unlink(), [f"no {SECOND} in", "index.json names it"]),
    (lambda f: cut(f / "model.safetensors.index.json", lambda b: b[:-1]), ["index.json (no JSON)"]),
    (lambda f: rewrite_index(f, lambda w: {}), ["without model.embed_tokens.weight", "and 12 more"]),
    (lambda f: write_file(f / "model.safetensors", {}), ["without model.embed_tokens.weight"]),
    (lambda f: rewrite_index(f, lambda w: w | {"elsewhere": SECOND}), ["index.json with elsewhere;"]),
    (lambda f: rewrite_index(f, lambda w: w | {"model.norm.weight": "../x"}), ["no list of files here"]),
    (lambda f: [path.unlink() for path in f.glob("model*")], ["without model.safetensors or model.safetensors.index.json"]),
    (lambda f: (f / "config.json").unlink(), ["config.json (No such file or directory)"]),
    (lambda f: cut(f / "config.json", lambda b: b[:20]), ["config.json (no JSON)"]),
    (lambda f: write_file(f / SECOND, {"model.embed_tokens.weight": (16, 8)}), ["embed_tokens.weight, as in model-00001"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "parts"), DAMAGES)
def test_a_torn_folder_is_refused(damage, parts, tmp_path):
    folder = write_folder(tmp_path / "hf")
    config = config_for(folder)
    damage(folder)
    found = refusals(config)
    assert [row[0] for row in found] == ["stage.init_from"], found
    assert all(part in found[0][2] for part in parts), found[0][2]


def test_a_folder_that_is_none_is_refused(tmp_path):
    config = config_for(tmp_path / "hf")
    assert "a path with nothing there" in refusals(config)[0][1]
    (tmp_path / "hf").write_text("")
    assert refusals(config)[0][1].endswith("/hf, a file")


def test_another_tokenizer_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf")
    config = config_for(folder)
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": {"vocab": {"b": 0, "a": 1}}}))
    [(path, found, text)] = refusals(config)
    assert path == "tokenizer.file" and "another one than" in found and f"tokenizer.file={folder}/tokenizer.json" in text
    (folder / "tokenizer.json").unlink()  # nothing to compare with
    assert refusals(config) == []


def test_cl100k_is_compared_token_by_token(tmp_path):
    folder = write_folder(tmp_path / "hf")
    texts = {b"a": 0, b" b": 1, b"\xff": 2}
    (tmp_path / "ranks").write_text("".join(f"{base64.b64encode(text).decode()} {n}\n" for text, n in texts.items()))
    spec = TokenizerSpec(kind="cl100k", ranks_file=str(tmp_path / "ranks"), file=None, eod="<|endoftext|>")
    config = replace(config_for(folder), tokenizer=spec)

    def found(vocab, eod):
        added = [{"id": eod, "content": "<|endoftext|>"}]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
        return [row[1] for row in refusals(config)]

    where = f"cl100k, where {folder}/tokenizer.json has"
    assert found({"a": 0, "Ġb": 1}, 100257) == []
    assert found({"a": 0, "Ġb": 1}, 3) == [f"{where} '<|endoftext|>' as 3"]
    assert found({"a": 0, "Ġb": 2}, 100257) == [f"{where} 'Ġb' as 2"]
    assert found({"Ġb": 1}, 100257) == [f"{where} 'a' as None"]


def test_everything_is_reported_before_the_run_is_touched(tmp_path):
    folder = write_folder(tmp_path / "hf", edit=without(QKV), rope_theta=5e5, hidden_act="gelu")
    config = config_for(folder, ffn_hidden_size=12)
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    with pytest.raises(ConfigError) as caught:
        refuse_headless(run, config)
    paths = sorted(problem.path for problem in caught.value.problems)
    assert paths == ["model.ffn_hidden_size", "stage.init_from", "stage.init_from", "stage.rotary_base"]
    assert not run.root.exists()


def test_a_folder_has_no_moments(tmp_path):
    config = config_for(write_folder(tmp_path / "hf"))
    keeping = replace(config.stages[0], optim=replace(config.stages[0].optim, keep_moments=True))
    [(path, found, text)] = refusals(replace(config, stages=(keeping,)))
    assert (path, found) == ("optim.keep_moments", "true") and "has weights and no moments" in text
    check_run(compose_run([ONE, "stage.init_from=/data/phi-4", "optim.keep_moments=true"]))  # it may be another run


def test_a_stage_that_has_begun_needs_its_folder_no_more(tmp_path, monkeypatch):
    config = config_for(tmp_path / "gone")
    run = RunDir(Path(config.run.runs_dir) / config.run.name)
    with pytest.raises(ConfigError, match="nothing there"):
        refuse_headless(run, config)
    monkeypatch.setattr("launcher.jobs.stages.newest_checkpoint", lambda *_, **__: (object(), []))
    refuse_headless(run, config)


def test_the_origin_is_told_apart_by_headers_and_sizes(tmp_path):
    first, second = (write_folder(tmp_path / name) for name in "ab")
    header = write_folder(tmp_path / "c", edit=lambda held: held | {QKV: (8, 16)})  # as many bytes
    fields = write_folder(tmp_path / "d", rope_theta=5e5)
    digests = [read_folder(folder)[0].origin()["digest"] for folder in (first, second, header, fields)]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert read_folder(first)[0].origin()["bytes"] == sum(path.stat().st_size for path in first.glob("*.safetensors"))


@pytest.mark.parametrize("said", ["hf/phi-4", "~/phi-4", "./phi-4", "~", ".."])
def test_a_path_is_absolute(said):
    with pytest.raises(ConfigError) as caught:
        compose_run([ONE, f"stage.init_from='{said}'"])
    [problem] = caught.value.problems
    assert problem.path == "stage.init_from" and problem.found == repr(said)
    assert problem.fix == f"stage.init_from={Path(said).expanduser().resolve()}"


def test_a_folder_is_no_stage():
    config = compose_run([ONE, "stage.init_from=/data/phi-4"])
    settings = config.stages[0].stage
    assert (settings.folder, settings.parent) == ("/data/phi-4", None)
    with pytest.raises(ConfigError, match="it starts from none"):
        compose_run([ONE, "stage.init_from=/data/phi-4", "stage.replay_from_tokens=1e5"])
    changed = replace(config, stages=(replace(config.stages[0], stage=replace(settings, replay_from_tokens=1e5)),))
    assert replay_sample(changed.stages[0], config=changed) is None and len(list(check_replays(changed))) == 1
    named = compose_run(["run=demo"]).stages[1].stage
    assert (named.folder, named.parent) == (None, "demo_pretrain")
    check_run(config)
