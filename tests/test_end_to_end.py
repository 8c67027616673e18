"""Every fixture, from the naive checkpoint to the right answer: names, dtypes, shapes and bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, edit_tensors, read_shard, read_tensors, right_answer

CASES = sorted(path.parent.name for path in FIXTURES.glob("*/right_answer.json"))
REFUSED = ["dg_nvfp4_encoder_bf16", "qwen3_tied_but_diverged_bf16"]
Naive = Callable[[str], Path]


@pytest.mark.parametrize("case", CASES)
def test_output_equals_the_right_answer(case: str, naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out")
    assert digests(tmp_path / "out") == right_answer(case)


@pytest.mark.parametrize("case", CASES)
def test_index_lists_every_tensor_in_its_shard(case: str, naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {
        name: path.name
        for path in (tmp_path / "out").glob("*.safetensors")
        for name in read_shard(path)[0]
    }
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in read_tensors(tmp_path / "out").values())


@pytest.mark.parametrize("case", CASES)
def test_safetensors_own_reader_opens_the_output(case: str, naive: Naive, tmp_path: Path) -> None:
    from safetensors import safe_open

    tierewrite.rewrite(naive(case), tmp_path / "out")
    names = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="numpy") as shard:
            names |= set(shard.keys())
            assert shard.metadata() == {"format": "pt"}
    assert names == right_answer(case).keys()


@pytest.mark.parametrize("case", CASES)
def test_other_files_arrive_byte_for_byte(case: str, naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out")
    for path in naive(case).iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_rewriting_the_output_changes_nothing(case: str, naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "once")
    report = tierewrite.rewrite(tmp_path / "once", tmp_path / "twice")
    assert digests(tmp_path / "twice") == digests(tmp_path / "once")
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
    with pytest.raises(tierewrite.Refused, match=r"lm_head\.weight -> model\.embed_tokens\.weight") as error:
        tierewrite.rewrite(naive("qwen3_tied_but_diverged_bf16"), tmp_path / "out")
    (group,) = error.value.details["groups"]
    assert group["canonical"] == "model.embed_tokens.weight"
    assert group["aliases"] == ["lm_head.weight"]
    assert "--on-mismatch keep" in str(error.value)


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


def test_keep_leaves_diverged_head_on_both_sides(naive: Naive, tmp_path: Path) -> None:
    case = "qwen3_tied_but_diverged_bf16"
    report = tierewrite.rewrite(naive(case), tmp_path / "out", on_mismatch="keep")
    assert digests(tmp_path / "out") == digests(naive(case))
    assert report.count("kept") == 1


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


def test_keep_isolates_one_diverged_expert_to_its_group(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    name = "model.encoder.language_model.layers.1.experts.2.down_proj.weight"
    dtype, shape, data = read_tensors(src)[name]
    edit_tensors(src, {name: (dtype, shape, data[:-1] + bytes([data[-1] ^ 0x10]))})
    before = digests(src)
    report = tierewrite.rewrite(src, tmp_path / "out", on_mismatch="keep")
    after = digests(tmp_path / "out")
    group = "layers.1.experts."
    untouched = {
        key: value for key, value in before.items() if group in key and ".down_proj." in key and "vision" not in key
    }
    assert len(untouched) == 32  # 4 experts, 4 tensors each, on both sides
    assert {key: after.get(key) for key in untouched} == untouched
    want = right_answer("dg_nvfp4")
    assert {k: v for k, v in after.items() if k not in untouched} == {
        k: v for k, v in want.items() if k not in untouched
    }
    (kept,) = [g for g in report.groups if g.status == "kept"]
    assert kept.group.canonical == "model.decoder.layers.1.experts.down_proj"
    assert name in str(kept.group.reason)


def test_kv_scales_are_kept_per_side_by_default(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4_kvfp8"), tmp_path / "out")
    keys = read_tensors(tmp_path / "out").keys()
    for side in ("model.decoder", "model.encoder.language_model"):
        for layer in (0, 1):
            assert f"{side}.layers.{layer}.self_attn.k_proj.k_scale" in keys
            assert f"{side}.layers.{layer}.self_attn.v_proj.v_scale" in keys


def test_kv_scales_merge_to_the_larger_on_request(copied: Naive, tmp_path: Path) -> None:
    import struct

    src = copied("dg_nvfp4_kvfp8")
    encoder, decoder = "model.encoder.language_model.layers.0.self_attn", "model.decoder.layers.0.self_attn"
    edit_tensors(
        src,
        {
            f"{encoder}.k_proj.k_scale": ("F32", [], struct.pack("<f", 3.5)),
            f"{decoder}.k_proj.k_scale": ("F32", [], struct.pack("<f", 0.5)),
        },
    )
    report = tierewrite.rewrite(src, tmp_path / "out", kv_scales="merge")
    tensors = read_tensors(tmp_path / "out")
    assert tensors[f"{decoder}.k_proj.k_scale"] == ("F32", [], struct.pack("<f", 3.5))
    assert not [key for key in tensors if "encoder" in key and key.endswith(("k_scale", "v_scale"))]
    # layer 1 is a full-attention layer: it has a v_scale but no v_proj.weight
    assert "model.decoder.layers.1.self_attn.v_proj.v_scale" in tensors
    assert "model.decoder.layers.1.self_attn.v_proj.weight" not in tensors
    assert any("k_proj.k_scale" in warning and "7" in warning for warning in report.warnings)


def test_kv_bias_that_differs_keeps_the_layer_apart(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4_kvfp8")
    encoder, decoder = "model.encoder.language_model.layers.0.self_attn", "model.decoder.layers.0.self_attn"
    edit_tensors(
        src,
        {
            f"{encoder}.k_proj.k_bias": ("F32", [1], b"\0\0\0\0"),
            f"{decoder}.k_proj.k_bias": ("F32", [1], b"\0\0\x80\x3f"),
        },
    )
    before = digests(src)
    report = tierewrite.rewrite(src, tmp_path / "out", kv_scales="merge")
    after = digests(tmp_path / "out")
    kv = [k for k in before if ".layers.0." in k and k.endswith(("k_scale", "v_scale", "k_bias"))]
    assert {k: after.get(k) for k in kv} == {k: before[k] for k in kv}
    assert any("biases" in warning for warning in report.warnings)
    assert not [k for k in after if "encoder.language_model.layers.1." in k and k.endswith("_scale") and "_proj.k" in k]


def test_kv_bias_that_is_equal_is_merged(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4_kvfp8")
    encoder, decoder = "model.encoder.language_model.layers.0.self_attn", "model.decoder.layers.0.self_attn"
    tensors = read_tensors(src)
    same = {}
    for name in ("k_proj.k_scale", "v_proj.v_scale"):
        same[f"{encoder}.{name}"] = tensors[f"{decoder}.{name}"]
    bias = ("F32", [1], b"\0\0\x80\x3f")
    edit_tensors(src, {**same, f"{encoder}.k_proj.k_bias": bias, f"{decoder}.k_proj.k_bias": bias})
    tierewrite.rewrite(src, tmp_path / "out", kv_scales="merge")
    after = read_tensors(tmp_path / "out")
    assert after[f"{decoder}.k_proj.k_bias"] == bias
    assert not [k for k in after if k.startswith(encoder) and k.endswith(("k_scale", "v_scale", "k_bias"))]


def test_input_scale_missing_on_the_canonical_side_is_taken_from_the_alias(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    suffix = "layers.0.experts.3.up_proj.input_scale"
    value = read_tensors(src)[f"model.encoder.language_model.{suffix}"]
    edit_tensors(src, {f"model.decoder.{suffix}": None})
    tierewrite.rewrite(src, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    assert tensors[f"model.decoder.{suffix}"] == value
    assert f"model.encoder.language_model.{suffix}" not in tensors
    assert tensors.keys() == right_answer("dg_nvfp4").keys()


def test_never_calibrated_scale_keeps_the_canonical_bytes_and_says_so(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    suffix = "layers.0.experts.3.up_proj.input_scale"
    edit_tensors(
        src,
        {
            f"model.decoder.{suffix}": ("F32", [], b"\0\0\0\0"),
            f"model.encoder.language_model.{suffix}": ("F32", [], b"\0\0\xc0\x7f"),  # NaN
        },
    )
    report = tierewrite.rewrite(src, tmp_path / "out")
    assert read_tensors(tmp_path / "out")[f"model.decoder.{suffix}"] == ("F32", [], b"\0\0\0\0")
    assert any("never calibrated" in warning for warning in report.warnings)
    (scale,) = [s for s in report.scales if not s.calibrated]
    assert scale.target == f"model.decoder.{suffix}"


def test_unknown_companion_refuses_the_group_and_names_the_suffix(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    key = "model.encoder.language_model.layers.0.mlp.up_proj.input_quantizer._amax"
    edit_tensors(src, {key: ("F32", [], b"\0\0\x80\x3f")})
    with pytest.raises(tierewrite.Refused, match=r"input_quantizer\._amax"):
        tierewrite.rewrite(src, tmp_path / "out")
    tierewrite.rewrite(src, tmp_path / "kept", on_mismatch="keep")
    kept, before = digests(tmp_path / "kept"), digests(src)
    group = [k for k in before if ".layers.0.mlp.up_proj." in k and "vision" not in k]
    assert len(group) == 9
    assert {k: kept.get(k) for k in group} == {k: before[k] for k in group}


def test_equal_but_undeclared_tensors_are_both_kept(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    tensors = read_tensors(src)
    twin = tensors["model.layers.0.self_attn.q_proj.weight"]
    edit_tensors(src, {"model.layers.1.self_attn.q_proj.weight": twin})
    tierewrite.rewrite(src, tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert after["model.layers.1.self_attn.q_proj.weight"] == after["model.layers.0.self_attn.q_proj.weight"] == twin


def test_equal_nan_bytes_confirm_a_tie_and_signed_zeros_do_not(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    dtype, shape, data = read_tensors(src)["lm_head.weight"]
    nan, zero, minus = b"\xc0\x7f" + data[2:], b"\0\0" + data[2:], b"\0\x80" + data[2:]
    edit_tensors(src, {"lm_head.weight": (dtype, shape, nan), "model.embed_tokens.weight": (dtype, shape, nan)})
    tierewrite.rewrite(src, tmp_path / "nan")
    assert "lm_head.weight" not in read_tensors(tmp_path / "nan")
    edit_tensors(src, {"lm_head.weight": (dtype, shape, zero), "model.embed_tokens.weight": (dtype, shape, minus)})
    with pytest.raises(tierewrite.Refused):
        tierewrite.rewrite(src, tmp_path / "zeros")


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


def test_new_files_have_the_modes_that_the_umask_gives(naive: Naive, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path


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
    with pytest.raises(tierewrite.ConfigError, match="--ties"):
        tierewrite.rewrite(src, tmp_path / "out")
    groups = tierewrite.plan(naive("dg_nvfp4")).groups
    ties = {alias: group.canonical for group in groups for alias in group.aliases}
    (tmp_path / "ties.json").write_text(json.dumps(ties))
    report = tierewrite.rewrite(src, tmp_path / "out", ties=tmp_path / "ties.json")
    assert report.ties_source == "ties-file"
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_metadata_clash_keeps_the_first_and_is_reported(tmp_path: Path, copied: Naive) -> None:
    from tests.checkpoints import write_shard

    src = copied("dg_nvfp4_sharded")
    path = src / "model-00002-of-00003.safetensors"
    tensors, _ = read_shard(path)
    write_shard(path, tensors, {"format": "np", "note": "second"})
    report = tierewrite.rewrite(src, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert read_shard(shard)[1] == {"format": "pt", "note": "second"}
    assert any("metadata 'format'" in warning for warning in report.warnings)
