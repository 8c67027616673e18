"""The generator's checkpoints are what transformers' model has and what the real exporter writes; the bench runs."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.benchmarks import generate as generator
from tests.benchmarks import run, scale
from tests.benchmarks.generate import ALIAS, CANONICAL, PRESETS, Generated, Recipe, generate
from tests.checkpoints import Tensors, read_header, read_tensors

FIXTURE = generator.TEMPLATE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    return generate(tmp_path_factory.mktemp("bench") / "tiny", "tiny")


@pytest.fixture(scope="module")
def tiny_tensors(tiny: Generated) -> Tensors:
    return read_tensors(tiny.path)


def meta_model(recipe: Recipe, folder: Path) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(generator.config(recipe)[0]))
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return transformers.DiffusionGemmaForBlockDiffusion(config)


def unquantized_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """What the recipe writes, as the model's own state dict has it: experts fused, codes unpacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    projections: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for tensor in generator.tensors(recipe):
        expert = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+_proj)\.(\w+)", tensor.name)
        if expert is None:
            shapes[tensor.name] = tensor.shape
        elif expert[3] == "weight":
            out, half = tensor.shape
            projections.setdefault((expert[1], expert[2]), []).append((out, 2 * half))
    for (container, projection), found in projections.items():
        assert len(set(found)) == 1
        (out, inner) = found[0]
        if projection == "down_proj":
            shapes[f"{container}.down_proj"] = (len(found), out, inner)
        elif projection == "gate_proj":
            assert projections[container, "up_proj"] == found
            shapes[f"{container}.gate_up_proj"] = (len(found), 2 * out, inner)
    return shapes


@pytest.mark.parametrize("preset", ["tiny", "1.8gb", "many-10x", "full"])
def test_keys_and_shapes_are_those_of_the_model_that_transformers_builds(preset: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(PRESETS[preset], dense_on_both_sides=True)
    model = meta_model(recipe, tmp_path / "model")
    # the head is the embedding's alias and no exporter writes it
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items() if name != "lm_head.weight"}
    assert unquantized_shapes(recipe) == expected


def test_ties_are_those_that_the_model_class_declares(tmp_path: Path) -> None:
    model = meta_model(PRESETS["tiny"], tmp_path / "model")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    expanded = {}
    for alias, canonical in generator.ties().items():
        for name in names:
            if re.fullmatch(alias, name):
                target = name.replace(ALIAS, CANONICAL) if name.startswith(ALIAS) else canonical
                assert re.fullmatch(canonical, target)
                expanded[name] = target
    assert expanded == dict(model.all_tied_weights_keys)


def test_layout_is_the_real_exporters(tmp_path: Path) -> None:
    """The same keys, dtypes and file order as ModelOpt's own export of a model of these sizes."""
    text = json.loads((FIXTURE / "config.json").read_text())["text_config"]
    recipe = Recipe(
        layers=text["num_hidden_layers"],
        experts=text["num_experts"],
        hidden=text["hidden_size"],
        moe_intermediate=text["moe_intermediate_size"],
        intermediate=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        global_kv_heads=text["num_key_value_heads"],
        global_head_dim=text["per_layer_config"]["1"]["head_dim"],
        vocabulary=text["vocab_size"],
    )
    made = generate(tmp_path / "made", recipe)
    real, _ = read_header(FIXTURE / "model.safetensors")
    ours, _ = read_header(made.path / "model.safetensors")
    assert list(ours.items()) == list(real.items())
    for name in ("config.json", "hf_quant_config.json"):
        ours_config = json.loads((made.path / name).read_text())
        real_config = json.loads((FIXTURE / name).read_text())
        for written in (ours_config, real_config):
            written.get("text_config", {}).pop("per_layer_config", None)
        ours_config.get("text_config", {})["top_k_experts"] = real_config.get("text_config", {}).get("top_k_experts")
        assert ours_config == real_config


def test_both_sides_are_equal_but_for_what_is_the_sides_own(
    tiny_tensors: Tensors,
) -> None:
    pairs = [
        (name, name.replace(ALIAS, CANONICAL))
        for name in tiny_tensors
        if name.startswith(ALIAS) and name.replace(ALIAS, CANONICAL) in tiny_tensors
    ]
    assert len(pairs) == 2 * (8 * 3 * 4 + 1)
    for alias, canonical in pairs:
        own = alias.endswith(("input_scale", "layer_scalar"))
        assert (tiny_tensors[alias] != tiny_tensors[canonical]) == own, alias
        assert tiny_tensors[alias][:2] == tiny_tensors[canonical][:2]


def test_payload_is_random_and_every_scale_valid(
    tiny_tensors: Tensors,
) -> None:
    large = [data for dtype, _, data in tiny_tensors.values() if dtype == "U8"]
    assert len(set(large)) == len(large) // 2
    assert all(len(set(data)) > 200 for data in large)
    for name, (dtype, _, data) in tiny_tensors.items():
        if dtype == "F32":
            (value,) = struct.unpack("<f", data)
            assert 0 < value < float("inf"), name
        elif dtype == "F8_E4M3":
            codes = np.frombuffer(data, np.uint8)
            assert codes.min() >= 0x08, name  # normal
            assert codes.max() < 0x7F, name
        elif dtype == "BF16":
            exponents = np.frombuffer(data, np.uint16) >> 7 & 0xFF
            assert exponents.max() < 0xFF, name


def test_the_same_recipe_gives_the_same_bytes_with_any_number_of_threads(tiny: Generated, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", "tiny", threads=1)
    assert again.shards == tiny.shards == 3
    for path in tiny.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes(), path.name
    other = generate(tmp_path / "other", dataclasses.replace(PRESETS["tiny"], seed=1))
    assert read_tensors(other.path).keys() == read_tensors(tiny.path).keys()
    assert read_tensors(other.path) != read_tensors(tiny.path)


def test_the_full_preset_is_the_published_checkpoint() -> None:
    """26B-A4B, experts only, as published: 28.43 GiB in 4 shards; 16.47 GiB canonical; 567 dense alias keys."""
    recipe = PRESETS["full"]
    everything = list(generator.tensors(recipe))
    assert round(sum(t.nbytes for t in everything) / 2**30, 1) == 28.4
    assert len(list(generator._shards(everything, recipe.max_shard_bytes))) == 4
    experts = [t.name for t in everything if ".experts." in t.name]
    assert len(experts) == 2 * 4 * 30 * 128 * 3
    dense = [t for t in everything if t.name.startswith(ALIAS) and ".experts." not in t.name]
    assert len([t for t in dense if not t.name.endswith("layer_scalar")]) == 567


def test_the_many_presets_hold_the_same_bytes_in_ten_times_the_tensors() -> None:
    once, ten = (list(generator.tensors(PRESETS[name])) for name in ("many-1x", "many-10x"))
    assert 9.9 < len(ten) / len(once) < 10.1
    assert 0.99 < sum(t.nbytes for t in ten) / sum(t.nbytes for t in once) < 1.01


def test_a_headers_only_checkpoint_has_its_full_size_and_no_data(tmp_path: Path) -> None:
    recipe = dataclasses.replace(PRESETS["tiny"], headers_only=True, max_shard_bytes=1 << 40)
    made = generate(tmp_path / "sparse", recipe)
    path = made.path / "model.safetensors"
    entries, start = read_header(path)
    assert path.stat().st_size == start + made.data_bytes
    assert max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__") == made.data_bytes
    assert not any(path.read_bytes()[start:])


def test_a_size_that_nvfp4_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        Recipe(moe_intermediate=70)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        generate(tmp_path, "tiny")


@pytest.mark.long
def test_the_bench_runs_every_comparison_and_keeps_every_sample(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    answer = tmp_path / "bench.json"
    work = tmp_path / "work"
    assert run.main(["--quick", "--work", str(work), "--json", str(answer)]) == 0
    report = json.loads(answer.read_text())
    assert report["schema"] == run.SCHEMA
    samples = {(sample["subject"], sample["case"]): sample for sample in report["samples"]}
    assert {case for subject, case in samples if subject == "tiny"} == {case.name for case in run.cases(["auto"])}
    assert ("tiny-10x", "tierewrite --ties") in samples
    assert ("tiny-plan", "tierewrite plan --ties --json") in samples
    for sample in samples.values():
        assert sample["exit"] == 0 or sample["case"] == "cp --reflink=always output", sample
        assert sample["wall"] > 0
        assert sample["peak"] > 1 << 20
    assert not any(work.iterdir()), "something was left in the working folder"


@pytest.mark.parametrize(
    ("place", "work", "seconds"),
    [
        (scale.Place(1, 2), scale.Work([6.0] * 4, 3.0, 1), 4),
        (scale.Place(2, 1), scale.Work([3.0, 3.0, 2.0, 2.0, 2.0], 1.0, 1), 7),  # the largest first: 3 2 2 and 3 2
        (scale.Place(4, 1), scale.Work([6.0] * 2, 3.0, 1), 2),  # two have nothing to do
        (scale.Place(1, 4, network=6.0), scale.Work([6.0] * 4, 3.0, 1), 4),
        (scale.Place(1, 4, network=6.0), scale.Work([6.0] * 4, 3.0, 2), 8),  # in and out
        (scale.Place(4, 1, network=6.0, bandwidth=8.0), scale.Work([6.0] * 4, 3.0, 2), 6),
        (scale.Place(2, 1), scale.Work([], 3.0, 1), 0),
    ],
)
def test_the_model_of_scale_adds_up(place: scale.Place, work: scale.Work, seconds: float) -> None:
    assert scale.makespan(work, place, 0.0) == pytest.approx(seconds)
    later = 0.5 * -(-len(work.tasks) // (place.nodes * place.cpus))
    assert seconds <= scale.makespan(work, place, 0.5) <= seconds + later + 1e-6


@pytest.mark.long
def test_the_measure_of_scale_runs_and_simulates_again_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    answer, again = tmp_path / "scale.json", tmp_path / "again.json"
    options = ["--preset", "tiny", "--measured-shard", "300000", "--repeats", "1", "--work", str(tmp_path)]
    assert scale.main([*options, "--json", str(answer)]) == 0
    report = json.loads(answer.read_text())
    assert report["schema"] == scale.SCHEMA
    assert [row["run"] for row in report["measured"]] == ["local", "ray, 1 worker", "ray, 2 workers"]
    assert all(row["wall"] > 0 for row in report["measured"])
    assert len(report["runs"]["ray, 2 workers"][0]["written"]) > 2
    assert len(report["simulated"]) == 12
    assert scale.main(["--from", str(answer), "--json", str(again)]) == 0
    assert json.loads(again.read_text())["simulated"] == report["simulated"]
    assert "| 64 | " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "scale.json"]


def test_a_run_that_fails_is_reported_with_its_own_words(tmp_path: Path) -> None:
    made = generate(tmp_path / "made", "tiny")
    bench = run.Bench(tmp_path, Console(quiet=True))
    case = run.Case("sh", lambda s, out: [["sh", "-c", "echo no such luck >&2; exit 7"], ["touch", str(out)]])
    results = bench.rounds({"made": made}, [case], 2)["made"]
    assert [sample.exit for sample in results["sh"].samples] == [7, 7]
    assert "no such luck" in bench.samples[0].error
    assert not (tmp_path / "output").exists()
    assert run.findings(made, results) == []


def test_memory_is_that_of_the_command_and_not_of_who_starts_it(tmp_path: Path) -> None:
    made = generate(tmp_path / "made", "tiny")
    bench = run.Bench(tmp_path, Console(quiet=True))
    ballast = bytearray(b"x") * (100 << 20)
    hog = "x = bytearray(b'x') * (60 << 20)"
    small, large = (
        bench.run(run.Case(name, lambda s, out, code=code: [[sys.executable, "-c", code]]), made, name="made")
        for name, code in (("small", "pass"), ("large", hog))
    )
    assert len(ballast) == 100 << 20
    assert small.peak < 50 << 20
    assert 60 << 20 <= large.peak < 110 << 20


def test_ours_and_the_users_script_do_the_same_job(tiny: Generated, tmp_path: Path) -> None:
    """Otherwise the comparison would compare nothing."""
    pytest.importorskip("torch")
    import tierewrite
    from tests.benchmarks import user_script

    tierewrite.rewrite(tiny.path, tmp_path / "ours", ties=tiny.ties_file)
    user_script.main(tiny.path, tmp_path / "theirs", "save_file")
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert len(ours) == tiny.canonical_tensors
    assert sum(len(data) for _, _, data in ours.values()) == tiny.canonical_bytes
    assert ours == theirs
