"""Export on its own: fused tensors taken apart, two families that compute the same, shards, and cl100k as a tokenizer.json.
(tests/endtoend compares logits with Megatron's.)"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from data_prep.spec import TokenizerSpec
from data_prep.tokenizers import build_tokenizer
from launcher.config.schema import ModelConfig, StageSettings
from tests.training.tiny import MODEL, STAGE
from training.interop import export
from training.interop.families import TokenIds, hf_config, split_qkv
from training.interop.tokenizer import PHI4_PAD, PHI4_SPECIALS, write_tokenizer
from training.interop.weights import LAYERS

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = Path(os.environ.get("PHIDIAS_CL100K", REPOSITORY.parent / "shared" / "data" / "cl100k_base.tiktoken"))
STAGE_SETTINGS = TypeAdapter(StageSettings).validate_python(STAGE)


def model_config(**changes: Any) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python({**MODEL, **changes})


class RandomWeights:
    """Stacked tensors as a checkpoint holds them."""

    def __init__(self, model: ModelConfig):
        draw = torch.Generator().manual_seed(3)
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        heads = model.num_attention_heads * model.kv_channels
        fused = heads + 2 * model.num_query_groups * model.kv_channels
        shapes = {
            "self_attention.linear_qkv.layer_norm_weight": (hidden,),
            "self_attention.linear_qkv.weight": (fused, hidden),
            "self_attention.linear_proj.weight": (hidden, heads),
            "mlp.linear_fc1.layer_norm_weight": (hidden,),
            "mlp.linear_fc1.weight": (2 * ffn, hidden),
            "mlp.linear_fc2.weight": (hidden, ffn),
        } | ({"self_attention.linear_qkv.bias": (fused,)} if model.attention_bias else {})
        self.layers = {
            name: 0.2 * torch.randn(model.num_layers, *shape, generator=draw) + name.endswith("norm_weight")
            for name, shape in shapes.items()
        }
        table = (model.padded_vocab_size, hidden)
        self.tensors = {
            "embedding.word_embeddings.weight": torch.randn(table, generator=draw),
            "output_layer.weight": torch.randn(table, generator=draw),
            "decoder.final_layernorm.weight": torch.ones(hidden),
        }

    @property
    def layer_names(self) -> list[str]:
        return list(self.layers)

    def blank(self, name: str, *, layer: int | None = None) -> torch.Tensor:
        return self.read(name, layer=layer).to("meta")

    def read(self, name: str, *, layer: int | None = None) -> torch.Tensor:
        return self.tensors[name] if layer is None else self.layers[name.removeprefix(LAYERS)][layer]


def write_folder(folder: Path, model: ModelConfig) -> Path:
    folder.mkdir()
    _, dtype = export.write_weights(RandomWeights(model), folder, model=model)
    fields = hf_config(model, stage=STAGE_SETTINGS, ids=TokenIds(1, 1, 2), dtype=str(dtype).removeprefix("torch."))
    export.write_json_file(folder / "config.json", fields)
    return folder


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens).logits
    return result


FAMILY_CHANGES: dict[str, dict[str, Any]] = {"phi3": {}, "llama": {}, "qwen2": {"attention_bias": True}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_names_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    """Which vLLM and ms-swift read; phi3 with its fused qkv_proj and gate_up_proj."""
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / family, model_config(family=family, tied_embeddings=tied, **FAMILY_CHANGES[family]))
    made = AutoModelForCausalLM.from_pretrained(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items() if not (tied and "lm_head" in name)}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()} == wanted
    assert {"phi3": "qkv_proj", "llama": "q_proj", "qwen2": "q_proj"}[family] in " ".join(wanted)


@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_names_are_those_that_llama_cpp_maps(family: str) -> None:
    """Its converter takes names apart by this table, layer by layer."""
    gguf = pytest.importorskip("gguf", reason="gguf has llama.cpp's table of names")
    architecture = getattr(gguf.MODEL_ARCH, family.upper())
    table = gguf.get_tensor_name_map(architecture, 4)
    model = model_config(family=family, **FAMILY_CHANGES[family])
    for name, _ in export.hf_tensors(RandomWeights(model), model=model, blank=True):
        assert table.get_type(name, try_suffixes=(".weight", ".bias")) in gguf.MODEL_TENSORS[architecture], name


def test_qkv_is_taken_apart_by_group() -> None:
    model = model_config()
    rows = torch.arange(8 * 16).view(-1, 1).float()  # 2 groups of 2 query heads, a key and a value, 16 rows each
    query, key, value = split_qkv(rows, model)
    heads = rows.view(8, 16)
    assert torch.equal(query.view(4, 16), heads[[0, 1, 4, 5]])
    assert torch.equal(key.view(2, 16), heads[[2, 6]]) and torch.equal(value.view(2, 16), heads[[3, 7]])


def test_both_families_compute_the_same(tmp_path: Path) -> None:
    phi3, llama = (logits(write_folder(tmp_path / name, model_config(family=name))) for name in ("phi3", "llama"))
    assert phi3.abs().max() > 1
    torch.testing.assert_close(phi3, llama, atol=1e-4, rtol=1e-5)


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tied", model_config(tied_embeddings=True))
    tied = logits(folder)
    assert not torch.equal(tied, logits(write_folder(tmp_path / "untied", model_config())))


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits(write_folder(tmp_path / "whole", model_config()))
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    folder = write_folder(tmp_path / "shards", model_config())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 3 and set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in iterate(model_config()))
    assert torch.equal(logits(folder), whole)


def iterate(model: ModelConfig) -> list[torch.Tensor]:
    return [tensor for _, tensor in export.hf_tensors(RandomWeights(model), model=model)]


@pytest.mark.skipif(not RANKS.exists(), reason="cl100k's ranks file is not in the repository; set PHIDIAS_CL100K to run this")
def test_cl100k_becomes_phi4s_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    spec = TokenizerSpec(kind="cl100k", ranks_file=str(RANKS), file=None, eod="<|endoftext|>")
    exported = write_tokenizer(spec, tmp_path, max_length=4096, family="phi3")
    assert exported.ids == TokenIds(bos=100257, eos=100257, pad=PHI4_PAD)
    export.write_json_file(tmp_path / "config.json", {"model_type": "phi3"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Hello, world!  def f(x):\n\treturn x\n\n", "naïve café 漢字 🏛️ 12345 it's WE'LL", "  leading\r\n\r\nspaces   "]
    expected = [ids.tolist() for ids in build_tokenizer(spec).encode_documents(texts)]
    assert [tokenizer(text)["input_ids"] for text in texts] == expected
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in PHI4_SPECIALS} == PHI4_SPECIALS
    assert len(tokenizer) == 100352
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
    assert chat == [100264, 882, 100266, 6151, 100265, 100264, 78191, 100266]
