"""transformers loads the rewritten checkpoints: nothing missing, nothing unexpected, the same logits bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tierewrite

Naive = Callable[[str], Path]


def load(class_name: str, folder: Path) -> Any:
    import transformers

    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize(
    ("case", "class_name", "inputs"),
    [
        ("qwen3_tied_bf16", "Qwen3ForCausalLM", {"input_ids": [[1, 5, 9, 2, 7]]}),
        (
            "bart_bf16",
            "BartForConditionalGeneration",
            {"input_ids": [[3, 5, 9, 2]], "decoder_input_ids": [[2, 4, 6]]},
        ),
        # Without decoder_input_ids it would start from a random canvas.
        (
            "dg_bf16",
            "DiffusionGemmaForBlockDiffusion",
            {"input_ids": [[2, 17, 30, 41, 8, 9]], "decoder_input_ids": [list(range(20, 36))]},
        ),
    ],
)
def test_logits_are_those_of_the_naive_checkpoint(
    case: str, class_name: str, inputs: dict[str, list[list[int]]], naive: Naive, tmp_path: Path
) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out")
    tensors = {name: torch.tensor(ids) for name, ids in inputs.items()}
    with torch.no_grad():
        torch.manual_seed(0)
        before = load(class_name, naive(case))(**tensors).logits
        torch.manual_seed(0)
        after = load(class_name, tmp_path / "out")(**tensors).logits
    assert before.shape == after.shape
    assert before.numel()
    assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
