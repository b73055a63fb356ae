"""What others do with an exported folder: PEFT's LoRA on its names, and transformers' generate by its generation config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.slow import slow
from tests.training.test_interop import FAMILY_CHANGES, model_config, write_folder
from training.interop import export
from training.interop.families import TokenIds
from training.interop.tokenizer import ExportedTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STEPS, LAYERS = 12, 4


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=[pytest.param(name, marks=() if name == "phi3" else slow) for name in FAMILY_CHANGES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_folder(tmp_path / request.param, model_config(family=request.param, **FAMILY_CHANGES[request.param]))


def test_a_few_steps_of_lora(folder: Path) -> None:
    """The loss falls by the adapters alone, and merged into the weights they compute the same."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, targets = load(folder), TARGETS[folder.name]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(targets) * LAYERS
    tokens = torch.randint(3, 250, (4, 32))
    losses = train(tuned, trained, tokens=tokens)
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        expected = tuned.eval()(input_ids=tokens).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-3)
    after = merged.state_dict()
    assert after.keys() == before.keys()  # so that it saves as the export was
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in changed} == set(targets)
    merged.save_pretrained(folder.parent / "merged")
    with torch.no_grad():
        torch.testing.assert_close(load(folder.parent / "merged")(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-3)


def train(model: Any, parameters: list[Tensor], *, tokens: Tensor) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-2), []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_generating_goes_by_the_generation_config(folder: Path) -> None:
    """Greedy, and to the end of a document or of a chat's turn."""
    prompt = torch.tensor([[5, 6, 7]])
    free = with_ends(folder, eos=255, chat_end=None).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
    assert free.shape == (1, 11)
    third = int(free[0, 5])
    first = free[0].tolist().index(third, 3)
    for ends in (dict(eos=third, chat_end=None), dict(eos=255, chat_end=third)):
        model = with_ends(folder, **ends)
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
        assert found[0].tolist() == free[0, : first + 1].tolist()


def with_ends(folder: Path, *, eos: int, chat_end: int | None) -> Any:
    tokenizer = ExportedTokenizer(TokenIds(eos, eos, 0), "<|endoftext|>", "<|pad|>", chat_end)
    export.write_json_file(folder / "generation_config.json", export.generation_config(tokenizer))
    return load(folder)
