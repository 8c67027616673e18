"""A state dict in memory: the result, proof and report of a rewrite on disk, and not a copy more than needed."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

import tierewrite
from tests.checkpoints import FIXTURES, digests, right_answer
from tierewrite.in_memory import _described, dedupe_state_dict

CASES = sorted(path.parent.name for path in FIXTURES.glob("*/right_answer.json"))
StateDict = dict[str, torch.Tensor]


def loaded(case: str, device: str = "cpu") -> StateDict:
    """All tensors of a naive fixture, in the order of its files."""
    from safetensors import safe_open

    found: StateDict = {}
    for path in sorted((FIXTURES / case / "naive").glob("*.safetensors")):
        with safe_open(path, framework="pt", device=device) as shard:
            found.update({name: shard.get_tensor(name) for name in shard.offset_keys()})
    return found


def config_of(case: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(FIXTURES / case / "naive")


def content(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def answer_of(state_dict: StateDict) -> dict[str, dict[str, Any]]:
    """name -> dtype, shape and BLAKE3, with the dtype's name and the bytes as safetensors itself writes them."""
    from safetensors.torch import save

    found = {}
    for name, tensor in state_dict.items():
        file = save({"t": tensor.detach().cpu().contiguous()})
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])["t"]
        found[name] = {
            "dtype": header["dtype"],
            "shape": header["shape"],
            "blake3": blake3(file[8 + length :]).hexdigest(),
        }
    return found


def tiny_qwen(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **heads, **changes}))


TIE = {"lm_head.weight": "model.embed_tokens.weight"}


def untied(model: Any) -> StateDict:
    """The model's state dict as a conversion script may have it: the head a tensor of its own."""
    state_dict = dict(model.state_dict())
    state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"].clone()
    return state_dict


# --- the result


@pytest.mark.parametrize("case", CASES)
def test_result_equals_the_right_answer_of_the_rewrite_on_disk(case: str) -> None:
    result, _ = dedupe_state_dict(loaded(case), config_of(case))
    assert answer_of(result) == right_answer(case)


@pytest.mark.parametrize(
    "case", ["dg_nvfp4", "dg_nvfp4_kvfp8", "bart_bf16", "llmcompressor_nvfp4_dg", "mixtral_tied_bf16"]
)
def test_report_is_that_of_the_rewrite_on_disk(case: str, tmp_path: Path) -> None:
    expected = tierewrite.rewrite(FIXTURES / case / "naive", tmp_path / "out", kv_scales="merge").to_json()
    _, report = dedupe_state_dict(loaded(case), config_of(case), kv_scales="merge")
    found = report.to_json()
    for name in ("schema", "options", "ties", "formats", "counts", "ratios", "groups", "warnings"):
        assert found[name] == expected[name], name
    for side in ("before", "after"):
        assert found[side]["bytes"] == expected[side]["bytes"]
        assert found[side]["tensors"] == expected[side]["tensors"]


def test_the_report_speaks_of_no_files() -> None:
    _, report = dedupe_state_dict(loaded("qwen3_tied_bf16"), config_of("qwen3_tied_bf16"))
    head, *_, last = str(report).splitlines()
    assert head.split() == ["tensor", "bytes", "tensors"]
    assert last.startswith("state dict: 72.44 KiB -> 54.44 KiB (-24.8%); hashed on ")
    assert "written" not in str(report)


def test_survivors_are_the_very_objects_and_only_merged_scales_are_new() -> None:
    state_dict = loaded("dg_nvfp4")
    result, report = dedupe_state_dict(state_dict, config_of("dg_nvfp4"))
    given = {id(tensor) for tensor in state_dict.values()}
    new = {name for name, tensor in result.items() if id(tensor) not in given}
    assert new <= {scale.target for scale in report.scales}
    assert all(result[name].numel() == 1 for name in new)
    changed = {s.target for s in report.scales if content(result[s.target]) != content(state_dict[s.sources[0]])}
    assert new == changed
    assert new


def test_input_is_not_changed() -> None:
    state_dict = loaded("dg_nvfp4")
    before = {name: (id(tensor), content(tensor)) for name, tensor in state_dict.items()}
    dedupe_state_dict(state_dict, config_of("dg_nvfp4"))
    assert {name: (id(tensor), content(tensor)) for name, tensor in state_dict.items()} == before


def test_merged_scale_is_the_largest_of_the_sides() -> None:
    state_dict = loaded("dg_nvfp4")
    result, report = dedupe_state_dict(state_dict, config_of("dg_nvfp4"))
    assert len(report.scales) == 37
    for scale in report.scales:
        assert len(scale.sources) == 2
        assert result[scale.target].item() == max(state_dict[source].item() for source in scale.sources)
        assert result[scale.target].shape == state_dict[scale.sources[0]].shape


def test_result_keeps_the_order_of_the_input_with_canonical_names() -> None:
    state_dict = loaded("dg_nvfp4")
    config = config_of("dg_nvfp4")
    actions = tierewrite.plan(FIXTURES / "dg_nvfp4" / "naive").tensors
    result, _ = dedupe_state_dict(state_dict, config)
    assert list(result) == [actions[name].target for name in state_dict if actions[name].action != "drop"]
    backwards, _ = dedupe_state_dict(dict(reversed(state_dict.items())), config)
    assert list(backwards) == [actions[n].target for n in reversed(state_dict) if actions[n].action != "drop"]
    assert {name: content(tensor) for name, tensor in backwards.items()} == {
        name: content(tensor) for name, tensor in result.items()
    }


def test_kv_scales_stay_on_both_sides_unless_asked_to_merge() -> None:
    state_dict, config = loaded("dg_nvfp4_kvfp8"), config_of("dg_nvfp4_kvfp8")
    both = {name for name in state_dict if name.endswith(("k_scale", "v_scale"))}
    kept, _ = dedupe_state_dict(state_dict, config)
    assert both <= kept.keys()
    merged, _ = dedupe_state_dict(state_dict, config, kv_scales="merge")
    canonical = {name for name in both if ".encoder." not in name}
    assert canonical
    assert both & merged.keys() == canonical


def test_canonical_state_dict_comes_back_as_it_is() -> None:
    once, _ = dedupe_state_dict(loaded("dg_nvfp4"), config_of("dg_nvfp4"))
    twice, report = dedupe_state_dict(once, config_of("dg_nvfp4"))
    assert list(twice) == list(once)
    assert all(twice[name] is once[name] for name in once)
    assert report.count("rewritten") == 0


def test_module_versions_of_an_ordered_state_dict_are_carried_over() -> None:
    model = tiny_qwen()
    state_dict = model.state_dict()
    assert isinstance(state_dict, OrderedDict)
    result, _ = dedupe_state_dict(state_dict, model)
    assert result._metadata == state_dict._metadata  # type: ignore[attr-defined]
    assert model.load_state_dict(result, strict=False).unexpected_keys == []


# --- who declares the ties


def test_a_model_its_config_a_mapping_and_a_tie_map_say_the_same() -> None:
    model = tiny_qwen()
    state_dict = untied(model)
    model.config.architectures = ["Qwen3ForCausalLM"]
    for ties in (model, model.config, TIE, tierewrite.TieMap.from_model(model)):
        result, report = dedupe_state_dict(state_dict, ties)
        assert list(result) == [name for name in state_dict if name != "lm_head.weight"]
        assert [g.group.aliases for g in report.groups] == [("lm_head.weight",)]


def test_a_config_that_names_no_class_is_refused_rather_than_believed_to_tie_nothing() -> None:
    model = tiny_qwen()
    assert model.config.architectures is None
    with pytest.raises(tierewrite.UsageError, match="names no architectures"):
        dedupe_state_dict(untied(model), model.config)


def test_a_model_on_the_meta_device_may_declare_the_ties_of_a_real_state_dict() -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    config = config_of("dg_nvfp4")
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    ties = tierewrite.TieMap.from_model(model)
    assert {tie.canonical for tie in ties.ties} >= {"model.decoder.layers.0.mlp.down_proj.weight"}
    result, _ = dedupe_state_dict(loaded("dg_nvfp4"), model)
    assert answer_of(result) == right_answer("dg_nvfp4")


def test_wrapped_models_are_unwrapped() -> None:
    model = tiny_qwen()
    state_dict = untied(model)

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    for wrapped in (Wrapper(), torch.compile(model)):
        result, _ = dedupe_state_dict(state_dict, wrapped)
        assert "lm_head.weight" not in result


def test_a_model_with_its_ties_switched_off_keeps_equal_tensors() -> None:
    model = tiny_qwen(tie_word_embeddings=False)
    state_dict = untied(model)
    result, report = dedupe_state_dict(state_dict, model)
    assert list(result) == list(state_dict)
    assert report.groups == ()


def test_mapping_may_hold_patterns_as_a_ties_file_does() -> None:
    pattern = r"model\.encoder\.language_model\.layers\.(?:[^.]+\.)*weight"
    canonical = r"model\.decoder\.layers\.(?:[^.]+\.)*weight"
    result, _ = dedupe_state_dict(loaded("dg_bf16"), {pattern: canonical})
    stem = "model.encoder.language_model.layers"
    assert not any(name.startswith(stem) and name.endswith("weight") for name in result)


def test_mapping_that_matches_nothing_or_goes_in_circles_is_an_error() -> None:
    state_dict = untied(tiny_qwen())
    with pytest.raises(tierewrite.TieFileError, match="mapping of ties matches nothing"):
        dedupe_state_dict(state_dict, {"no.such.weight": "nor.such.weight"})
    with pytest.raises(tierewrite.TieFileError, match="cycle"):
        dedupe_state_dict(state_dict, {**TIE, "model.embed_tokens.weight": "lm_head.weight"})


@pytest.mark.parametrize("ties", [None, "Qwen/Qwen3-0.6B", torch.nn.Linear(2, 2)])
def test_what_declares_no_ties_is_a_usage_error_that_says_what_to_pass(ties: Any) -> None:
    with pytest.raises(tierewrite.UsageError, match=r"mapping \{alias: canonical\}"):
        dedupe_state_dict(untied(tiny_qwen()), ties)


@pytest.mark.parametrize("option", [{"on_mismatch": "repack"}, {"kv_scales": "max"}, {"device": "tpu"}])
def test_unknown_choices_are_usage_errors(option: dict[str, str]) -> None:
    with pytest.raises(tierewrite.UsageError, match=next(iter(option))):
        dedupe_state_dict({}, TIE, **option)  # type: ignore[arg-type]


# --- confirmed by content


def test_diverged_head_is_refused_and_both_are_named() -> None:
    with pytest.raises(tierewrite.Refused, match=r"'model\.embed_tokens\.weight' and 'lm_head\.weight' ") as error:
        dedupe_state_dict(loaded("qwen3_tied_but_diverged_bf16"), config_of("qwen3_tied_but_diverged_bf16"))
    assert 'on_mismatch="keep"' in str(error.value)
    assert [g["canonical"] for g in error.value.details["groups"]] == ["model.embed_tokens.weight"]


def test_keep_leaves_both_sides_of_a_diverged_group_and_rewrites_the_rest() -> None:
    state_dict = loaded("dg_nvfp4")
    stem = "model.encoder.language_model.layers.0.mlp.up_proj"
    changed = state_dict[f"{stem}.weight"].clone()
    changed.view(-1)[0] ^= 1
    state_dict[f"{stem}.weight"] = changed
    result, report = dedupe_state_dict(state_dict, config_of("dg_nvfp4"), on_mismatch="keep")
    whole, _ = dedupe_state_dict(loaded("dg_nvfp4"), config_of("dg_nvfp4"))
    extra = result.keys() - whole.keys()
    assert extra == {f"{stem}.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale")}
    assert result[f"{stem}.weight"] is changed
    assert report.count("kept") == 1


def test_equal_bytes_that_hold_a_nan_are_one_and_a_negative_zero_is_not_zero() -> None:
    table = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    result, _ = dedupe_state_dict({"a.weight": table, "b.weight": table.clone()}, {"b.weight": "a.weight"})
    assert list(result) == ["a.weight"]
    other = table.clone()
    other[0, 0] = -0.0
    with pytest.raises(tierewrite.Refused, match="differ"):
        dedupe_state_dict({"a.weight": table, "b.weight": other}, {"b.weight": "a.weight"})


def test_equal_bytes_of_another_dtype_or_shape_are_not_one() -> None:
    table = torch.zeros(4, 2, dtype=torch.uint8)
    for other in (table.clone().view(torch.int8), table.clone().reshape(2, 4)):
        with pytest.raises(tierewrite.Refused):
            dedupe_state_dict({"a.weight": table, "b.weight": other}, {"b.weight": "a.weight"})


def test_tensors_that_are_not_contiguous_are_compared_as_they_would_be_written() -> None:
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    transposed = table.t().contiguous().t()
    strided = torch.arange(48, dtype=torch.float32)[::2].reshape(4, 6) / 2
    assert not transposed.is_contiguous()
    state_dict = {"a.weight": transposed, "b.weight": table, "c.weight": strided}
    result, _ = dedupe_state_dict(state_dict, {"b.weight": "a.weight", "c.weight": "a.weight"})
    assert list(result) == ["a.weight"]
    assert result["a.weight"] is transposed


def test_views_of_one_storage_that_differ_are_not_confused() -> None:
    storage = torch.arange(16, dtype=torch.float32).reshape(4, 4)
    state_dict = {"a.weight": storage, "b.weight": storage.t()}
    with pytest.raises(tierewrite.Refused, match="differ"):
        dedupe_state_dict(state_dict, {"b.weight": "a.weight"})


def test_memory_that_goes_by_two_names_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierewrite.digest.cpu import CpuDigester

    hashed: list[int] = []
    original = CpuDigester.digest_arrays

    def counted(self: CpuDigester, arrays: Any) -> list[bytes]:
        arrays = list(arrays)
        hashed.extend(len(array) for array in arrays)
        return original(self, arrays)

    monkeypatch.setattr(CpuDigester, "digest_arrays", counted)
    model = tiny_qwen()
    state_dict = dict(model.state_dict())
    head = state_dict["lm_head.weight"]
    assert head.data_ptr() == state_dict["model.embed_tokens.weight"].data_ptr()
    result, _ = dedupe_state_dict(state_dict, model)
    assert "lm_head.weight" not in result
    assert hashed == [head.numel() * head.element_size()]


def test_an_alias_that_stands_alone_takes_the_canonical_name_without_a_copy() -> None:
    state_dict = untied(tiny_qwen())
    head = state_dict["lm_head.weight"]
    del state_dict["model.embed_tokens.weight"]
    result, _ = dedupe_state_dict(state_dict, TIE)
    assert result["model.embed_tokens.weight"] is head
    assert "lm_head.weight" not in result


def test_empty_state_dict_of_the_other_ranks_comes_back_empty() -> None:
    for ties in (TIE, tiny_qwen()):
        result, report = dedupe_state_dict({}, ties)
        assert result == {}
        assert report.before_tensors == report.after_tensors == 0


def test_every_dtype_is_called_as_safetensors_calls_it() -> None:
    names = [
        "float64", "float32", "float16", "bfloat16", "complex64", "int64", "int32", "int16", "int8", "bool", "uint64",
        "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
        "float8_e8m0fnu", "float4_e2m1fn_x2",
    ]  # fmt: skip
    state_dict = {n: torch.zeros(2, 4, dtype=torch.uint8).view(getattr(torch, n)) for n in names if "64" not in n}
    state_dict.update({n: torch.zeros(2, 4, dtype=getattr(torch, n)) for n in names if "64" in n})
    expected = answer_of(state_dict)
    for name, entry in _described(state_dict, {}).tensors.items():
        assert (entry.dtype, list(entry.shape)) == (expected[name]["dtype"], expected[name]["shape"])
        assert entry.nbytes == len(content(state_dict[name]))


# --- what has no bytes of its own is refused, by name


@pytest.fixture
def one_rank() -> Iterator[None]:
    """torch.distributed with one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def strange(kind: str) -> Any:
    if kind == "meta":
        return torch.empty(4, 4, device="meta")
    if kind == "sparse":
        return torch.eye(4).to_sparse()
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8)
    if kind == "nested":
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    if kind == "fake":
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            return torch.empty(4, 4)
    return {"a": 1}


@pytest.mark.parametrize("kind", ["meta", "sparse", "quantized", "nested", "fake", "no tensor"])
def test_a_value_without_bytes_of_its_own_is_refused_by_name(kind: str) -> None:
    state_dict = untied(tiny_qwen())
    state_dict["model.layers.1.mlp.up_proj.weight"] = strange(kind)
    with pytest.raises(tierewrite.UsageError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight'") as error:
        dedupe_state_dict(state_dict, TIE)
    assert error.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_a_key_that_is_no_name_and_a_list_are_refused() -> None:
    with pytest.raises(tierewrite.UsageError, match="no string"):
        dedupe_state_dict({1: torch.zeros(1)}, TIE)  # type: ignore[dict-item]
    with pytest.raises(tierewrite.UsageError, match="expected a mapping"):
        dedupe_state_dict([("a", torch.zeros(1))], TIE)  # type: ignore[arg-type]


# --- FSDP and save_pretrained


@pytest.mark.usefixtures("one_rank")
def test_sharded_state_dict_is_refused_and_told_how_to_gather() -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(tiny_qwen())
    with pytest.raises(tierewrite.UsageError, match="full_state_dict=True"):
        dedupe_state_dict(model.state_dict(), model)


@pytest.mark.usefixtures("one_rank")
def test_full_state_dict_of_an_fsdp_model_is_deduplicated_by_the_model_itself() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = tiny_qwen()
    expected = {name: content(tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    # gathering may leave the head out or make it a tensor of its own; both have to come out the same
    gathered.setdefault("lm_head.weight", gathered["model.embed_tokens.weight"].clone())
    result, report = dedupe_state_dict(gathered, model)
    assert {name: content(tensor) for name, tensor in result.items()} == expected
    assert all(result[name] is gathered[name] for name in result)
    assert report.count("rewritten") == 1


def test_save_pretrained_of_the_result_loads_whole_and_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_qwen().eval()
    result, _ = dedupe_state_dict(untied(model), model)
    expected = answer_of(result)
    model.save_pretrained(tmp_path / "out", state_dict=result)
    assert digests(tmp_path / "out") == expected
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


# --- on a GPU


@pytest.fixture
def on_gpu() -> str:
    pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_tensors_on_a_gpu_give_the_right_answer_without_leaving_it(case: str, on_gpu: str) -> None:
    state_dict = loaded(case, on_gpu)
    result, report = dedupe_state_dict(state_dict, config_of(case), device="cuda")
    assert answer_of(result) == right_answer(case)
    assert all(tensor.device.type == "cuda" for tensor in result.values())
    given = {id(tensor) for tensor in state_dict.values()}
    assert {n for n, t in result.items() if id(t) not in given} <= {scale.target for scale in report.scales}
    assert "CPU" not in report.device


@pytest.mark.gpu
def test_hashing_on_a_gpu_takes_no_copy_of_the_tensors(on_gpu: str) -> None:
    size = 1 << 28
    state_dict = {f"{side}.{i}.weight": torch.full((size // 4,), i, device=on_gpu) for side in "ab" for i in range(4)}
    ties = {f"b.{i}.weight": f"a.{i}.weight" for i in range(4)}
    dedupe_state_dict(state_dict, ties, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    result, _ = dedupe_state_dict(state_dict, ties, device="cuda")
    assert torch.cuda.max_memory_allocated() == before
    assert list(result) == [f"a.{i}.weight" for i in range(4)]


@pytest.mark.gpu
def test_sides_on_different_devices_and_in_different_order_are_confirmed(on_gpu: str) -> None:
    table = torch.arange(1 << 16, dtype=torch.float32).reshape(256, 256)
    state_dict = {
        "a.weight": table.to(on_gpu),
        "b.weight": table.clone(),
        "c.weight": table.t().contiguous().t().to(on_gpu),
    }
    result, _ = dedupe_state_dict(state_dict, {"b.weight": "a.weight", "c.weight": "a.weight"})
    assert list(result) == ["a.weight"]
    assert result["a.weight"] is state_dict["a.weight"]


@pytest.mark.gpu
def test_without_cupy_tensors_on_a_gpu_are_hashed_through_copies(on_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = loaded("dg_nvfp4", on_gpu)
    result, report = dedupe_state_dict(state_dict, config_of("dg_nvfp4"), device="cpu")
    assert answer_of(result) == right_answer("dg_nvfp4")
    assert "CPU" in report.device


class Subclass(torch.Tensor):
    """A dense one, as libraries make for their parameters."""


def without_memory(nbytes: int) -> torch.Tensor:
    """What FSDP leaves of a parameter between two steps."""
    tensor = torch.ones(3, 4)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


ODD = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(2)]), "nested"),
    "uninitialized": (UninitializedParameter, "uninitialized"),
    "uninitialized buffer": (UninitializedBuffer, "uninitialized"),
    "freed": (lambda: without_memory(0), "takes 48 bytes, and its memory has 0"),
    "short": (lambda: without_memory(8), "takes 48 bytes, and its memory has 8"),
    "fake": (fake, "no bytes"),
    "fake parameter": (lambda: torch.nn.Parameter(fake()), "no bytes"),
    "sparse": (lambda: torch.ones(3, 4).to_sparse(), "expected a dense one"),
    "compressed": (lambda: torch.ones(3, 4).to_sparse_csr(), "expected a dense one"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "expected a dense one"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("shared", [False, True])
def test_tensors_without_bytes_are_named(kind: str, shared: bool) -> None:
    """Shared memory must not stand for shared content: two freed tensors both lie at address 0."""
    make, message = ODD[kind]
    odd = make()
    for state in ({"b.weight": odd, "a.weight": odd if shared else torch.ones(3, 4)}, {"b.weight": odd}):
        with pytest.raises(tierewrite.UsageError, match=message) as error:
            tierewrite.dedupe_state_dict(state, {"a.weight": "b.weight"})
        assert error.value.tensor == "b.weight"


def test_tensors_inside_vmap_are_named() -> None:
    caught = []

    def dedupe(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(tierewrite.UsageError) as error:
            tierewrite.dedupe_state_dict({"a.weight": tensor, "b.weight": tensor}, {"a.weight": "b.weight"})
        caught.append(error.value.tensor)
        return tensor

    torch.vmap(dedupe)(torch.ones(2, 3, 4))
    assert caught == ["a.weight"]


@pytest.mark.parametrize("other", [1.0, 2.0])
def test_a_dense_subclass_is_read_as_the_tensor_that_it_is(other: float) -> None:
    odd = torch.ones(3, 4).as_subclass(Subclass)
    state = {"a.weight": torch.full((3, 4), other), "b.weight": odd}
    if other != 1.0:
        with pytest.raises(tierewrite.Refused):
            tierewrite.dedupe_state_dict(state, {"a.weight": "b.weight"})
        return
    found, _ = tierewrite.dedupe_state_dict(state, {"a.weight": "b.weight"})
    assert list(found) == ["b.weight"]
    assert found["b.weight"] is odd


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to(torch.complex64).conj(), lambda x: x.to(torch.complex64).conj().imag, lambda x: x[:, :0],
        lambda x: x.to(torch.complex128), lambda x: x[:1, :1].expand(3, 4), lambda x: x[0, 0], lambda x: x.t(),
    ],
)  # fmt: skip
def test_views_are_compared_by_the_values_that_they_show(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    one, two = make(torch.ones(3, 4)), make(torch.ones(3, 4)).clone()
    found, _ = tierewrite.dedupe_state_dict({"a.weight": one, "b.weight": two}, {"a.weight": "b.weight"})
    assert list(found) == ["b.weight"]
