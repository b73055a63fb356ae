"""A Hugging Face folder becomes a stage's first weights: what was exported comes back bit for bit, what transformers made
computes the same, and every layout's ranks hold their parts of it."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.config.schema import ModelConfig
from launcher.plan.foreign import Folder, check_folder, read_folder
from launcher.rundir.checkpoints import CheckpointError
from tests.slow import slow
from tests.training.shards import write_sources
from tests.training.test_interop import RandomWeights, write_folder
from tests.training.tiny import run_config, stage_config
from tests.training.world import cpu_seams, model, one_rank, stage
from training.initialize import global_parameters
from training.interop import export, importing
from training.interop.families import NORMS
from training.interop.weights import LAYERS
from training.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REPOSITORY = Path(__file__).resolve().parents[2]
SHARD_BYTES = 100_000  # several files, of models this small


@pytest.fixture(autouse=True)
def seams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(export, "SHARD_BYTES", SHARD_BYTES)
    with cpu_seams():
        yield


def sound(folder: Path, wanted: ModelConfig) -> Folder:
    """The folder, as a launch would let it pass."""
    config = run_config(folder.parent, stages=[stage_config(stage={"init_from": str(folder)})], model=vars(wanted))
    found, problems = check_folder(config.stages[0], config=config)
    assert not problems, problems
    assert len(found.files) > 1
    return found


class ModelWeights:
    """A model's weights as its checkpoint would hold them."""

    def __init__(self, chunk: Any):
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[str, Any] = {}
        for name, parameter in global_parameters(chunk):
            if name.startswith("decoder.layers."):
                inner = name.split(".", 3)[3]
                self.layers.setdefault(NORMS.get(inner, inner), []).append(parameter.detach())
            else:
                self.tensors[name] = parameter.detach()

    @property
    def layer_names(self) -> list[str]:
        return list(self.layers)

    def blank(self, name: str, *, layer: int | None = None) -> Tensor:
        return self.read(name, layer=layer).to("meta")

    def read(self, name: str, *, layer: int | None = None) -> Tensor:
        found = self.tensors[name] if layer is None else self.layers[name.removeprefix(LAYERS)][layer]
        return torch.as_tensor(found)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2"])
def test_export_import_export_is_the_same_bytes(family: str, tied: bool, tmp_path: Path) -> None:
    wanted = model(family=family, attention_bias=family == "qwen2", tied_embeddings=tied)
    folder = write_folder(tmp_path / "first", wanted)
    with one_rank(stage().layout):
        chunks = build_model(stage(), model=wanted, seed=7)
        importing.import_weights(chunks, sound(folder, wanted), model=wanted)
        (tmp_path / "second").mkdir()
        export.write_weights(ModelWeights(chunks[0].module), tmp_path / "second", model=wanted)
    names = sorted(path.name for path in folder.glob("model*"))
    assert len(names) > 3 and names == sorted(path.name for path in (tmp_path / "second").glob("model*"))
    assert all((folder / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in names)


def transformers_model(family: str, **changes: Any) -> Any:
    import transformers

    kind = {"phi3": "Phi3", "llama": "Llama", "qwen2": "Qwen2"}[family]
    fields = dict(
        vocab_size=250, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(11)
    made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**fields, **changes}))
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:  # norms, and Qwen2's biases: as transformers makes them they would hide a mistake
            parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0.0, 0.5)
    return made.eval()


@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2"])
def test_what_transformers_made_computes_the_same(family: str, tmp_path: Path) -> None:
    made = transformers_model(family, tie_word_embeddings=family == "llama")
    made.save_pretrained(tmp_path / "made", max_shard_size=f"{SHARD_BYTES // 1000}KB")
    wanted = model(family=family, attention_bias=family == "qwen2", tied_embeddings=family == "llama")
    tokens = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(32).expand_as(tokens)
    with one_rank(stage().layout):
        chunk = build_model(stage(), model=wanted, seed=7)[0].eval().requires_grad_(False)
        padding = chunk.module.embedding.word_embeddings.weight[250:].clone()
        importing.import_weights([chunk], sound(tmp_path / "made", wanted), model=wanted)
        found = chunk(tokens, positions, None)[..., :250]
        assert padding.abs().min() > 0
        torch.testing.assert_close(chunk.module.embedding.word_embeddings.weight[250:], padding, rtol=0, atol=0)
    with torch.no_grad():
        expected = made(input_ids=tokens, labels=tokens)
    assert expected.logits.abs().max() > 1
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - float(expected.loss)) < 1e-4


def test_other_types_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = transformers_model("phi3", vocab_size=256).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "made", max_shard_size="50KB")
    monkeypatch.setattr(importing, "BLOCK_BYTES", 1000)  # seven rows of most
    expected = {name: tensor.float() for name, tensor in tensors_of(tmp_path / "made").items()}
    with one_rank(stage().layout):
        chunks = build_model(stage(), model=model(), seed=7)
        importing.import_weights(chunks, sound(tmp_path / "made", model()), model=model())
        found = dict(export.hf_tensors(ModelWeights(chunks[0].module), model=model()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_that_shrinks_meanwhile_is_found_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "first", model())
    headers = read_folder(folder)[0]
    shard = folder / max(headers.files)
    with one_rank(stage().layout):
        chunks = build_model(stage(), model=model(), seed=7)
        os.truncate(shard, shard.stat().st_size - 4)
        with pytest.raises(CheckpointError, match=rf"{shard.name} has become shorter: .*fetch it again"):
            importing.import_weights(chunks, headers, model=model())


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layouts of two ranks in one world, beside one rank."""
    work, wanted = tmp_path_factory.mktemp("import"), model()
    write_sources(work / "data")
    export.SHARD_BYTES, before = SHARD_BYTES, export.SHARD_BYTES
    write_folder(work / "folder", wanted)
    export.SHARD_BYTES = before
    weights = RandomWeights(wanted)
    stacked = {f"decoder.layers.{name}": tensor for name, tensor in weights.layers.items()}
    torch.save({**weights.tensors, **stacked}, work / "reference.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    torchrun = ["torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", "-m"]
    found: dict[str, Any] = {}
    for words, names in ([], ["one"]), (torchrun, ["tp2_sp", "pp2_vpp2", "dp2_overlap", "dp2:bf16"]):
        command = [sys.executable, "-W", "ignore", "-m", *words, "tests.training.import_ranks", str(work), *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=work)
        assert done.returncode == 0, done.stderr[-6000:]
        found |= json.loads((work / f"imported{1 + bool(words)}.json").read_text())
    return found


@slow
@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2_vpp2", "dp2_overlap", "dp2:bf16"])
def test_every_rank_holds_its_part(layout: str, imported: dict[str, Any]) -> None:
    """As Megatron cuts its own checkpoints, which the import does not look at."""
    ranks = imported[layout]["tensors"]
    # Embedding, last norm, head, and six tensors a layer, of which [gate; up] is written as two.
    assert sum(compared for compared, _ in ranks) == (3 + 4 * 7) * (1 if layout in ("one", "pp2_vpp2") else 2)
    assert [wrong for _, wrong in ranks] == [[]] * len(ranks)
    # The second step is of weights that the optimizer has written.
    assert imported[layout]["loss"] == pytest.approx(imported["one"]["loss"], rel=1e-2 if layout.endswith("bf16") else 5e-6)
    assert imported[layout]["loss"][0] > 2 * math.log(250)  # not those of a model as it is first drawn


@slow
def test_the_run_says_where_it_came_from(imported: dict[str, Any]) -> None:
    event = imported["one"]["event"]
    assert event["kind"] == "stage_start" and event["init_from"].endswith("/folder")
    assert event["imported"]["model_type"] == "phi3" and event["imported"]["files"] > 3
    assert event["imported"]["digest"] == imported["tp2_sp"]["event"]["imported"]["digest"]
