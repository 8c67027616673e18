"""`expand`: every tied tensor under each of its names again, and a rewrite of that is the canonical checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, Tensor, read_header, read_tensors, write_checkpoint
from tierewrite import cli
from tierewrite.errors import Refused, UsageError, VerificationFailed
from tierewrite.planning import alignment
from tierewrite.values import content

ONE, OTHER, SCALE = Tensor("BF16", [2, 2], b"abcdefgh"), Tensor("BF16", [2, 2], b"ABCDEFGH"), Tensor("F32", [], b"1234")
EIGHT = Tensor("F8_E4M3", [2, 2], b"abcd")
TIES = {"b.q_proj.weight": "a.q_proj.weight", "c.q_proj.weight": "a.q_proj.weight"}


def checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str] = TIES, metadata: dict[str, str] | None = None
) -> Path:
    """A checkpoint that declares its ties itself."""
    return write_checkpoint(folder / "src", tensors, config={"_tied_weights_keys": ties}, metadata=metadata)


def expanded(folder: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str] = TIES) -> dict[str, Tensor]:
    """What becomes of `tensors`, proved."""
    tierewrite.expand(checkpoint(folder, tensors, ties), folder / "expanded", verify=True)
    return read_tensors(folder / "expanded")


def files(folder: Path) -> dict[str, bytes]:
    """All that a rewrite writes but the manifest, which speaks of its source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tierewrite.json"}


@pytest.mark.parametrize("run_bytes", [alignment.RUN_BYTES, 8192], ids=["as small", "as with large runs"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("qwen3_tied_bf16", {}),
        ("mixtral_tied_bf16", {}),
        ("dg_nvfp4", {}),
        ("dg_nvfp4_sharded", {"max_shard_size": "40KB"}),
        ("dg_nvfp4_kvfp8", {"kv_scales": "merge", "unify_fused_scales": True}),
        ("llmc_fp8_static", {}),
    ],
)
def test_a_fixture_expanded_has_every_name_with_the_canonical_value_and_is_rewritten_to_the_same_bytes(
    case: str, options: dict[str, Any], run_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "RUN_BYTES", run_bytes)
    naive = FIXTURES / case / "naive"
    tierewrite.rewrite(naive, tmp_path / "canonical", **options)
    made = tierewrite.expand(tmp_path / "canonical", tmp_path / "expanded", verify=True)
    tensors, before, canonical = (
        read_tensors(folder) for folder in (tmp_path / "expanded", naive, tmp_path / "canonical")
    )
    assert tensors.keys() >= before.keys()
    assert tensors == {**canonical, **{name: canonical[like] for name, like in made.written.items()}}
    fates = tierewrite.plan(naive, **options).tensors
    assert all(tensors[name] == canonical[fate.target] for name, fate in fates.items()), "merged scales on every side"
    tierewrite.rewrite(tmp_path / "expanded", tmp_path / "again", **{**options, "max_shard_size": None})
    assert files(tmp_path / "again") == files(tmp_path / "canonical")


def test_the_shards_of_the_source_stay_and_aliases_come_in_further_ones(tmp_path: Path) -> None:
    tierewrite.rewrite(FIXTURES / "dg_nvfp4_sharded" / "naive", tmp_path / "canonical")
    tierewrite.expand(tmp_path / "canonical", tmp_path / "expanded")
    before, after = (sorted(path.glob("*.safetensors")) for path in (tmp_path / "canonical", tmp_path / "expanded"))
    assert len(after) > len(before)
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after[: len(before)]]
    index = json.loads((tmp_path / "expanded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in read_tensors(tmp_path / "expanded").values())


def test_a_side_gets_what_was_computed_from_the_weight_and_the_activation_scales(tmp_path: Path) -> None:
    parts = {"weight": EIGHT, "weight_scale": SCALE, "input_scale": SCALE}
    canonical = {**{f"a.q_proj.{name}": tensor for name, tensor in parts.items()}, "a.q_proj.bias": ONE}
    sides = {f"{side}.q_proj.{name}": tensor for side in "bc" for name, tensor in parts.items()}
    assert expanded(tmp_path, canonical) == {**canonical, **sides}


def test_names_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    """b is a tensor of its own: a differing one; c another kind of tensor; what each of them has is not touched."""
    tensors = {"a.q_proj.weight": EIGHT, "a.q_proj.weight_scale": SCALE, "b.q_proj.weight": ONE, "c.q_proj.bias": OTHER}
    made = expanded(tmp_path, tensors)
    assert made == {**tensors, "c.q_proj.weight": EIGHT, "c.q_proj.weight_scale": SCALE}


KV = {"b.attn.k_proj.weight": "a.attn.k_proj.weight"}


@pytest.mark.parametrize("manifest", [True, False])
def test_kv_scales_that_were_merged_are_written_out(manifest: bool, tmp_path: Path) -> None:
    canonical = {"a.attn.k_proj.weight": EIGHT, "a.attn.k_proj.k_scale": SCALE}
    src = checkpoint(tmp_path, canonical, KV)
    tierewrite.rewrite(src, tmp_path / "canonical", kv_scales="merge", manifest=manifest)
    options: dict[str, Any] = {} if manifest else {"kv_scales": "merge"}
    tierewrite.expand(tmp_path / "canonical", tmp_path / "out", verify=True, **options)
    sides = {"b.attn.k_proj.weight": EIGHT, "b.attn.k_proj.k_scale": SCALE}
    assert read_tensors(tmp_path / "out") == {**canonical, **sides}


def test_kv_scales_of_one_side_are_left_alone_where_they_were_not_merged(tmp_path: Path) -> None:
    canonical = {"a.attn.k_proj.weight": EIGHT, "a.attn.k_proj.k_scale": SCALE}
    assert expanded(tmp_path, canonical, KV) == {**canonical, "b.attn.k_proj.weight": EIGHT}


def test_nothing_is_lacking_where_every_name_is_there(tmp_path: Path) -> None:
    tensors = dict.fromkeys(("a.q_proj.weight", *TIES), ONE)
    src = checkpoint(tmp_path, tensors)
    made = tierewrite.expand(src, tmp_path / "out")
    assert (dict(made.written), read_tensors(tmp_path / "out")) == ({}, tensors)


def test_a_source_that_no_rewrite_makes_is_told_from_a_failing_disk(tmp_path: Path) -> None:
    """Rewriting its expansion cannot give it again; that was called a bug of ours, or of the disk."""
    src = checkpoint(tmp_path, dict.fromkeys(("a.q_proj.weight", *TIES), ONE))
    with pytest.raises(VerificationFailed, match=r"SRC itself is not what a rewrite makes, as at '.*q_proj.weight'"):
        tierewrite.expand(src, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    tierewrite.rewrite(src, tmp_path / "canonical")
    tierewrite.expand(tmp_path / "canonical", tmp_path / "out", verify=True)


@pytest.mark.parametrize("left", [Tensor("F32", [], b"4321"), Tensor("F32", [1], b"1234")], ids=["bytes", "shape"])
def test_a_side_is_not_completed_into_a_mixture_of_two_weights(left: Tensor, tmp_path: Path) -> None:
    """A scale is left of a side whose weight somebody lost: it is that of another weight."""
    tensors = {"a.q_proj.weight": EIGHT, "a.q_proj.weight_scale": SCALE, "b.q_proj.weight_scale": left}
    with pytest.raises(Refused, match=r"'b\.q_proj\.weight_scale' differs from 'a\.q_proj\.weight_scale'"):
        tierewrite.expand(checkpoint(tmp_path, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_side_that_is_there_in_part_is_completed_and_no_rewrite_makes_such_a_source(tmp_path: Path) -> None:
    """bitsandbytes' names of several words, which `save_pretrained` leaves under the alias without their weight."""
    src = FIXTURES / "dg_bnb_nf4_saved" / "naive"
    tierewrite.expand(src, tmp_path / "out")
    made, had = read_tensors(tmp_path / "out"), read_tensors(src)
    side = "model.encoder.language_model.layers.0.mlp.down_proj.weight"
    assert side not in had
    assert made[side] == had["model.decoder.layers.0.mlp.down_proj.weight"]
    with pytest.raises(VerificationFailed, match="SRC itself is not what a rewrite makes"):
        tierewrite.expand(src, tmp_path / "proved", verify=True)


def test_a_mapping_or_a_file_of_ties_speaks_of_names_that_are_not_there(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", {"a.q_proj.weight": ONE}, config={})
    (tmp_path / "ties.json").write_text(json.dumps(TIES))
    tierewrite.expand(src, tmp_path / "mapping", ties=TIES)
    tierewrite.expand(src, tmp_path / "file", ties=tmp_path / "ties.json")
    assert read_tensors(tmp_path / "mapping") == dict.fromkeys(("a.q_proj.weight", *TIES), ONE)
    assert files(tmp_path / "mapping") == files(tmp_path / "file")


def test_other_files_come_along(tmp_path: Path) -> None:
    src = checkpoint(tmp_path, {"a.q_proj.weight": ONE})
    (src / "tokenizer").mkdir()
    (src / "tokenizer" / "vocab.txt").write_text("a")
    tierewrite.expand(src, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a"


def test_descriptions_of_parameters_are_there_under_each_name_and_go_again(tmp_path: Path) -> None:
    names = ["a.q_proj.weight", "z.weight"]
    metadata = {"format": "pt", **dict.fromkeys(names, "what it is"), "tensor_names": json.dumps(names)}
    src = checkpoint(tmp_path, dict.fromkeys(names, ONE), metadata=metadata)
    tierewrite.expand(src, tmp_path / "out", verify=True)
    made = read_header(next((tmp_path / "out").glob("*.safetensors")))[0]["__metadata__"]
    assert (made["b.q_proj.weight"], made["c.q_proj.weight"]) == ("what it is", "what it is")
    assert json.loads(made["tensor_names"]) == [*names, "b.q_proj.weight", "c.q_proj.weight"]
    tierewrite.rewrite(tmp_path / "out", tmp_path / "again")
    assert read_header(tmp_path / "again" / "model.safetensors")[0] == read_header(src / "model.safetensors")[0]


def test_what_is_not_known_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    src = checkpoint(tmp_path, {"a.q_proj.weight": ONE, "a.q_proj.zzz": SCALE})
    with pytest.raises(Refused, match="no known format has the suffix 'zzz'"):
        tierewrite.expand(src, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_wrong_byte_is_found_before_the_output_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(place: content.Range, start: int, stop: int) -> Any:
        data = read(place, start, stop).copy()
        data[0] ^= 1
        return data

    read = content._read
    monkeypatch.setattr(content, "_read", wrong)
    src = checkpoint(tmp_path, {"a.q_proj.weight": ONE})
    with pytest.raises(VerificationFailed, match=r"2 differ, the first is 'b\.q_proj\.weight'"):
        tierewrite.expand(src, tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_for_a_consumer_only_the_names_that_it_needs(tmp_path: Path) -> None:
    """As `rewrite --for` it would have kept them."""
    naive = FIXTURES / "llmc_fp8_static" / "naive"
    tierewrite.rewrite(naive, tmp_path / "canonical")
    tierewrite.rewrite(naive, tmp_path / "kept", keep_names_for="transformers")
    tierewrite.expand(tmp_path / "canonical", tmp_path / "out", consumer="transformers", force=True, verify=True)
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "kept")


def test_calls_that_cannot_be_carried_out(tmp_path: Path) -> None:
    src = checkpoint(tmp_path, {"a.q_proj.weight": ONE})
    with pytest.raises(UsageError, match="it is not known that vllm needs names"):
        tierewrite.expand(src, tmp_path / "out", consumer="vllm")
    with pytest.raises(UsageError, match="force=True goes with consumer"):
        tierewrite.expand(src, tmp_path / "out", force=True)
    with pytest.raises(UsageError):
        tierewrite.expand(src, src)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = checkpoint(tmp_path, {"a.q_proj.weight": ONE})
    assert cli.run(["expand", str(src), str(tmp_path / "out"), "--verify"]) == 0
    assert "Names written out: b.q_proj.weight, c.q_proj.weight." in capsys.readouterr().out
    assert cli.run(["expand", str(src), str(tmp_path / "json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["written"].keys()) == ("tierewrite/expansion/1", TIES.keys())
    assert cli.run(["expand", str(src), str(tmp_path / "out")]) == 2
