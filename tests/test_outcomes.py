"""A tie of several aliases of which some differ: what is kept, what goes, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import Tensor, read_tensors, write_checkpoint
from tierewrite.errors import Refused

TIES = {
    "encoder.embed.weight": "shared.weight",
    "decoder.embed.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
ONE, OTHER = bytes(range(8)), bytes(range(1, 9))


def bf16(data: bytes) -> Tensor:
    return Tensor("BF16", [2, 2], data)


def checkpoint(folder: Path, **changed: Tensor) -> dict[str, Any]:
    """A checkpoint of four names of one tensor, but for `changed` (dots as double underscores), and its ties."""
    tensors = dict.fromkeys(("shared.weight", *TIES), bf16(ONE))
    tensors.update({name.replace("__", "."): tensor for name, tensor in changed.items()})
    ties = folder / "ties.json"
    ties.write_text(json.dumps(TIES))
    return {"src": write_checkpoint(folder / "src", tensors, config={}), "ties": ties}


def test_the_alias_that_differs_stays_and_the_others_go(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, lm_head__weight=bf16(OTHER))
    report = tierewrite.rewrite(dst=tmp_path / "dst", on_mismatch="keep", **given)
    assert read_tensors(tmp_path / "dst") == {"shared.weight": bf16(ONE), "lm_head.weight": bf16(OTHER)}
    (group,) = report.groups
    assert (group.status, list(group.group.differing_aliases)) == ("rewritten", ["lm_head.weight"])
    (told,) = json.loads((tmp_path / "dst" / "tierewrite.json").read_text())["groups"]
    assert told["differing_aliases"].keys() == {"lm_head.weight"}
    assert told["tensors"]["shared.weight"]["from"] == ["shared.weight", "encoder.embed.weight", "decoder.embed.weight"]
    result = tierewrite.verify(dst=tmp_path / "dst", on_mismatch="keep", **given)
    assert result.problems == ()


def test_a_quantized_head_stays_with_its_scale(tmp_path: Path) -> None:
    head = {"lm_head.weight": Tensor("F8_E4M3", [2, 2], b"abcd"), "lm_head.weight_scale": Tensor("F32", [], b"1234")}
    given = checkpoint(tmp_path, **{name.replace(".", "__"): tensor for name, tensor in head.items()})
    tierewrite.rewrite(dst=tmp_path / "dst", on_mismatch="keep", verify=True, **given)
    assert read_tensors(tmp_path / "dst") == {"shared.weight": bf16(ONE), **head}


def test_aliases_that_agree_with_each_other_alone_all_stay(tmp_path: Path) -> None:
    """What is dropped is loaded from the canonical side, and that holds other bytes."""
    given = checkpoint(tmp_path, shared__weight=bf16(OTHER))
    tierewrite.rewrite(dst=tmp_path / "dst", on_mismatch="keep", verify=True, **given)
    assert read_tensors(tmp_path / "dst") == read_tensors(given["src"])


def test_a_refusal_names_the_alias_that_differs_and_those_that_do_not(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, lm_head__weight=bf16(OTHER))
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(dst=tmp_path / "dst", **given)
    assert "\n  'shared.weight' and 'lm_head.weight' (BF16 [2, 2]) differ: " in str(caught.value)
    assert "; encoder.embed.weight, decoder.embed.weight agree\n" in str(caught.value)
    assert caught.value.details["groups"][0]["differing_aliases"].keys() == {"lm_head.weight"}


def test_a_refusal_does_not_say_that_what_is_not_stored_agrees(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, encoder__embed__weight=bf16(OTHER))
    kept = read_tensors(given["src"])
    del kept["shared.weight"], kept["lm_head.weight"]
    (tmp_path / "src" / "model.safetensors").unlink()
    write_checkpoint(given["src"], kept, config={})
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(dst=tmp_path / "dst", **given)
    (line,) = [line for line in str(caught.value).splitlines() if "differ" in line]
    assert "agree" not in line
    assert "lm_head.weight" not in line


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shared": 1}, "only 'shared.weight' differs: the others agree with each other"),
        ({"encoder__embed": 1, "lm_head": 1}, "encoder.embed.weight, lm_head.weight agree with each other"),
        (
            {"encoder__embed": 1, "lm_head": 1, "decoder__embed": 2},
            "encoder.embed.weight, lm_head.weight agree with each",
        ),
        ({"encoder__embed": 1, "lm_head": 2, "decoder__embed": 3}, None),
        ({"lm_head": 1}, None),
    ],
)
def test_a_reason_says_which_sides_agree_though_not_with_the_canonical_one(
    changed: dict[str, int], said: str | None, tmp_path: Path
) -> None:
    """Else one odd tensor, the canonical one, looks as if every alias had gone its own way."""
    given = checkpoint(tmp_path, **{f"{name}__weight": bf16(bytes([n]) + ONE[1:]) for name, n in changed.items()})
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(dst=tmp_path / "dst", **given)
    assert ("with each other" in str(caught.value)) is (said is not None)
    assert (said or "differ") in str(caught.value)


def test_what_is_kept_whole_says_that_the_canonical_tensor_is_the_odd_one(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, shared__weight=bf16(OTHER))
    kept = tierewrite.rewrite(dst=tmp_path / "dst", on_mismatch="keep", verify=True, **given)
    for result in (kept, tierewrite.plan(confirm=True, on_mismatch="keep", **given)):
        assert "; only 'shared.weight' differs: the others agree with each other" in str(result)


def test_no_line_names_a_tensor_twice(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, lm_head__weight=bf16(OTHER))
    given["ties"].write_text('{"lm_head.weight": "shared.weight"}')
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(dst=tmp_path / "dst", **given)
    whole = tierewrite.rewrite(dst=tmp_path / "whole", on_mismatch="keep", **given)
    given["ties"].write_text(json.dumps(TIES))
    partly = tierewrite.rewrite(dst=tmp_path / "partly", on_mismatch="keep", **given)
    for said in (caught.value, whole, partly, tierewrite.plan(confirm=True, on_mismatch="keep", **given)):
        (line,) = [line for line in str(said).splitlines() if "differ: " in line]
        assert line.count("shared.weight") == line.count("lm_head.weight") == 1


@pytest.mark.parametrize("quantized", [True, False])
def test_a_refusal_says_whether_one_side_is_quantized(quantized: bool, tmp_path: Path) -> None:
    scale = {"lm_head__weight_scale": Tensor("F32", [], b"1234")} if quantized else {}
    given = checkpoint(tmp_path, lm_head__weight=Tensor("F8_E4M3", [2, 2], b"abcd"), **scale)
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(dst=tmp_path / "dst", **given)
    assert ("'lm_head' is quantized and " in str(caught.value)) is quantized
    assert 'on_mismatch="keep"' in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lm_head.weight": None}, "unconfirmed-drop"),
        ({"lm_head.weight": bf16(ONE)}, "bytes"),
        ({"encoder.embed.weight": bf16(ONE)}, "tie-left"),
    ],
)
def test_verify_knows_which_aliases_stay(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    given = checkpoint(tmp_path, lm_head__weight=bf16(OTHER))
    tensors = {"shared.weight": bf16(ONE), "lm_head.weight": bf16(OTHER), **change}
    write_checkpoint(tmp_path / "dst", {name: tensor for name, tensor in tensors.items() if tensor}, config={})
    result = tierewrite.verify(dst=tmp_path / "dst", on_mismatch="keep", **given)
    assert problem in {found.id for found in result.problems}


def test_a_trained_head_beside_three_tied_embeddings_is_what_transformers_saves(tmp_path: Path) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "tied")
    tensors = read_tensors(tmp_path / "tied")
    shared = tensors["shared.weight"]
    head = Tensor(shared.dtype, shared.shape, torch.randn(shared.shape).numpy().tobytes())
    aliases = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), shared)
    naive = write_checkpoint(
        tmp_path / "naive",
        {**tensors, **aliases, "lm_head.weight": head},
        config=json.loads((tmp_path / "tied" / "config.json").read_text()),
    )
    tierewrite.rewrite(naive, tmp_path / "dst", on_mismatch="keep", verify=True)
    T5ForConditionalGeneration.from_pretrained(naive).save_pretrained(tmp_path / "saved")
    assert read_tensors(tmp_path / "dst") == read_tensors(tmp_path / "saved")


def test_a_plan_that_a_rewrite_refuses_says_so(tmp_path: Path) -> None:
    given = checkpoint(tmp_path, lm_head__weight=Tensor("F32", [2, 2], ONE + ONE))
    assert "A rewrite refuses this (exit code 3)" in str(tierewrite.plan(**given))
    assert "A rewrite refuses" not in str(tierewrite.plan(on_mismatch="keep", **given))
