"""What the model says: every source of declarations, its gates, and everything that is refused."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FIXTURES
from tierewrite.bounded_regex import BoundedRegex
from tierewrite.errors import EXIT_SOURCE, EXIT_USAGE, ConfigError, Interrupted, TieFileError
from tierewrite.ties import meta_model
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.patterns import _matches, _tail_of, parameters_of
from tierewrite.ties.scopes import Scopes
from tierewrite.ties.tie import Tie
from tierewrite.ties.tie_map import TieMap

QWEN = json.loads((FIXTURES / "qwen3_tied_bf16" / "naive" / "config.json").read_text())
BART = json.loads((FIXTURES / "bart_bf16" / "naive" / "config.json").read_text())
GEMMA = json.loads((FIXTURES / "dg_bf16" / "naive" / "config.json").read_text())
LLAVA = json.loads((FIXTURES / "llava_tied_bf16" / "naive" / "config.json").read_text())
HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
KEYS = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]


def resolve(config: dict[str, Any], root: Path = Path("nowhere"), **options: Any) -> TieMap:
    return TieMap.resolve(root, config, **options)


def pairs(ties: TieMap) -> dict[str, str]:
    return {tie.alias: tie.canonical for tie in ties.ties}


def ties_file(folder: Path, content: Any) -> Path:
    path = folder / "ties.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- the class


def test_the_class_named_in_architectures_declares_the_ties() -> None:
    ties = resolve(QWEN)
    assert ties.ties == (Tie("lm_head.weight", "model.embed_tokens.weight", "class Qwen3ForCausalLM"),)
    assert (ties.source, ties.detail) == ("class", "Qwen3ForCausalLM")


def test_nested_submodels_declare_their_own_ties_and_chains_end_at_one_root() -> None:
    ties = resolve(GEMMA)
    found = pairs(ties)
    assert found["lm_head.weight"] == "model.decoder.embed_tokens.weight"
    assert found["model.encoder.language_model.embed_tokens.weight"] == "model.decoder.embed_tokens.weight"
    assert found["model.encoder.language_model.layers.1.router.scale"] == "model.decoder.layers.1.router.scale"
    assert (
        found["model.encoder.language_model.layers.0.experts.down_proj"] == "model.decoder.layers.0.experts.down_proj"
    )
    assert not any("layer_scalar" in name for name in found)
    assert not set(found) & set(found.values())
    origins = {tie.alias: tie.origin for tie in ties.ties}
    assert origins["lm_head.weight"] == "class DiffusionGemmaForBlockDiffusion"
    assert origins["model.encoder.language_model.norm.weight"] == "class DiffusionGemmaModel at 'model'"


def test_several_aliases_of_one_canonical_are_all_declared() -> None:
    assert pairs(resolve(BART)) == {
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    }


@pytest.mark.parametrize("off", [False, None])
def test_tie_word_embeddings_off_declares_nothing(off: bool | None) -> None:
    config = {**QWEN, "tie_word_embeddings": False}
    if off is None:
        del config["tie_word_embeddings"]
        from transformers import Qwen3Config

        expected = HEAD if Qwen3Config().tie_word_embeddings else {}
        assert pairs(resolve(config)) == expected
    else:
        assert pairs(resolve(config)) == {}


def test_the_gate_of_a_composite_is_the_one_that_transformers_reads() -> None:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    for top in (True, False):
        for text in (True, False):
            config = {**LLAVA, "tie_word_embeddings": top}
            config["text_config"] = {**LLAVA["text_config"], "tie_word_embeddings": text}
            with torch.device("meta"):
                model = LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(config)))
            assert pairs(resolve(config)) == model.all_tied_weights_keys


def test_t5_ties_whatever_its_config_says() -> None:
    from transformers import T5Config

    config = T5Config(num_layers=1, d_model=16, d_kv=8, d_ff=16, num_heads=2, vocab_size=32).to_dict()
    config.update(architectures=["T5ForConditionalGeneration"], tie_word_embeddings=False)
    assert set(pairs(resolve(config))) >= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def test_tied_biases_are_parameters_like_any_other() -> None:
    from transformers import BertConfig

    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16).to_dict()
    config["architectures"] = ["BertForMaskedLM"]
    assert pairs(resolve(config)) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def test_patterns_and_module_names_expand_as_transformers_expands_them() -> None:
    import torch
    from transformers import DFineConfig, DFineForObjectDetection

    config = json.loads(DFineConfig(decoder_layers=3).to_json_string(use_diff=False))
    config["architectures"] = ["DFineForObjectDetection"]
    with torch.device("meta"):
        model = DFineForObjectDetection(DFineConfig(decoder_layers=3))
    found = pairs(resolve(config))
    assert set(found) == set(model.all_tied_weights_keys)
    assert any(re.match(r".*class_embed\.1\.bias", name) for name in found)
    assert not set(found) & set(found.values())


def test_without_architectures_automodel_picks_the_class() -> None:
    config = {k: v for k, v in BART.items() if k != "architectures"}
    ties = resolve(config)
    assert ties.detail == "BartModel"
    assert pairs(ties) == {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def test_quantization_and_kernel_settings_do_not_keep_a_class_from_being_asked() -> None:
    config = {
        **QWEN,
        "quantization_config": {"quant_method": "no_such_method"},
        "dtype": "float5",
        "attn_implementation": "flash_attention_9",
        "_attn_implementation": "kernels-community/no-such-kernel",
    }
    assert pairs(resolve(config)) == HEAD


def test_a_config_with_infinities_is_read_as_transformers_reads_it() -> None:
    from transformers import Mamba2Config

    config = json.loads(Mamba2Config(num_hidden_layers=1, tie_word_embeddings=True).to_json_string(use_diff=False))
    config["architectures"] = ["Mamba2ForCausalLM"]
    assert "__float__" in json.dumps(config)
    assert pairs(resolve(config)) == {"lm_head.weight": "backbone.embeddings.weight"}


def test_a_live_model_gives_the_same_ties_as_its_config() -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        live = TieMap.from_model(Qwen3ForCausalLM(Qwen3Config.from_dict(dict(QWEN))))
    assert live.ties == resolve(QWEN).ties
    assert TieMap.from_json(json.loads(json.dumps(live.to_json()))).ties == live.ties


# --- what asking must not do


def test_asking_the_class_is_silent_and_leaves_every_setting_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import transformers
    from huggingface_hub import constants
    from transformers import PreTrainedModel

    logger = logging.getLogger("transformers")
    before = (
        constants.HF_HUB_OFFLINE,
        list(logger.handlers),
        logger.propagate,
        PreTrainedModel.get_expanded_tied_weights_keys,
        transformers.logging.get_verbosity(),
    )
    resolve({**GEMMA, "torch_dtype": "bfloat16"})
    with pytest.raises(ConfigError):
        resolve({**QWEN, "num_hidden_layers": "many"})
    assert before == (
        constants.HF_HUB_OFFLINE,
        list(logger.handlers),
        logger.propagate,
        PreTrainedModel.get_expanded_tied_weights_keys,
        transformers.logging.get_verbosity(),
    )
    assert capfd.readouterr() == ("", "")


def test_the_refusal_of_remote_code_says_where_that_is(tmp_path: Path) -> None:
    remote = {**QWEN, "model_type": "unheard_of", "architectures": ["Thing"]}
    for named, where in (("modeling.Thing", "in the folder"), ("some/one--modeling.Thing", "of some/one on the hub")):
        with pytest.raises(ConfigError, match=f"Python files {where} "):
            resolve({**remote, "auto_map": {"AutoModel": named}}, tmp_path)


def test_the_network_is_never_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert pairs(resolve({**QWEN, "_name_or_path": "some/model"}, tmp_path)) == HEAD
    remote = {**QWEN, "model_type": "unheard_of", "auto_map": {"AutoModel": "some/repository--modeling.Thing"}}
    with pytest.raises(ConfigError):
        resolve(remote, tmp_path, trust_remote_code=True)


def test_a_ties_file_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = ties_file(tmp_path, HEAD)
    code = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from tierewrite.ties.on_disk import on_disk
        from tierewrite.ties.tie_map import TieMap
        keys = {KEYS!r}
        ties = TieMap.resolve(Path("nowhere"), {{}}, keys=keys, ties=Path({str(path)!r}))
        assert len(on_disk(ties, keys).groups) == 1
        ties = TieMap.resolve(Path("nowhere"), {{"_tied_weights_keys": {HEAD!r}}}, keys=keys)
        assert len(on_disk(ties, keys).groups) == 1
        assert not {{"torch", "transformers"}} & set(sys.modules)
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- --ties FILE


def test_a_ties_file_speaks_first_and_alone(tmp_path: Path) -> None:
    ties = resolve({**QWEN, "architectures": ["NoSuchClass"]}, keys=KEYS, ties=ties_file(tmp_path, HEAD))
    assert pairs(ties) == HEAD
    assert ties.source == "ties-file"
    assert ties.ties[0].origin == "ties.json"


def test_a_ties_file_may_hold_patterns_as_transformers_writes_them(tmp_path: Path) -> None:
    keys = [f"{side}.layers.{i}.mlp.down_proj.{leaf}" for side in ("enc", "dec") for i in (0, 1) for leaf in LEAVES]
    path = ties_file(tmp_path, {r"enc.layers\.(?:[^.]+\.)*weight": r"dec.layers\.(?:[^.]+\.)*weight"})
    assert pairs(resolve({}, keys=keys, ties=path)) == {
        f"enc.layers.{i}.mlp.down_proj.weight": f"dec.layers.{i}.mlp.down_proj.weight" for i in (0, 1)
    }


LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "bias")


def test_a_ties_file_may_hold_module_names(tmp_path: Path) -> None:
    keys = [f"{side}.class_embed.{i}.{leaf}" for side in ("", "model.decoder") for i in (0, 1) for leaf in LEAVES]
    keys = [key.lstrip(".") for key in keys]
    path = ties_file(tmp_path, {"model.decoder.class_embed": "class_embed"})
    assert pairs(resolve({}, keys=keys, ties=path)) == {
        f"model.decoder.class_embed.{i}.{leaf}": f"class_embed.{i}.{leaf}"
        for i in (0, 1)
        for leaf in ("weight", "bias")
    }


def test_a_pattern_pairs_names_by_what_follows_its_head_when_one_side_is_incomplete(tmp_path: Path) -> None:
    keys = ["enc.layers.0.a.weight", "enc.layers.1.a.weight", "enc.layers.2.a.weight", "dec.layers.1.a.weight"]
    path = ties_file(tmp_path, {r"enc.layers\.(?:[^.]+\.)*weight": r"dec.layers\.(?:[^.]+\.)*weight"})
    assert pairs(resolve({}, keys=keys, ties=path)) == {
        f"enc.layers.{i}.a.weight": f"dec.layers.{i}.a.weight" for i in range(3)
    }


def test_overlapping_patterns_name_every_alias_once(tmp_path: Path) -> None:
    keys = ["enc.a.weight", "enc.b.weight", "dec.a.weight", "dec.b.weight"]
    path = ties_file(tmp_path, {r"enc\..*weight": r"dec\..*weight", "enc.a.weight": "dec.a.weight"})
    assert pairs(resolve({}, keys=keys, ties=path)) == {
        "enc.a.weight": "dec.a.weight",
        "enc.b.weight": "dec.b.weight",
    }


def test_chains_in_a_ties_file_end_at_their_root(tmp_path: Path) -> None:
    path = ties_file(tmp_path, {"a.weight": "b.weight", "b.weight": "c.weight", "d.weight": "a.weight"})
    ties = resolve({}, keys=["a.weight", "b.weight", "c.weight", "d.weight"], ties=path)
    assert pairs(ties) == {"a.weight": "c.weight", "b.weight": "c.weight", "d.weight": "c.weight"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"lm_head.weight": null}', "expected the name of a parameter"),
        ('{"lm_head.weight": ""}', "expected the name of a parameter"),
        ('{"lm_head.weight": "lm_head.weight"}', "to itself"),
        ('{"lm_head.weight": "a.weight", "lm_head.weight": "b.weight"}', "twice"),
        ('{"lm_head.(weight": "model.embed_tokens.weight"}', "no regular expression"),
        ('{"nowhere.weight": "model.embed_tokens.weight"}', "matches nothing"),
        ('{"nowhere.*weight": "neither.*weight"}', "matches nothing"),
        ('{"lm_head.weight": "no.such.weight"}', "neither"),
        ('{"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}', "cycle"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_broken_ties_file_is_refused_with_its_reason(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "ties.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(TieFileError, match=said) as caught:
        resolve(QWEN, keys=KEYS, ties=path)
    assert caught.value.exit_code == EXIT_USAGE
    assert str(path) in str(caught.value)


def test_an_absent_ties_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TieFileError, match="cannot be read"):
        resolve(QWEN, keys=KEYS, ties=tmp_path / "none.json")


def test_a_cycle_is_named_member_by_member(tmp_path: Path) -> None:
    path = ties_file(tmp_path, {"a.weight": "b.weight", "b.weight": "c.weight", "c.weight": "a.weight"})
    with pytest.raises(TieFileError, match=re.escape("a.weight -> b.weight -> c.weight -> a.weight")) as caught:
        resolve({}, keys=["a.weight", "b.weight"], ties=path)
    assert caught.value.details["cycle"] == ["a.weight", "b.weight", "c.weight"]


def test_one_entry_of_a_ties_file_that_names_absent_keys_is_a_warning(tmp_path: Path) -> None:
    path = ties_file(tmp_path, {**HEAD, "gone.weight": "also_gone.weight"})
    ties = resolve({}, keys=KEYS, ties=path)
    assert any("gone.weight" in warning for warning in ties.warnings)


def test_a_ties_file_may_speak_of_names_in_memory_where_the_hub_has_others(tmp_path: Path) -> None:
    declared = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    keys = ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    ties = resolve(LLAVA, keys=keys, ties=ties_file(tmp_path, declared))
    assert (pairs(ties), ties.source) == (declared, "ties-file")
    assert on_disk(ties, keys).groups[0].slots == ((keys[1], keys[0]),)


def test_a_ties_file_for_a_checkpoint_that_is_canonical_already_has_nothing_to_do(tmp_path: Path) -> None:
    keys = [key for key in KEYS if key != "lm_head.weight"]
    ties = resolve(QWEN, keys=keys, ties=ties_file(tmp_path, HEAD))
    assert pairs(ties) == HEAD
    alone = resolve({}, keys=keys, ties=ties_file(tmp_path, HEAD))
    assert pairs(alone) == HEAD
    assert "nothing is left to do, unless the aliases are misspelt" in alone.warnings[0]
    with pytest.raises(TieFileError, match="matches nothing"):
        resolve({}, keys=keys, ties=ties_file(tmp_path, {"a.weight": "b.weight"}))


def test_a_signal_while_the_class_is_asked_is_no_answer_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        try:
            raise Interrupted(15)
        except Interrupted as exc:
            raise ValueError("a validator failed") from exc

    monkeypatch.setattr(meta_model, "build", stopped)
    with pytest.raises(Interrupted):
        resolve(QWEN)


# --- config.json


def test_ties_in_config_json_speak_before_the_class() -> None:
    config = {**QWEN, "architectures": ["NoSuchClass"], "_tied_weights_keys": HEAD}
    ties = resolve(config, keys=KEYS)
    assert (pairs(ties), ties.source, ties.ties[0].origin) == (HEAD, "config", "config.json")


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings: false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings: 0"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings: null"),
        ({"text_config": {"tie_word_embeddings": False}}, "text_config.tie_word_embeddings: false"),
        ({"a": {"text_config": {"tie_word_embeddings": False}}}, "a.text_config.tie_word_embeddings: false"),
    ],
)
def test_ties_in_config_json_are_gated_like_all_others(said: dict[str, Any], where: str) -> None:
    ties = resolve({**QWEN, "_tied_weights_keys": HEAD, **said}, keys=KEYS)
    assert (pairs(ties), ties.source) == ({}, "config")
    assert [where in warning for warning in ties.warnings] == [True]


def test_ties_in_config_json_may_speak_of_names_in_memory() -> None:
    keys = ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    declared = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    ties = resolve({**LLAVA, "_tied_weights_keys": declared}, keys=keys)
    assert (pairs(ties), ties.source) == (declared, "config")


def test_a_legacy_list_in_config_json_is_paired_by_the_class() -> None:
    ties = resolve({**QWEN, "_tied_weights_keys": ["lm_head.weight", "odd.bias"]}, keys=KEYS)
    assert pairs(ties) == HEAD
    assert ties.unpaired == ("odd.bias",)


@pytest.mark.parametrize("declared", [{"a": 1}, [1], "lm_head.weight", {"a.weight": "a.weight"}, {"(": "b"}])
def test_malformed_ties_in_config_json_are_refused(declared: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**QWEN, "_tied_weights_keys": declared}, keys=KEYS)
    assert caught.value.exit_code == EXIT_SOURCE


def test_a_cycle_in_config_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="cycle"):
        resolve({**QWEN, "_tied_weights_keys": {"a.weight": "b.weight", "b.weight": "a.weight"}}, keys=KEYS)


# --- classes that cannot be asked


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 4},
        {**QWEN, "architectures": ["Qwen99ForCausalLM"]},
        {**QWEN, "architectures": ["pipeline"]},
        {**QWEN, "architectures": ["os.system"]},
        {**QWEN, "architectures": [7]},
        {**QWEN, "architectures": ["BartForConditionalGeneration"]},
        {**QWEN, "model_type": "qwen99"},
        {**QWEN, "model_type": 3},
        {"model_type": "qwen99"},
        {**QWEN, "auto_map": ["x"]},
        {**QWEN, "num_hidden_layers": "two"},
        {**QWEN, "num_hidden_layers": [2]},
        {**QWEN, "hidden_size": {"a": 1}},
        {**QWEN, "rope_parameters": 5},
        {**LLAVA, "text_config": "none"},
        {**LLAVA, "text_config": {"model_type": "no_such_text"}},
    ],
    ids=range(17),
)
def test_a_config_that_names_no_class_that_can_be_built_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"ties=FILE|expected|takes a") as caught:
        resolve(config)
    assert caught.value.exit_code == EXIT_SOURCE
    assert str(caught.value.file).endswith("config.json")


def test_an_unbuildable_config_is_refused_with_both_versions_and_the_way_out() -> None:
    import transformers

    with pytest.raises(ConfigError) as caught:
        resolve({**QWEN, "transformers_version": "9.1.0", "model_type": "qwen99", "architectures": ["Qwen99"]})
    for part in ("9.1.0", transformers.__version__, "ties=FILE"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 1e12},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"parts": [{"parts": [{"num_experts": 10**9}]}]},
        {"num_labels": 10**9},
        {"encoder_layers": 10**8},
        {"depths": [1, 10**9]},
    ],
    ids=str,
)
def test_sizes_of_no_real_model_are_refused_before_anything_is_built(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta_model, "build", lambda *_: pytest.fail("a model is built"))
    with pytest.raises(ConfigError, match="not believed"):
        resolve({**QWEN, **change})


def test_a_class_that_grows_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_model, "MAX_MODULES", 50)
    with pytest.raises(ConfigError, match="more than 50 modules"):
        resolve({**QWEN, "num_hidden_layers": 40, "layer_types": None})


def test_a_deeply_nested_config_is_refused() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="levels deep"):
        resolve({**QWEN, "extra": deep})


def test_large_vocabularies_and_contexts_are_no_reason_to_refuse() -> None:
    ties = resolve({**QWEN, "vocab_size": 5_000_000, "max_position_embeddings": 100_000_000})
    assert pairs(ties) == HEAD


def test_a_class_that_cannot_be_built_falls_back_to_its_own_plain_declarations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("TimmBackbone requires the timm library")

    monkeypatch.setattr(meta_model, "build", missing)
    ties = resolve(QWEN)
    assert pairs(ties) == HEAD
    assert any("timm" in warning for warning in ties.warnings)
    assert pairs(resolve({**QWEN, "tie_word_embeddings": False})) == {}
    with pytest.raises(ConfigError, match=r"timm.*ties=FILE"):
        resolve(GEMMA | {"architectures": ["DiffusionGemmaModel"]})


# --- remote code

REMOTE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

print("remote code speaks")

class OddConfig(PreTrainedConfig):
    model_type = "odd"
    def __init__(self, vocab_size=16, hidden_size=8, tie_word_embeddings=True, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

class OddModel(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "odd"
    _tied_weights_keys = TIES
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.head
"""


def remote(folder: Path, declared: str) -> dict[str, Any]:
    (folder / "modeling_odd.py").write_text(REMOTE.replace("TIES", declared))
    return {
        "architectures": ["OddModel"],
        "model_type": "odd",
        "auto_map": {"AutoConfig": "modeling_odd.OddConfig", "AutoModel": "modeling_odd.OddModel"},
    }


@pytest.mark.usefixtures("own_modules")
def test_remote_code_is_not_run_without_leave(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = remote(tmp_path, '{"head.weight": "embed.weight"}')
    with pytest.raises(ConfigError, match=r"trust_remote_code=True.*ties=FILE") as caught:
        resolve(config, tmp_path)
    assert caught.value.exit_code == EXIT_SOURCE
    assert "remote code speaks" not in capfd.readouterr().out


@pytest.mark.usefixtures("own_modules")
def test_remote_code_declares_its_ties_when_trusted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = remote(tmp_path, '{"head.weight": "embed.weight"}')
    ties = resolve(config, tmp_path, trust_remote_code=True)
    assert pairs(ties) == {"head.weight": "embed.weight"}
    assert capfd.readouterr().out == ""
    assert pairs(resolve({**config, "tie_word_embeddings": False}, tmp_path, trust_remote_code=True)) == {}


@pytest.mark.usefixtures("own_modules")
def test_legacy_lists_are_paired_with_the_input_embedding_or_reported(tmp_path: Path) -> None:
    config = remote(tmp_path, '["head.weight", "head.bias"]')
    ties = resolve(config, tmp_path, trust_remote_code=True)
    assert pairs(ties) == {"head.weight": "embed.weight"}
    assert ties.unpaired == ("head.bias",)
    assert any("head.bias" in warning for warning in ties.warnings)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    "code", ["raise RuntimeError('no')", "import no_such_package_at_all", "def", "raise SystemExit(3)"]
)
def test_remote_code_that_fails_is_the_sources_fault(tmp_path: Path, code: str) -> None:
    config = remote(tmp_path, "{}")
    (tmp_path / "modeling_odd.py").write_text(code)
    with pytest.raises(ConfigError, match="remote code"):
        resolve(config, tmp_path, trust_remote_code=True)


NO_MODELS = {
    "a class": "class OddModel: pass",
    "a module of torch's": "class OddModel(torch.nn.Module): pass",
    "a function": "OddModel = lambda config: None",
    "a number": "OddModel = 3",
}


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("code", NO_MODELS.values(), ids=NO_MODELS)
def test_remote_code_that_is_no_model_of_transformers_cannot_be_asked(tmp_path: Path, code: str) -> None:
    config = remote(tmp_path, "{}")
    with (tmp_path / "modeling_odd.py").open("a") as file:
        file.write(f"\n{code}\n")
    with pytest.raises(ConfigError, match=r"OddModel is no class of a transformers model.*ties=FILE"):
        resolve(config, tmp_path, trust_remote_code=True)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("declared", ["7", "{1: 2}", '{"head.weight": None}', '{b"head.weight": "embed.weight"}'])
def test_remote_code_whose_ties_are_no_names_is_the_sources_fault(tmp_path: Path, declared: str) -> None:
    with pytest.raises(ConfigError, match="OddModel"):
        resolve(remote(tmp_path, declared), tmp_path, trust_remote_code=True)


def test_code_beside_a_class_that_transformers_has_is_not_needed() -> None:
    config = {**QWEN, "auto_map": {"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"}}
    assert pairs(resolve(config)) == HEAD


# --- parameters that keys speak of


def test_companions_never_count_as_parameters() -> None:
    module = "layers.0.mlp.down_proj"
    keys = [
        f"{module}.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    ]
    assert list(parameters_of(keys)) == [f"{module}.weight"]
    assert list(parameters_of([f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")])) == [
        f"{module}.weight"
    ]
    assert list(parameters_of([f"{module}.{leaf}" for leaf in LEAVES])) == [f"{module}.weight", f"{module}.bias"]


def test_a_scale_that_no_weight_stands_beside_is_a_parameter() -> None:
    keys = ["router.scale", "router.per_expert_scale", "router.proj.weight"]
    assert set(parameters_of(keys)) == set(keys)


def test_unpacked_experts_speak_of_the_fused_parameters() -> None:
    keys = [f"mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up", "down")]
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(parameters_of(keys))
    plain = [f"mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("up", "down")]
    assert "mlp.experts.gate_up_proj" not in parameters_of(plain)
    assert {"mlp.experts.up_proj", "mlp.experts.down_proj"} <= set(parameters_of(plain))


@pytest.mark.parametrize("declared", [{"b": "a"}, {"b.experts": "a.experts"}, {r"b\.(.*)": r"a\.(.*)"}])
@pytest.mark.parametrize("projections", [("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)])
def test_a_pattern_ties_the_experts_of_a_layer_as_one_parameter(
    projections: tuple[str, ...], declared: dict[str, str]
) -> None:
    """Expert by expert and once more as the parameter that they may be, of which nothing was left on disk."""
    keys = [f"{side}.experts.{e}.{p}.weight" for side in "ab" for e in (0, 1) for p in (*projections, "down_proj")]
    disk = on_disk(TieMap.from_mapping(declared, keys), keys)
    fused = "up_proj" if projections == ("up_proj",) else "gate_up_proj"
    assert {group.id for group in disk.groups} == {f"a.experts.{fused}", "a.experts.down_proj"}
    assert (disk.idle, disk.warnings) == ((), ())


# --- what only saves time


@pytest.mark.parametrize(
    "pattern",
    [
        r"a\.(?:[^.]+\.)*weight",
        r"a.*\.weight",
        r"a.b.(weight|bias)",
        r"a.b.weight|a.b.bias",
        r"a\.\w\.\weight",
        r"a\.b\.\x77eight",
        r"a\.[b].w?",
        r"a\.b\.w[a-z]+",
        r"a\.b\.weight(?<=weight)",
        r"(a)\.(b)\..*t",
        r".*",
        r"a\.b",
    ],
)
def test_a_pattern_finds_what_it_finds_without_the_look_at_its_end(pattern: str) -> None:
    names = sorted(f"{a}.{b}.{leaf}" for a in "ab" for b in "bc" for leaf in ("weight", "bias", "w", "xeight", "weigh"))
    names += [f"{name}.{below}" for name in names for below in ("weight", "x")]
    plain = re.compile(f"(?:{pattern})(?=\\.|\\Z)")
    assert _matches(pattern, names, None, TieFileError) == [name for name in names if plain.match(name)]


def test_the_end_of_a_pattern_is_known_where_nothing_can_change_it() -> None:
    def tail(pattern: str) -> str:
        return _tail_of(BoundedRegex(pattern), pattern)

    assert tail(r"a.layers\.(?:[^.]+\.)*per_expert_scale") == "per_expert_scale"
    for pattern in (r"a|b", r"\weight", r"a\x41b", r"a.b?", r"a(b)", r"a.b{2}", r"(?i)a.b", r"(?x)a b"):
        assert tail(pattern) == "", pattern


def test_a_scope_is_what_some_key_lies_below() -> None:
    scopes = Scopes(["a.b.c", "a.bb", "d", ".e", "f..g", "h."])
    paths = ("", "a", "a.b", "a.b.c", "a.bb", "b", "d", ".e", "e", "f", "f.", "h", "h.", "z")
    assert {path for path in paths if path in scopes} == {"a", "a.b", "f", "f.", "h"}
