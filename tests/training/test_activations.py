"""launcher.plan.activations against the storages that autograd holds for real megatron-core models, on the CPU.

Each model is built as one rank of its layout in this process (the other ranks are not there; shapes are what they would be) and
runs one micro batch. A storage counts whole and once: a view keeps all of what it looks into. The agreement is exact.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from launcher.config.schema import ModelConfig, StageConfig
from launcher.plan import activations
from launcher.plan.activations import (
    Saved,
    embedding_activations,
    head_activations,
    layer_activations,
    recomputed_activations,
)
from tests.training.world import cpu_seams, model, one_rank, stage
from training.initialize import initialize_parameters
from training.model import build_chunk, transformer_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Sizes that no two tensors share by chance.
SMALL = dict(hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=20, ffn_hidden_size=112)
GPT2 = dict(activation="gelu", normalization="layernorm", mlp_bias=True, attention_bias=True, num_query_groups=4)
BF16 = dict(params_dtype="bf16")
TP2, CP2 = dict(tp=2), dict(cp=2)
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # Changes of model, layout and precision


def selective(*modules: str) -> dict[str, Any]:
    return dict(recompute="selective", recompute_modules=list(modules))


CASES: dict[str, Case] = {
    "swiglu": ({}, {}, {}),
    "swiglu, bf16": ({}, {}, BF16),
    "GPT-2 like": (GPT2, {}, {}),
    "GPT-2 like, bf16": (GPT2, {}, BF16),
    "squared relu": (dict(activation="squared_relu"), {}, {}),
    "both biases, gated": (dict(attention_bias=True, mlp_bias=True), {}, BF16),
    "one group, tied": (dict(num_query_groups=1, tied_embeddings=True), {}, {}),
    "hidden dropout": (dict(hidden_dropout=0.1), {}, BF16),
    "attention dropout": (dict(attention_dropout=0.1), {}, BF16),
    "larger micro batch": (dict(hidden_size=64, ffn_hidden_size=96), dict(micro_batch_size=3), {}),
    "core attention": ({}, selective("core_attn"), BF16),
    "core attention of heads as many as groups": (GPT2, selective("core_attn"), {}),
    "mlp": ({}, selective("mlp"), BF16),
    # Not with mlp_bias: a checkpoint that returns the bias makes it its own output, and the backward pass never ends.
    "core attention and mlp": (dict(GPT2, mlp_bias=False), selective("core_attn", "mlp"), {}),
    "attention dropout, recomputed": (dict(attention_dropout=0.1), selective("core_attn"), {}),
    "full": ({}, dict(recompute="full"), {}),
    "full, bf16": ({}, dict(recompute="full"), BF16),
    "full, layernorm, dropout": (dict(GPT2, hidden_dropout=0.1), dict(recompute="full"), BF16),
    "tp2": ({}, TP2, {}),
    "tp2, sp": (GPT2, dict(TP2, sequence_parallel=True), BF16),
    "tp4, fewer groups than ranks": ({}, dict(tp=4, sequence_parallel=True), {}),
    "cp2": ({}, CP2, BF16),
    "cp2, core attention": ({}, dict(CP2, **selective("core_attn")), {}),
    "tp2, cp2, sp, mlp": ({}, dict(TP2, cp=2, sequence_parallel=True, **selective("mlp")), BF16),
    "tp2, cp2, sp, full": ({}, dict(TP2, cp=2, sequence_parallel=True, recompute="full"), BF16),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


class Packed:
    """In the place of a tensor that autograd saves; as long as autograd has it, the tensor is kept."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class Storages:
    """What autograd keeps: whole storages, each once, without the ignored tensors'."""

    def __init__(self, ignored: list[torch.Tensor]):
        self.ignored = ignored
        self.packed: weakref.WeakSet[Packed] = weakref.WeakSet()
        self.held: list[Packed] | None = None

    def pack(self, tensor: torch.Tensor) -> Packed:
        packed = Packed(tensor)
        self.packed.add(packed)
        if self.held is not None:
            self.held.append(packed)
        return packed

    def hold(self) -> None:
        """Nothing is freed from here on, so that no address is taken again and all that is recomputed can be seen together."""
        self.held = list(self.packed)

    @property
    def num_bytes(self) -> int:
        storages = {packed.tensor.untyped_storage().data_ptr(): packed.tensor.untyped_storage() for packed in self.packed}
        for tensor in self.ignored:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in storages.values())


def measured(wanted: ModelConfig, config: StageConfig) -> tuple[int, int]:
    """Bytes that the forward pass of the whole model keeps, and what the backward pass adds to them by recomputing."""
    layout = config.layout
    shape = (layout.micro_batch_size, config.stage.seq_length // layout.cp)
    # Two replicas: of one rank alone the groups would be real, and each leaves threads behind.
    with one_rank(layout, world_size=2 * layout.model_parallel_size):
        megatron = transformer_config(config, model=wanted)
        chunk = build_chunk(config, model=wanted, config=megatron, vp_stage=None)
        initialize_parameters([chunk], model=wanted, seed=7)
        tokens_BS = torch.randint(0, wanted.vocab_size, shape)
        labels_BS = torch.randint(0, wanted.vocab_size, shape)
        storages = Storages([*chunk.parameters(), *chunk.buffers(), tokens_BS, labels_BS])
        # All layers share the table of angles; full recomputation passes it to each.
        chunk.rotary_pos_emb.register_forward_hook(lambda _module, _inputs, angles: storages.ignored.append(angles))
        run = Float16Module(megatron, chunk) if megatron.bf16 else chunk
        with torch.autograd.graph.saved_tensors_hooks(storages.pack, lambda packed: packed.tensor):
            loss_BS = run(tokens_BS, torch.arange(shape[1]).expand(shape), None, labels=labels_BS)
            kept = storages.num_bytes
            storages.hold()
            loss_BS.sum().backward()
        return kept, storages.num_bytes - kept


def total(rows: tuple[Saved, ...]) -> float:
    return sum(row.num_bytes for row in rows if row.kind != activations.TRANSIENT)


def planned(wanted: ModelConfig, config: StageConfig) -> tuple[float, float]:
    where: dict[str, Any] = dict(
        layout=config.layout, precision=config.precision, seq_length=config.stage.seq_length, on_gpu=False
    )
    layer, recomputed = layer_activations(wanted, **where), recomputed_activations(wanted, **where)
    ends = total(embedding_activations(wanted, **where)) + total(head_activations(wanted, **where))
    # Storages.hold keeps what each layer recomputes, one after the other.
    return ends + wanted.num_layers * total(layer), wanted.num_layers * total(recomputed)


def build(case: str, *, num_layers: int) -> tuple[ModelConfig, StageConfig]:
    changes, layout, precision = CASES[case]
    wanted = model(**{**SMALL, "num_layers": num_layers, **changes})
    return wanted, stage(layout=dict(micro_batch_size=2, **layout) if "micro_batch_size" not in layout else layout,
                         precision=precision, stage=dict(seq_length=24))  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tables_are_what_autograd_holds(case: str) -> None:
    """Models of one layer and of three: so each layer is right, and so are the ends."""
    for num_layers in (1, 3):
        wanted, config = build(case, num_layers=num_layers)
        assert measured(wanted, config) == planned(wanted, config)


def test_a_wrong_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is exact: without the smallest row, one fp32 number a token, it fails."""
    wanted, config = build("swiglu", num_layers=1)
    whole = activations._norm
    monkeypatch.setattr(activations, "_norm", lambda *a, **k: (row for row in whole(*a, **k) if "1/rms" not in row.name))
    assert measured(wanted, config) != planned(wanted, config)


# Of GPT-3's shape: as many groups as heads, channels that make up hidden, ffn four times that.
GPT3 = dict(
    hidden_size=512, num_attention_heads=8, num_query_groups=8, kv_channels=64, ffn_hidden_size=2048, activation="gelu",
    normalization="layernorm", mlp_bias=True, attention_bias=True, hidden_dropout=0.1,
)  # fmt: skip


def on_gpu(
    wanted: dict[str, Any], precision: dict[str, Any] = BF16, *, in_bf16: bool = False, **layout: Any
) -> dict[str, float]:
    config = stage(layout=layout, precision=precision)
    where: dict[str, Any] = dict(
        layout=config.layout, precision=config.precision, seq_length=1024, on_gpu=True, in_bf16=in_bf16
    )
    return {row.name: row.num_bytes for row in layer_activations(model(**wanted), **where)}


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_published_formula(tp: int) -> None:
    """Korthikanti et al. 2022: 34 s b h bytes a layer with flash attention, split evenly with sequence parallelism, 10 + 24 / t
    without. Theirs leaves out statistics: four fp32 numbers a token of two layernorms, one a head of the softmax."""
    sbh = 1024 * 3 * 512
    for sequence_parallel, expected in ((True, 34 / tp), (False, 10 + 24 / tp)):
        found = on_gpu(GPT3, tp=tp, sequence_parallel=sequence_parallel, micro_batch_size=3)
        statistics = [name for name in found if "deviation" in name or "log of" in name]
        assert len(statistics) == 3
        assert sum(found.values()) - sum(found[name] for name in statistics) == pytest.approx(expected * sbh)


def test_fp8_halves_the_inputs_of_linear_layers() -> None:
    gated = dict(SMALL, hidden_size=256, num_attention_heads=4, kv_channels=64, ffn_hidden_size=512)
    bf16 = on_gpu(gated)
    for recipe, share in (("delayed", 0.5), ("tensorwise", 0.5), ("blockwise", 0.5 * (1 + 4 / 128))):
        precision = dict(BF16, fp8=recipe, fp8_format="e4m3")
        found = on_gpu(gated, precision)
        inputs = {"QKV input", "fc1 input", "fc2 input"}
        assert {name: bf16[name] * (share if name in inputs else 1) for name in bf16} == {name: found[name] for name in bf16}
        # The delayed recipe quantises the projection's input, and attention keeps its output for itself.
        assert found.keys() - bf16.keys() == ({"input of the projection in FP8"} if recipe == "delayed" else set())
        assert on_gpu(gated, precision, in_bf16=True) == bf16


def test_recomputing_flash_attention_keeps_more_than_it_frees() -> None:
    """The mixed QKV stays alive for the checkpoint's v."""
    kept, recomputed = (sum(on_gpu(SMALL, **layout).values()) for layout in ({}, selective("core_attn")))
    assert recomputed > kept
    assert sum(on_gpu(SMALL, **selective("mlp")).values()) < kept


def test_logits_at_the_peak() -> None:
    """In bf16 there are logits of 2 bytes beside their fp32 copy; in fp32 the copy is the logits."""
    for precision, expected in ((BF16, 2), ({}, 0)):
        config = stage(layout=dict(tp=2), precision=precision)
        head = head_activations(model(), layout=config.layout, precision=config.precision, seq_length=32, on_gpu=False)
        assert sum(row.num_bytes for row in head if row.kind == activations.TRANSIENT) == expected * 32 * 256 / 2


def test_training_fuses_what_the_gpu_table_counts_as_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfused, SwiGLU would keep two more tensors as large as its output, and rotary positions their tables in every layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("training.model.refuse_undeliverable", lambda _precision: None)
    monkeypatch.setattr("training.model.engine_version", lambda: "2.11.0")
    captured: dict[str, Any] = {}
    monkeypatch.setattr("training.model.TransformerConfig", lambda **fields: captured.update(fields))
    transformer_config(stage(precision=BF16), model=model())
    assert captured["bias_activation_fusion"] and captured["apply_rope_fusion"]
