"""Every fixture, from the naive checkpoint to the right answer: names, dtypes, shapes and bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, read_shard, read_tensors, right_answer

CASES = sorted(path.parent.name for path in FIXTURES.glob("*/right_answer.json"))
REFUSED = ["dg_nvfp4_encoder_bf16", "qwen3_tied_but_diverged_bf16"]
Naive = Callable[[str], Path]


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Naive:
    """The rewritten checkpoint of a fixture, made once; no test may change it."""

    @cache
    def make(case: str) -> Path:
        target = tmp_path_factory.mktemp(case) / "out"
        tierewrite.rewrite(FIXTURES / case / "naive", target)
        return target

    return make


@pytest.mark.parametrize("case", CASES)
def test_output_equals_the_right_answer(case: str, rewritten: Naive) -> None:
    assert digests(rewritten(case)) == right_answer(case)


@pytest.mark.parametrize("case", CASES)
def test_index_lists_every_tensor_in_its_shard(case: str, rewritten: Naive) -> None:
    index = json.loads((rewritten(case) / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in rewritten(case).glob("*.safetensors") for name in read_shard(path)[0]}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in read_tensors(rewritten(case)).values())


@pytest.mark.parametrize("case", CASES)
def test_safetensors_own_reader_opens_the_output(case: str, rewritten: Naive) -> None:
    from safetensors import safe_open

    names = set()
    for path in rewritten(case).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as shard:
            names |= set(shard.keys())
            if "torchao" not in case:
                assert shard.metadata() == {"bart_autoround": None, "qwen3_mlx_head": {"format": "mlx"}}.get(
                    case, {"format": "pt"}
                )
    assert names == right_answer(case).keys()


@pytest.mark.parametrize("case", [case for case in CASES if "torchao" in case])
def test_torchaos_metadata_describes_what_is_stored(case: str, naive: Naive, rewritten: Naive) -> None:
    before, after = (read_shard(folder / "model.safetensors")[1] for folder in (naive(case), rewritten(case)))
    dropped = read_tensors(naive(case)).keys() - read_tensors(rewritten(case)).keys()
    gone = {re.sub(r"\._(\w+)_(qdata|scale|zero_point)$", r".\1", name) for name in dropped}
    assert gone
    assert gone <= before.keys()
    assert sorted(json.loads(after["tensor_names"])) == sorted(set(json.loads(before["tensor_names"])) - gone)
    assert after.keys() == before.keys() - gone
    assert all(after[name] == before[name] for name in after if name != "tensor_names")


@pytest.mark.parametrize("case", CASES)
def test_other_files_arrive_byte_for_byte(case: str, naive: Naive, rewritten: Naive) -> None:
    for path in naive(case).iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            assert (rewritten(case) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_rewriting_the_output_changes_nothing(case: str, rewritten: Naive, tmp_path: Path) -> None:
    report = tierewrite.rewrite(rewritten(case), tmp_path / "twice")
    assert digests(tmp_path / "twice") == digests(rewritten(case))
    assert report.count("rewritten") == 0
    assert report.dropped_tensors == 0


@pytest.mark.parametrize("case", CASES)
def test_output_is_byte_identical_with_any_number_of_threads(case: str, naive: Naive, tmp_path: Path) -> None:
    for threads in (1, 8):
        tierewrite.rewrite(naive(case), tmp_path / str(threads), threads=threads)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "8").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "8" / name).read_bytes(), name


@pytest.mark.parametrize("case", REFUSED)
def test_unconfirmed_tie_is_refused_and_leaves_nothing(case: str, naive: Naive, tmp_path: Path) -> None:
    with pytest.raises(tierewrite.Refused) as error:
        tierewrite.rewrite(naive(case), tmp_path / "out")
    assert error.value.details["groups"]
    assert list(tmp_path.iterdir()) == []


def test_refusal_names_every_group_and_both_tensors(naive: Naive, tmp_path: Path) -> None:
    with pytest.raises(tierewrite.Refused, match=r"'model\.embed_tokens\.weight' and 'lm_head\.weight' ") as error:
        tierewrite.rewrite(naive("qwen3_tied_but_diverged_bf16"), tmp_path / "out")
    (group,) = error.value.details["groups"]
    assert group["canonical"] == "model.embed_tokens.weight"
    assert group["aliases"] == ["lm_head.weight"]
    assert 'on_mismatch="keep"' in str(error.value)


def test_keep_leaves_every_quantized_and_unquantized_pair_untouched(naive: Naive, tmp_path: Path) -> None:
    case = "dg_nvfp4_encoder_bf16"
    tierewrite.rewrite(naive(case), tmp_path / "out", on_mismatch="keep")
    before, after = digests(naive(case)), digests(tmp_path / "out")
    plan = tierewrite.plan(naive(case), on_mismatch="keep")
    kept = {name for group in plan.unconfirmed() for name in before if plan.tensors[name].group == group.id}
    assert len(plan.unconfirmed()) == 17
    assert {name: before[name] for name in kept} == {name: after.get(name) for name in kept}
    # the other ties are rewritten all the same
    assert "model.decoder.embed_tokens.weight" in after
    assert "model.encoder.language_model.embed_tokens.weight" not in after


def test_default_shards_hold_no_more_than_the_fullest_input_shard(naive: Naive, tmp_path: Path) -> None:
    case = "dg_nvfp4_sharded"
    tierewrite.rewrite(naive(case), tmp_path / "out")

    def fullest(folder: Path) -> int:
        return max(sum(len(t[2]) for t in read_shard(p)[0].values()) for p in folder.glob("*.safetensors"))

    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert fullest(tmp_path / "out") <= fullest(naive(case))


def test_index_metadata_other_than_total_size_is_kept(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 379584, "total_size": 312672}
