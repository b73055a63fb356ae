"""A Hugging Face folder that a stage starts from: what its headers say, and whether the run can go on from it.

Nothing but headers and JSON is read here, without torch: the ranks read the weights (training/interop/importing.py).
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.spec import TokenizerSpec
from data_prep.tokenizers import CL100K_SPECIALS
from launcher.config.errors import Problem
from launcher.config.schema import ModelConfig, RunConfig, StageConfig
from launcher.plan.foreign_rope import ANOTHER, START, check_rotary, rotary_of

CONFIG, INDEX, WHOLE, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
HEADER_BYTES = 100_000_000  # safetensors' own limit
# Bytes an element, by safetensors' names: those a model can be read from, and those of what is quantized or no weight at all.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
OTHERS = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
OTHERS |= {"I64": 8, "U64": 8}
SHOWN_NAMES = 3
PLAIN = re.compile(rb"[ !-~]+")


@dataclass(frozen=True)
class FamilyNames:
    """What a family calls its tensors inside a layer; the rest all of them call alike. `qkv` together are the rows of Q, K and
    V, `gate_up` those of gate and up, fused or not. `qkv_bias`: Q, K and V have a bias, and nothing else has."""

    architecture: str
    model_type: str
    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]
    qkv_bias: bool = False


APART = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
GATE_AND_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
FAMILY_NAMES = {
    "phi3": FamilyNames("Phi3ForCausalLM", "phi3", ("self_attn.qkv_proj.weight",), ("mlp.gate_up_proj.weight",)),
    "llama": FamilyNames("LlamaForCausalLM", "llama", APART, GATE_AND_UP),
    "qwen2": FamilyNames("Qwen2ForCausalLM", "qwen2", APART, GATE_AND_UP, qkv_bias=True),
}


@dataclass(frozen=True)
class Shape:
    """What config.json says of the model, under the names of the run's config."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layernorm_epsilon: float


# Hugging Face's names of that; a tuple of them where one left out means the next one's value.
KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads", "num_attention_heads"),
    "kv_channels": ("head_dim",),
    "ffn_hidden_size": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "layernorm_epsilon": ("rms_norm_eps",),
}


@dataclass(frozen=True)
class TensorAt:
    """Where the elements of a tensor lie: from byte `start` of a file on, row by row."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Folder:
    """What the headers of a folder say. `files`: sizes in bytes; `digest`: of config.json, all headers and sizes; `is_whole`:
    no file is missing or torn."""

    path: str
    config: dict[str, Any]
    tensors: dict[str, TensorAt]
    files: dict[str, int]
    digest: str
    is_whole: bool

    @property
    def family(self) -> FamilyNames | None:
        return FAMILY_NAMES.get(str(self.config.get("model_type")))

    def origin(self) -> dict[str, Any]:
        """What a run's events say of where it came from."""
        return {
            "model_type": self.config.get("model_type"), "files": len(self.files), "bytes": sum(self.files.values()),
            "digest": self.digest,
        }  # fmt: skip


def check_folder(stage: StageConfig, *, config: RunConfig) -> tuple[Folder, list[Problem]]:
    """The folder that a stage starts from, and everything that keeps it from being that."""
    folder, problems = read_folder(Path(str(stage.stage.folder)))
    if folder.config and folder.family is None:
        rule = f"families known are {', '.join(FAMILY_NAMES)}"
        problems.append(Problem(START, f"{folder.path} of model_type {folder.config.get('model_type')!r}", rule, ANOTHER))
    elif folder.family is not None:
        shape, wrong = read_shape(folder)
        problems += [*wrong, *check_family(folder), *check_rotary(folder.config, path=folder.path, settings=stage.stage)]
        problems += [*check_bias(folder, model=config.model), *check_dtypes(folder)]
        if shape is not None:
            problems += check_shape(folder, shape=shape, model=config.model)
            # What damaged files were to hold is not missing by name as well.
            problems += check_tensors(folder, family=folder.family, shape=shape) if folder.is_whole else ()
    if stage.optim.keep_moments:
        problems.append(Problem("optim.keep_moments", "true", f"{folder.path} has weights and no moments", "false"))
    return folder, [*problems, *check_tokenizer(folder, spec=config.tokenizer)]


# What lies in the folder.


def read_folder(path: Path) -> tuple[Folder, list[Problem]]:
    if not path.is_dir():
        fix = "the folder that holds config.json and its safetensors files"
        missing = "a path with nothing there" if not path.exists() else "a file"
        problem = Problem(START, f"{path}, {missing}", "a stage starts from a folder", fix)
        return Folder(str(path), {}, {}, {}, "", is_whole=False), [problem]
    config, problems = read_object(path / CONFIG)
    where, wrong = list_files(path)
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, TensorAt] = {}
    files: dict[str, int] = {}
    for name in sorted(set(where.values())) or [WHOLE] * (path / WHOLE).exists():
        held, files[name], head, damages = read_header(path / name)
        wrong += [*damages, *(torn(path / name, f"{key}, as in {tensors[key].file}") for key in held if key in tensors)]
        tensors |= held
        hasher.update(f"{name} {files[name]} {head}\n".encode())
    is_whole = not wrong
    lost = [key for key, name in where.items() if key not in tensors or tensors[key].file != name]
    if is_whole and lost:
        rule = "a file holds what the index names in it"
        wrong = [Problem(START, f"{path / INDEX} with {some(lost)}", rule, fetch(path))]
    return Folder(str(path), config, tensors, files, hasher.hexdigest(), is_whole), [*problems, *wrong]


def list_files(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """Files by the tensors that the index names; nothing where one file holds all, which transformers too looks for first."""
    rule = "weights are model.safetensors, or the files that its index names"
    if (path / WHOLE).exists():
        return {}, []
    if not (path / INDEX).exists():
        fix = "save it with transformers' save_pretrained" if list(path.glob("*.bin")) else fetch(path)
        return {}, [Problem(START, f"{path} without {WHOLE} or {INDEX}", rule, fix)]
    index, problems = read_object(path / INDEX)
    where = index.get("weight_map") if index else {}
    if not isinstance(where, dict) or not all(isinstance(name, str) and Path(name).name == name for name in where.values()):
        return {}, [Problem(START, f"{path / INDEX} whose weight_map is no list of files here", rule, fetch(path))]
    absent = [name for name in sorted(set(where.values())) if not (path / name).is_file()]
    if absent:
        problems.append(Problem(START, f"no {some(absent)} in {path}", f"{INDEX} names it", fetch(path)))
    return {key: name for key, name in where.items() if name not in absent}, problems


def read_header(path: Path) -> tuple[dict[str, TensorAt], int, str, list[Problem]]:
    """Tensors, size and the header's digest: 8 bytes of its length, JSON, then the elements without a gap."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                return {}, size, "", [torn(path, f"{size} bytes, with a header of {length}")]
            header = file.read(length)
        rows = {name: row for name, row in json.loads(header).items() if name != "__metadata__"}
        spans = {name: (int(row["data_offsets"][0]), int(row["data_offsets"][1])) for name, row in rows.items()}
        held = {
            name: TensorAt(path.name, str(row["dtype"]), tuple(int(n) for n in row["shape"]), 8 + length + spans[name][0])
            for name, row in rows.items()
        }
    except OSError as error:
        return {}, 0, "", [Problem(START, f"{path} ({error.strerror})", "the ranks read it", "make it readable")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}, 0, "", [torn(path, "a header that is not safetensors'")]
    problems, end = [], 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        item = {**FLOATS, **OTHERS}.get(held[name].dtype)
        if first != end or last < first or (item and last - first != math.prod(held[name].shape) * item):
            problems.append(torn(path, f"a header that puts {name} {list(held[name].shape)} at bytes {first} to {last}"))
            break
        end = last
    if not problems and end != size - 8 - length:
        problems.append(torn(path, f"{size - 8 - length} bytes of weights, where its header says {end}"))
    return held, size, hashlib.sha256(header).hexdigest(), problems


def torn(path: Path, found: str) -> Problem:
    return Problem(
        START, f"{path}: {found}", "a file is as long as its header says, and says each tensor once", fetch(path.parent)
    )


def fetch(path: Path) -> str:
    return f"fetch it again, or {ANOTHER} than {path.name}"


def read_object(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    try:
        value = json.loads(path.read_bytes())
        found = None if isinstance(value, dict) and value else "no object of JSON"
    except OSError as error:
        found = str(error.strerror)
    except ValueError:
        found = "no JSON"
    if found is None:
        return value, []
    return {}, [Problem(START, f"{path} ({found})", "it says what the folder holds", fetch(path.parent))]


# Whether it is the run's model.


def read_shape(folder: Folder) -> tuple[Shape | None, list[Problem]]:
    said = folder.config
    values: dict[str, Any] = {
        field: next((said[key] for key in keys if said.get(key) is not None), None) for field, keys in KEYS.items()
    }
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["kv_channels"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values["kv_channels"] = hidden // heads
    wrong = [
        KEYS[field][0]
        for field, value in values.items()
        if isinstance(value, bool) or not isinstance(value, float if field == "layernorm_epsilon" else int) or value <= 0
    ]
    if wrong:
        rule = "the shape of the model is known from it"
        return None, [
            Problem(START, f"{folder.path}/{CONFIG} without a number for {some(wrong)}", rule, fetch(Path(folder.path)))
        ]
    return Shape(**values, tied_embeddings=bool(said.get("tie_word_embeddings", False))), []


def check_family(folder: Folder) -> Iterator[Problem]:
    """A model that computes what the run's can."""
    said, rotary = folder.config, rotary_of(folder.config)
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": (said.get("hidden_act", "silu"), "silu"),
        "partial_rotary_factor": (rotary.get("partial_rotary_factor", said.get("partial_rotary_factor", 1.0)), 1.0),
        "quantization_config": (said.get("quantization_config"), None),
        "attention_bias": (bool(said.get("attention_bias", False)), False),
        "mlp_bias": (bool(said.get("mlp_bias", False)), False),
    }
    for key, (found, value) in wanted.items():
        if found != value:
            rule = f"stages start from models with {key}={json.dumps(value)}"
            yield Problem(START, f"{folder.path} with {key}={shortened(json.dumps(found))}", rule, ANOTHER)


def check_shape(folder: Folder, *, shape: Shape, model: ModelConfig) -> Iterator[Problem]:
    names = {field: keys[0] for field, keys in KEYS.items()} | {"tied_embeddings": "tie_word_embeddings"}
    for field in (row.name for row in fields(Shape)):
        ours, theirs = getattr(model, field), getattr(shape, field)
        rule = f"{folder.path} has {names[field]} {json.dumps(theirs)}"
        if field == "vocab_size":
            if theirs < ours:
                yield Problem(
                    f"model.{field}", str(ours), f"{rule}: tokens of the run would have no row", f"model.{field}={theirs}"
                )
            if theirs > model.padded_vocab_size:
                fix = f"model.padded_vocab_size={-(-theirs // 128) * 128}"
                yield Problem("model.padded_vocab_size", str(model.padded_vocab_size), f"{rule}: it must hold them", fix)
        elif ours != theirs:
            yield Problem(f"model.{field}", json.dumps(ours), rule, f"model.{field}={json.dumps(theirs)}")
    for field, value in {"activation": "swiglu", "normalization": "rmsnorm", "mlp_bias": False}.items():
        if getattr(model, field) != value:
            fix = f"model.{field}={value if isinstance(value, str) else json.dumps(value)}"
            yield Problem(f"model.{field}", str(getattr(model, field)).lower(), f"{folder.path} is of {fix}", fix)


def check_bias(folder: Folder, *, model: ModelConfig) -> Iterator[Problem]:
    if folder.family is not None and folder.family.qkv_bias != model.attention_bias:
        has = folder.family.qkv_bias
        fix = f"model.attention_bias={json.dumps(has)}" + (" with model.family=qwen2" if has else "")
        rule = f"family {folder.family.model_type} has {'a' if has else 'no'} bias on Q, K and V"
        yield Problem("model.attention_bias", json.dumps(model.attention_bias), rule, fix)


def expected_tensors(family: FamilyNames, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name in the folder."""
    hidden, ffn, size = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    heads, groups = shape.num_attention_heads * size, shape.num_query_groups * size
    qkv = dict(zip(family.qkv, split_rows((heads, groups, groups), parts=len(family.qkv)), strict=True))
    gate_up = dict(zip(family.gate_up, split_rows((ffn, ffn), parts=len(family.gate_up)), strict=True))
    layer: dict[str, tuple[int, ...]] = {name: (rows, hidden) for name, rows in (qkv | gate_up).items()}
    if family.qkv_bias:
        layer |= {bias_of(name): (rows,) for name, rows in qkv.items()}
    layer |= {"self_attn.o_proj.weight": (hidden, heads), "mlp.down_proj.weight": (hidden, ffn)}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    table = (shape.vocab_size, hidden)
    top = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    top |= {} if shape.tied_embeddings else {"lm_head.weight": table}
    return top | {f"model.layers.{i}.{name}": rows for i in range(shape.num_layers) for name, rows in layer.items()}


def split_rows(rows: tuple[int, ...], *, parts: int) -> tuple[int, ...]:
    """Each a tensor of its own, or all in one."""
    return rows if parts == len(rows) else (sum(rows),)


def bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def is_ignored(name: str, *, shape: Shape) -> bool:
    """What transformers leaves unread as well: a tied head that is written all the same, and tables of old Llamas."""
    return (shape.tied_embeddings and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def check_tensors(folder: Folder, *, family: FamilyNames, shape: Shape) -> Iterator[Problem]:
    expected, held = expected_tensors(family, shape), folder.tensors
    rule, fix = f"a {family.architecture} of its {CONFIG}'s shape has them", fetch(Path(folder.path))
    if missing := [name for name in expected if name not in held]:
        yield Problem(START, f"{folder.path} without {some(missing)}", rule, fix)
    if extra := [name for name in held if name not in expected and not is_ignored(name, shape=shape)]:
        yield Problem(START, f"{folder.path} with {some(extra)}", rule.replace("has them", "has no such tensor"), ANOTHER)
    wrong = {name: rows for name, rows in expected.items() if name in held and held[name].shape != rows}
    if wrong:
        found = [f"{name} {list(held[name].shape)}" for name in wrong]
        shapes = ", ".join(str(list(rows)) for rows in list(wrong.values())[:SHOWN_NAMES])
        yield Problem(START, f"{folder.path} with {some(found)}", f"its {CONFIG} makes that {shapes}", fix)


def check_dtypes(folder: Folder) -> Iterator[Problem]:
    other = [
        f"{name} ({at.dtype})"
        for name, at in folder.tensors.items()
        if at.dtype not in FLOATS and not name.endswith("inv_freq")
    ]
    if other:
        fix = "the folder from before it was quantized"
        yield Problem(START, f"{folder.path} with {some(other)}", f"weights are one of {', '.join(FLOATS)}", fix)


def check_tokenizer(folder: Folder, *, spec: TokenizerSpec) -> Iterator[Problem]:
    """Whether text becomes the ids that the weights know, as far as a tokenizer.json in the folder says."""
    theirs = tokens_of(Path(folder.path) / TOKENIZER)
    ours = tokens_of(Path(spec.file)) if spec.kind == "huggingface" and spec.file else None
    if theirs is None:
        return
    rule = "text must become the ids that the weights were trained on"
    if ours is not None and digest_of(ours) != digest_of(theirs):
        found = f"{spec.file}, another one than {folder.path}/{TOKENIZER} (digests {digest_of(ours)} and {digest_of(theirs)})"
        yield Problem("tokenizer.file", found, rule, f"tokenizer.file={folder.path}/{TOKENIZER}, and data made by it")
    if spec.kind == "cl100k" and (other := unlike_cl100k(theirs, spec=spec)):
        yield Problem("tokenizer.kind", f"cl100k, where {folder.path}/{TOKENIZER} has {other}", rule, ANOTHER)


def unlike_cl100k(tokens: Mapping[str, Any], *, spec: TokenizerSpec) -> str | None:
    """A token with another id than in cl100k: of the special ones and of those that both files spell alike, in ASCII."""
    try:
        ids = {row["content"]: row["id"] for row in tokens["added_tokens"]} | tokens["model"]["vocab"]
        lines = [line.split() for line in Path(str(spec.ranks_file)).read_bytes().splitlines() if line.strip()]
        wanted = {base64.b64decode(token): int(rank) for token, rank in lines}
    except OSError:
        return None  # the ranks file is looked for elsewhere
    except (TypeError, KeyError, ValueError):
        return "no tokens that can be told apart"
    alike = {text.decode().replace(" ", "\u0120"): number for text, number in wanted.items() if PLAIN.fullmatch(text)}
    specials = {spec.eod: CL100K_SPECIALS.get(spec.eod)}
    found = (f"{name!r} as {ids.get(name)}" for name, number in (specials | alike).items() if ids.get(name) != number)
    return next(found, None)


def tokens_of(path: Path) -> dict[str, Any] | None:
    """What makes ids of text, out of a tokenizer.json: not how rows are padded or cut."""
    try:
        said = json.loads(path.read_bytes())
        return {key: said.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    except (OSError, ValueError, AttributeError):
        return None


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
