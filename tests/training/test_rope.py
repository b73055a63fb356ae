"""Position interpolation and YaRN beside transformers', whose config is made of what an export says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from launcher.config.schema import StageConfig, StageSettings
from launcher.plan.foreign import read_folder
from tests.training.test_import import transformers_model
from tests.training.world import cpu_seams, model, one_rank, stage
from training.interop import importing
from training.interop.rope import rope_parameters
from training.model import build_model
from training.rope import inverse_frequencies, softmax_scale

LINEAR: dict[str, Any] = dict(
    rope_type="linear", factor=3.0, original_max_position_embeddings=32, beta_fast=None, beta_slow=None
)
YARN: dict[str, Any] = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)
# of which the first touch 1, all and none of the pairs of a head
YARNS = [YARN, YARN | dict(original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0), YARN | dict(factor=6.5)]


@pytest.fixture(autouse=True)
def seams() -> Iterator[None]:
    with cpu_seams():
        yield


def lengthened(scaling: dict[str, Any] | None, *, rotary_base: int = 10000) -> StageConfig:
    return stage(stage=dict(seq_length=96, rotary_base=rotary_base, rope_scaling=scaling))


def llama_config(settings: StageSettings, *, head_dim: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, **rope_parameters(settings))


@pytest.mark.parametrize("rotary_base", [10000, 250000])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("scaling", [LINEAR, *YARNS])
def test_frequencies_are_transformers(scaling: dict[str, Any], head_dim: int, rotary_base: int) -> None:
    settings = lengthened(scaling, rotary_base=rotary_base).stage
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama_config(settings, head_dim=head_dim), "cpu")
    torch.testing.assert_close(inverse_frequencies(settings, kv_channels=head_dim), expected, rtol=1e-6, atol=0)
    scale = softmax_scale(settings, kv_channels=head_dim) or head_dim**-0.5
    assert scale == pytest.approx(factor**2 * head_dim**-0.5, rel=1e-6)


@pytest.mark.parametrize("scaling", [None, LINEAR, *YARNS])
def test_logits_are_transformers(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    lengthening, wanted = lengthened(scaling), model(family="llama")
    made = transformers_model("llama", **rope_parameters(lengthening.stage))
    made.save_pretrained(tmp_path)
    tokens = torch.randint(0, 250, (2, 96), generator=torch.Generator().manual_seed(5))
    with one_rank(lengthening.layout):
        chunk = build_model(lengthening, model=wanted, seed=7)[0].eval().requires_grad_(False)
        importing.import_weights([chunk], read_folder(tmp_path)[0], model=wanted)
        found = chunk(tokens, torch.arange(96).expand_as(tokens), None)[..., :250]
    with torch.no_grad():
        expected = made(input_ids=tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_what_is_scaled_is_another_model(tmp_path: Path) -> None:
    """Or the test above would say nothing."""
    tokens, found = torch.randint(0, 250, (1, 96), generator=torch.Generator().manual_seed(5)), []
    for scaling in (None, LINEAR, *YARNS):
        with torch.no_grad():
            found.append(transformers_model("llama", **rope_parameters(lengthened(scaling).stage))(input_ids=tokens).logits)
    distances = [(first - second).abs().max() for number, first in enumerate(found) for second in found[:number]]
    assert min(distances) > 0.01


def test_what_an_export_says_is_read_back(tmp_path: Path) -> None:
    for scaling in (None, LINEAR, YARN):
        said = rope_parameters(lengthened(scaling).stage)
        LlamaConfig(**said).save_pretrained(tmp_path)
        again = LlamaConfig.from_pretrained(tmp_path).rope_parameters
        assert again["rope_type"] == (scaling["rope_type"] if scaling else "default")
        assert all(again[key] == value for key, value in (said["rope_scaling"] or {}).items() if key != "type")
        assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == (128 if scaling is YARN else 96)
