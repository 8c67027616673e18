"""What a rewrite does with the tensors, files and options around the ties."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, edit_tensors, read_shard, read_tensors, right_answer, write_shard

Naive = Callable[[str], Path]


def test_refusal_lists_header_and_byte_mismatches_together(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    tensors = read_tensors(src)
    stem = "model.encoder.language_model.layers.0"
    dtype, shape, data = tensors[f"{stem}.mlp.up_proj.weight"]
    edit_tensors(
        src,
        {
            f"{stem}.mlp.down_proj.weight_scale": None,
            f"{stem}.mlp.up_proj.weight": (dtype, shape, bytes([data[0] ^ 1]) + data[1:]),
        },
    )
    with pytest.raises(tierewrite.Refused) as error:
        tierewrite.rewrite(src, tmp_path / "out")
    assert [group["canonical"] for group in error.value.details["groups"]] == [
        "model.decoder.layers.0.mlp.down_proj.weight",
        "model.decoder.layers.0.mlp.up_proj.weight",
    ]


def test_equal_but_undeclared_tensors_are_both_kept(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    tensors = read_tensors(src)
    twin = tensors["model.layers.0.self_attn.q_proj.weight"]
    edit_tensors(src, {"model.layers.1.self_attn.q_proj.weight": twin})
    tierewrite.rewrite(src, tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert after["model.layers.1.self_attn.q_proj.weight"] == after["model.layers.0.self_attn.q_proj.weight"] == twin


def test_per_side_buffers_stay_on_both_sides_even_when_equal(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    encoder, decoder = "model.encoder.language_model.layers.0.layer_scalar", "model.decoder.layers.0.layer_scalar"
    edit_tensors(src, {encoder: read_tensors(src)[decoder]})
    tierewrite.rewrite(src, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    assert tensors[encoder] == tensors[decoder]


def test_max_shard_size_bounds_every_shard(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    for path in shards:
        tensors, _ = read_shard(path)
        total = sum(len(data) for _, _, data in tensors.values())
        assert total <= 20_000 or len(tensors) == 1
    assert any(len(read_shard(path)[0]) == 1 for path in shards)  # embed_tokens is larger than that
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_hub_snapshot_of_links_is_followed_and_arrives_as_files(naive: Naive, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(naive("dg_nvfp4").iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    tierewrite.rewrite(snapshot, tmp_path / "out")
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_subfolders_and_dotfiles_arrive(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    (src / "figures" / "deep").mkdir(parents=True)
    (src / "figures" / "deep" / "loss.png").write_bytes(b"\x89PNG")
    (src / "empty").mkdir()
    (src / ".gitattributes").write_bytes(b"*.safetensors filter=lfs\n")
    (src / "link.md").symlink_to("config.json")
    (src / "tierewrite.json").write_text("an old one")
    tierewrite.rewrite(src, tmp_path / "out")
    assert (tmp_path / "out/figures/deep/loss.png").read_bytes() == b"\x89PNG"
    assert (tmp_path / "out/.gitattributes").read_bytes() == b"*.safetensors filter=lfs\n"
    assert (tmp_path / "out/empty").is_dir()
    assert not (tmp_path / "out/link.md").is_symlink()
    assert (tmp_path / "out/link.md").read_bytes() == (src / "config.json").read_bytes()
    assert json.loads((tmp_path / "out/tierewrite.json").read_text())["schema"] == "tierewrite/manifest/1"


def test_manifest_digests_are_those_of_the_tensors_in_dst(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "tierewrite.json").read_text())
    after, before = digests(tmp_path / "out"), digests(naive("dg_nvfp4"))
    listed = {target: info for group in manifest["groups"] for target, info in group["tensors"].items()}
    assert listed
    for target, info in listed.items():
        assert info["blake3"] == after[target]["blake3"]
        if not info["merged"]:
            assert {before[name]["blake3"] for name in info["from"]} == {info["blake3"]}
    gone = before.keys() - after.keys()
    assert gone <= {name for info in listed.values() for name in info["from"]}
    assert sum(info["merged"] for info in listed.values()) == sum(k.endswith("input_scale") for k in after)
    text = (tmp_path / "out" / "tierewrite.json").read_text()
    assert str(tmp_path) not in text
    assert str(FIXTURES) not in text


def test_no_manifest_writes_none_and_changes_nothing_else(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "with")
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "without", manifest=False)
    names = {path.name for path in (tmp_path / "with").iterdir()}
    assert {path.name for path in (tmp_path / "without").iterdir()} == names - {"tierewrite.json"}
    for name in names - {"tierewrite.json"}:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_several_files_without_an_index_are_all_read(naive: Naive, copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4_sharded")
    (src / "model.safetensors.index.json").unlink()
    tierewrite.rewrite(src, tmp_path / "out")
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")


def test_ties_file_stands_in_for_the_class(naive: Naive, copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    # A class that nobody knows: only the ties file can speak.
    config = json.loads((src / "config.json").read_text())
    config.update(architectures=["NobodyKnowsThis"], model_type="unheard_of")
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(tierewrite.ConfigError, match="ties"):
        tierewrite.rewrite(src, tmp_path / "out")
    groups = tierewrite.plan(naive("dg_nvfp4")).groups
    ties = {alias: group.canonical for group in groups for alias in group.aliases}
    (tmp_path / "ties.json").write_text(json.dumps(ties))
    report = tierewrite.rewrite(src, tmp_path / "out", ties=tmp_path / "ties.json")
    assert report.ties_source == "ties-file"
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_metadata_clash_keeps_the_first_and_is_reported(tmp_path: Path, copied: Naive) -> None:
    src = copied("dg_nvfp4_sharded")
    path = src / "model-00002-of-00003.safetensors"
    tensors, _ = read_shard(path)
    write_shard(path, tensors, {"format": "np", "note": "second"})
    report = tierewrite.rewrite(src, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert read_shard(shard)[1] == {"format": "pt", "note": "second"}
    assert any("metadata 'format'" in warning for warning in report.warnings)
