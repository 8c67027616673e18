"""The metadata of index and headers says what the output stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import Tensor, read_shard, write_checkpoint

ONE, OTHER = Tensor("BF16", [4, 2], bytes(range(16))), Tensor("BF16", [4, 2], bytes(16))
BODY = {"layer.weight": Tensor("BF16", [3, 2], bytes(12)), "layer.bias": Tensor("BF16", [3], bytes(6))}
TIES = {"head.weight": "embed.weight"}


def both(**parts: Tensor) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for module in ("embed", "head") for name, tensor in parts.items()}


FP8 = both(weight=Tensor("F8_E4M3", [4, 2], bytes(8)), weight_scale=Tensor("F32", [], bytes(4)))
PACKED = both(weight_packed=Tensor("U8", [4, 1], bytes(4)), weight_scale=Tensor("BF16", [4], bytes(8)))


def options(folder: Path) -> dict[str, Any]:
    (folder / "ties.json").write_text(json.dumps(TIES))
    return {"ties": folder / "ties.json", "on_mismatch": "keep"}


def header_metadata(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The headers' metadata of what becomes of `tensors`, proved."""
    given = options(folder)
    src = write_checkpoint(folder / "src", tensors, config={}, metadata=metadata)
    tierewrite.rewrite(src, folder / "dst", verify=True, **given)
    (shard,) = (folder / "dst").glob("*.safetensors")
    made = read_shard(shard)[1]
    assert tierewrite.verify(src, folder / "dst", **given).ok
    changed = {**made, "embed.weight": "a lie"}
    write_checkpoint(folder / "lie", read_shard(shard)[0], config={}, metadata=changed)
    assert "metadata" in {problem.id for problem in tierewrite.verify(src, folder / "lie", **given).problems}
    return made


def total_parameters(folder: Path, tensors: dict[str, Tensor], said: object) -> object:
    given = options(folder)
    src = write_checkpoint(folder / "src", tensors, config={}, shards=2)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["metadata"]["total_parameters"] = said
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    tierewrite.rewrite(src, folder / "dst", verify=True, **given)
    assert tierewrite.verify(src, folder / "dst", **given).ok
    made = json.loads((folder / "dst" / "model.safetensors.index.json").read_text())["metadata"]
    assert made.keys() == {"note", "total_parameters", "total_size"}
    return made["total_parameters"]


@pytest.mark.parametrize(
    ("tensors", "said", "right"),
    [
        ({"embed.weight": ONE, "head.weight": ONE}, 25, 17),
        ({"embed.weight": ONE, "head.weight": ONE}, 17, 17),
        ({"embed.weight": ONE, "head.weight": OTHER}, 25, 25),
        ({"head.weight": ONE}, 17, 17),
        ({"embed.weight": ONE, "head.weight": ONE}, "25", "25"),
        (FP8, 30, 22),
        (PACKED, 10**6, 10**6),
    ],
    ids=["both were counted", "counted once", "kept", "renamed", "no number", "FP8", "packed: not known"],
)
def test_total_parameters_counts_what_is_stored(
    tensors: dict[str, Tensor], said: object, right: object, tmp_path: Path
) -> None:
    assert total_parameters(tmp_path, {**BODY, **tensors}, said) == right


def test_a_note_of_save_model_names_the_tensor_that_is_stored(tmp_path: Path) -> None:
    """`save_model` left out embed and other; what it kept is renamed to embed."""
    notes = {"format": "pt", "embed.weight": "head.weight", "other.weight": "head.weight"}
    assert header_metadata(tmp_path, {**BODY, "head.weight": ONE}, notes) == {
        "format": "pt", "head.weight": "embed.weight", "other.weight": "embed.weight",
    }  # fmt: skip


def test_a_note_that_is_true_stays(tmp_path: Path) -> None:
    notes = {"format": "pt", "other.weight": "embed.weight", "run": "7"}
    assert header_metadata(tmp_path, {**BODY, "embed.weight": ONE, "head.weight": ONE}, notes) == notes


def test_the_description_of_a_parameter_goes_with_it(tmp_path: Path) -> None:
    """As torchao writes it: what each parameter is, and a list of all."""
    plain = json.dumps({"_type": "Tensor"})
    names = ["embed.weight", "layer.weight", "layer.bias", "head.weight"]
    described = {"format": "pt", **dict.fromkeys(names, plain), "tensor_names": json.dumps(names)}
    made = header_metadata(tmp_path, {**BODY, "embed.weight": ONE, "head.weight": ONE}, described)
    assert made == {"format": "pt", **dict.fromkeys(names[:3], plain), "tensor_names": json.dumps(names[:3])}


def test_the_description_of_a_parameter_is_renamed_with_it(tmp_path: Path) -> None:
    described = {
        "format": "pt",
        "head.weight": "what it is",
        "tensor_names": json.dumps(["layer.weight", "head.weight"]),
    }
    assert header_metadata(tmp_path, {**BODY, "head.weight": ONE}, described) == {
        "format": "pt", "embed.weight": "what it is", "tensor_names": json.dumps(["layer.weight", "embed.weight"]),
    }  # fmt: skip


def test_the_description_of_a_packed_parameter_goes_with_its_tensors(tmp_path: Path) -> None:
    described = {"format": "pt", "embed.weight": "what it is", "head.weight": "what it is"}
    assert header_metadata(tmp_path, {**BODY, **PACKED}, described) == {"format": "pt", "embed.weight": "what it is"}


@pytest.mark.parametrize("text", ["no list", "{}", "[1]", "[" * 2000])
def test_a_list_that_is_none_is_carried_over(text: str, tmp_path: Path) -> None:
    metadata = {"format": "pt", "tensor_names": text}
    assert header_metadata(tmp_path, {**BODY, "embed.weight": ONE, "head.weight": ONE}, metadata) == metadata
