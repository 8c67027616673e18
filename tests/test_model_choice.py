"""Which class is asked: model_type decides as in transformers, and of several classes the one that takes the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

import tierewrite
from tests import zoo
from tierewrite.errors import EXIT_SOURCE, ConfigError
from tierewrite.formats.numbered import pattern_of
from tierewrite.ties import candidates
from tierewrite.ties.fit import one_of_each_kind
from tierewrite.ties.tie_map import TieMap

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
}
QWEN = {"model_type": "qwen3", "tie_word_embeddings": True, **SIZES}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, **SIZES}
BERT = {**SIZES, "model_type": "bert"}
HEAD = {"lm_head.weight": "model.embed_tokens.weight"}


def keys_of(class_name: str, config: Mapping[str, Any]) -> list[str]:
    """The names that a naive exporter writes for a model of this class: the hub's, aliases included."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    taken = model_class.config_class if config["model_type"] == "" else transformers.AutoConfig.for_model
    built = taken(**{"model_type": config["model_type"], **config})
    with zoo.quiet(), torch.device("meta"):
        model = model_class(built)
        model.tie_weights(recompute_mapping=False)
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
    return list(zoo.hub_checkpoint(model, state, zoo.shared_parameters(model, state)).entries)


def asked(config: Mapping[str, Any], keys: Sequence[str]) -> TieMap:
    return TieMap.resolve(Path("nowhere"), dict(config), keys=keys)


def pairs(ties: TieMap) -> dict[str, str]:
    return {tie.alias: tie.canonical for tie in ties.ties}


QWEN_KEYS = keys_of("Qwen3ForCausalLM", QWEN)


MPT = {"model_type": "mpt", "d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 32}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
EXAONE = {**LLAMA, "model_type": "exaone", "num_layers": 2}


@pytest.mark.parametrize("auto_map", [None, {"AutoModelForCausalLM": "modeling_x.MPTForCausalLM"}])
@pytest.mark.parametrize(
    ("named", "config", "right", "alias"),
    [
        ("MPTForCausalLM", MPT, "MptForCausalLM", "lm_head.weight"),
        ("Ernie4_5_ForCausalLM", {**LLAMA, "model_type": "ernie4_5"}, "Ernie4_5ForCausalLM", "lm_head.weight"),
        ("LLaMAForCausalLM", LLAMA, "LlamaForCausalLM", "lm_head.weight"),
        ("T5WithLMHeadModel", T5, "T5ForConditionalGeneration", "decoder.embed_tokens.weight"),
        ("ExaoneForCausalLM", EXAONE, "LlamaForCausalLM", "lm_head.weight"),
    ],
)
def test_a_class_that_transformers_lacks_is_what_it_has_for_the_model_type(
    named: str, config: dict[str, Any], right: str, alias: str, auto_map: dict[str, str] | None
) -> None:
    config = {"tie_word_embeddings": True, **config}
    keys = keys_of(right, config)
    written = {**config, "architectures": [named], **({"auto_map": auto_map} if auto_map else {})}
    ties = asked(written, keys)
    assert ties.detail == right
    assert alias in pairs(ties)
    assert [right in w and f"{named}, which transformers" in w and "takes all names" in w for w in ties.warnings] == [
        True
    ]


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ({**LLAMA, "architectures": ["LlamaForCausalLMEagle3"]}, ["fc.weight", "d2t", "midlayer.hidden_norm.weight"]),
        ({**QWEN, "architectures": ["Qwen3ForRewardModel"]}, ["score.0.weight", "score.2.weight"]),
        ({**BERT, "architectures": ["JinaBertForMaskedLM"]}, ["bert.encoder.layer.0.mlp.gated_layers.weight"]),
    ],
)
def test_drafts_and_reward_models_with_names_of_their_own_stay_refused(
    config: dict[str, Any], extra: list[str]
) -> None:
    base = {"llama": "LlamaModel", "qwen3": "Qwen3Model", "bert": "BertModel"}[config["model_type"]]
    prefix = "bert." if base == "BertModel" else "model."
    keys = [prefix + key for key in keys_of(base, config)] + extra
    with pytest.raises(ConfigError, match=r"is unknown.*ties=FILE") as caught:
        asked(config, keys)
    assert caught.value.exit_code == EXIT_SOURCE


@pytest.mark.parametrize("written", ["4.1.0", transformers.__version__])
def test_no_other_version_is_advised_where_the_one_that_wrote_it_is_installed(written: str) -> None:
    config = {**QWEN, "architectures": ["NoSuchModel"], "transformers_version": written}
    with pytest.raises(ConfigError) as caught:
        asked(config, [key for key in QWEN_KEYS if "k_norm" not in key])
    assert ("install one that fits" in str(caught.value)) is (written == "4.1.0")


def test_a_class_that_lacks_a_parameter_of_its_own_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        asked({**QWEN, "architectures": ["NoSuchModel"]}, [key for key in QWEN_KEYS if "k_norm" not in key])


def test_another_familys_class_that_transformers_gives_this_type_is_asked_without_a_warning() -> None:
    ties = asked({**EXAONE, "architectures": ["LlamaForCausalLM"]}, keys_of("LlamaForCausalLM", EXAONE))
    assert pairs(ties) == HEAD
    assert ties.warnings == ()


def test_every_class_of_another_family_that_transformers_has_is_taken_for_its_type() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LISTED

    strange = []
    for model_type in ("exaone", "internlm3", "iquestcoder", "glmga", "sarvam_mla", "sarvam_moe"):
        if model_type not in LISTED:
            continue
        registered, config = CONFIG_MAPPING[model_type], {"model_type": model_type}
        found = candidates.named(config, LISTED[model_type], registered, Path("config.json"))
        own = found.model_class.config_class
        assert found.config_class is registered
        strange += [model_type] if not (issubclass(registered, own) or issubclass(own, registered)) else []
    assert {"exaone", "internlm3"} <= set(strange)


@pytest.mark.parametrize("named", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_model_type_decides_where_architectures_contradicts_it(named: str) -> None:
    ties = asked({**QWEN, "architectures": [named]}, QWEN_KEYS)
    assert (ties.detail, pairs(ties)) == ("Qwen3ForCausalLM", HEAD)
    assert f"architectures names {named}, which takes no config of model_type 'qwen3'" in ties.warnings[0]
    with pytest.raises(ConfigError, match=f"architectures names {named}, which takes a"):
        asked({**QWEN, "architectures": [named]}, [*QWEN_KEYS, "score.weight"])


@pytest.mark.parametrize(
    "named", [{}, {"architectures": []}, {"architectures": None}, {"architectures": ["Qwen3Model"]}]
)
def test_a_head_in_the_file_says_that_the_base_class_did_not_write_it(named: dict[str, Any]) -> None:
    ties = asked({**QWEN, **named}, QWEN_KEYS)
    assert (ties.detail, pairs(ties)) == ("Qwen3ForCausalLM", HEAD)
    assert "Qwen3Model has no parameter for 'lm_head.weight'; Qwen3ForCausalLM" in ties.warnings[0]
    headless = [key for key in QWEN_KEYS if key != "lm_head.weight"]
    ties = asked({**QWEN, **named}, headless)
    assert (ties.detail, ties.warnings) == ("Qwen3Model", ())
    ties = asked({**QWEN, **named}, [*QWEN_KEYS, "value_head.weight"])
    assert (ties.detail, pairs(ties)) == ("Qwen3Model", {})
    assert "no other class of its model_type takes all names of the checkpoint: a tie may be missed" in ties.warnings[0]


def test_quantized_names_are_read_as_the_weights_that_they_are() -> None:
    parts = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    keys = [
        other
        for key in QWEN_KEYS
        for other in ([key.replace("weight", part) for part in parts] if "_proj" in key else [key])
    ]
    assert asked({**QWEN, "architectures": ["Qwen3Model"]}, keys).detail == "Qwen3ForCausalLM"


def test_layers_for_further_tokens_say_nothing_against_a_class() -> None:
    config = {**QWEN, "architectures": ["NoSuchModel"], "num_nextn_predict_layers": 1}
    more = ["model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight", "mtp.fc.weight"]
    assert asked(config, [*QWEN_KEYS, *more]).detail == "Qwen3ForCausalLM"
    with pytest.raises(ConfigError, match="is unknown"):
        asked(config, [*QWEN_KEYS, "model.layers.1.eh_proj.weight"])


def test_of_several_architectures_the_first_that_fits_is_asked() -> None:
    ties = asked({**QWEN, "architectures": ["NoSuchModel", "Qwen3ForCausalLM"]}, QWEN_KEYS)
    assert (ties.detail, pairs(ties)) == ("Qwen3ForCausalLM", HEAD)
    assert "NoSuchModel" in ties.warnings[0]
    ties = asked({**QWEN, "architectures": ["Qwen3ForCausalLM", "Qwen3ForSequenceClassification"]}, QWEN_KEYS)
    assert (ties.detail, ties.warnings) == ("Qwen3ForCausalLM", ())


def test_another_head_than_the_one_that_is_named_may_be_in_the_file() -> None:
    ties = asked({**QWEN, "architectures": ["Qwen3ForSequenceClassification"]}, QWEN_KEYS)
    assert (ties.detail, pairs(ties)) == ("Qwen3ForCausalLM", HEAD)
    assert "Qwen3ForSequenceClassification has no parameter for 'lm_head.weight'; Qwen3ForCausalLM" in ties.warnings[0]
    config = {**BERT, "architectures": ["BertForSequenceClassification"]}
    ties = asked(config, keys_of("BertForMaskedLM", BERT))
    assert ties.detail == "BertLMHeadModel"  # AutoModelForCausalLM comes first; BertForMaskedLM ties the same
    headless = [key for key in keys_of("BertModel", BERT) if "pooler" not in key]
    assert asked(config, headless).detail == "BertForSequenceClassification"  # BertModel ties the same


def test_a_class_that_leaves_names_over_does_not_stay_where_the_one_that_takes_them_ties_more() -> None:
    ties = asked({**T5, "architectures": ["T5EncoderModel"]}, keys_of("T5Model", T5))
    assert ties.detail == "T5Model"
    assert "decoder.embed_tokens.weight" in pairs(ties)
    assert "T5EncoderModel has no parameter for 'decoder." in ties.warnings[0]


def test_a_class_that_neither_takes_the_names_nor_finds_its_own_is_doubted_aloud() -> None:
    keys = [*(key for key in QWEN_KEYS if key != "lm_head.weight"), "other_head.weight"]
    ties = asked({**QWEN, "architectures": ["Qwen3ForSequenceClassification"]}, keys)
    assert ties.detail == "Qwen3ForSequenceClassification"
    assert "has no parameter for 'other_head.weight', and no other class of its model_type" in ties.warnings[0]


def test_of_a_class_that_does_not_fit_a_tie_of_one_side_renames_nothing(tmp_path: Path) -> None:
    config = {**QWEN, "architectures": ["Qwen3ForCausalLM"]}
    entry = ("BF16", (32, 16))
    entries = {"lm_head.weight": entry, "encoder.embed.weight": entry}
    zoo.write_headers(tmp_path / "src", zoo.Naive("hub", entries, {}), config)
    plan = tierewrite.plan(tmp_path / "src")
    assert {key: planned.target for key, planned in plan.tensors.items()} == {key: key for key in plan.tensors}
    assert "Qwen3ForCausalLM has no parameter for 'encoder.embed.weight', and no other class" in plan.warnings[0]


def test_where_a_parameter_is_missing_a_head_that_is_not_stored_is_still_tied() -> None:
    keys = [key for key in QWEN_KEYS if key not in ("lm_head.weight", "model.norm.weight")]
    ties = asked({**QWEN, "architectures": ["Qwen3ForCausalLM"]}, keys)
    assert pairs(ties) == HEAD  # else a consumer is said to lack the head, too
    assert "holds nothing for 'model.norm.weight'" in ties.warnings[0]


def test_architectures_may_be_a_text() -> None:
    ties = asked({**QWEN, "architectures": "Qwen3ForCausalLM"}, QWEN_KEYS)
    assert pairs(ties) == HEAD
    assert ties.warnings == ("architectures is the text 'Qwen3ForCausalLM'; it is read as a list of one name",)


def test_a_class_that_leaves_names_over_stays_where_the_one_that_takes_them_ties_the_same() -> None:
    keys = keys_of("BertForPreTraining", BERT)  # its pooler and second head are no part of BertForMaskedLM
    ties = asked({**BERT, "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}, keys)
    assert (ties.detail, ties.warnings) == ("BertForMaskedLM", ())


@pytest.mark.parametrize(("named", "model_type"), [("BarkFineModel", "fine_acoustics"), ("BarkCausalModel", "")])
def test_a_part_of_a_model_whose_type_is_not_registered_is_known_by_its_own_config_class(
    named: str, model_type: str
) -> None:
    config = {"model_type": model_type, "block_size": 8, "num_layers": 1, "num_heads": 2, "hidden_size": 8}
    config |= {"input_vocab_size": 8, "output_vocab_size": 8, "tie_word_embeddings": True}
    ties = asked({**config, "architectures": [named]}, [])
    assert ties.detail == named
    if named == "BarkFineModel":
        assert pairs(ties)["lm_heads.0.weight"] == "input_embeds_layers.1.weight"
    with pytest.raises(ConfigError, match=r"model_type 'other' is unknown"):
        asked({**config, "model_type": "other", "architectures": [named]}, [])


def test_without_keys_config_json_alone_decides() -> None:
    assert asked({**QWEN, "architectures": ["Qwen3Model"]}, []).detail == "Qwen3Model"
    with pytest.raises(ConfigError, match="is unknown"):
        asked({**QWEN, "architectures": ["NoSuchModel"]}, [])


def test_one_name_of_each_kind_stands_for_all() -> None:
    keys = [f"layers.{n}.experts.{e}.up.weight" for n in range(3) for e in range(4)]
    keys += ["layers.0.norm.weight", "lm_head.weight"]
    assert one_of_each_kind(keys) == ["layers.0.experts.0.up.weight", "layers.0.norm.weight", "lm_head.weight"]
    assert pattern_of("a.10.b2.3") == "a.*.b2.*"
    assert one_of_each_kind([]) == []


# --- what remote code ties without declaring it

REMOTE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=16, hidden_size=8, tie_word_embeddings=True, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"
    DECLARED
    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.more = torch.nn.Linear(4, 4)
        MADE
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.head
    OVERRIDE
"""
POST = "self.post_init()"
OVERRIDE = "def tie_weights(self, *args, **kwargs):\n        self.head.weight = self.embed.weight"
OF_VERSION_4 = "def tie_weights(self):\n        self._tie_or_clone_weights(self.head, self.embed)"


def remote(folder: Path, declared: str = "", made: str = POST, override: str = "", **config: Any) -> TieMap:
    code = REMOTE.replace("DECLARED", declared).replace("MADE", made).replace("OVERRIDE", override)
    (folder / "modeling_own.py").write_text(code)
    config = {"architectures": ["OwnModel"], "model_type": "own", **config}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    keys = ["embed.weight", "head.weight", "more.weight", "more.bias"]
    return TieMap.resolve(folder, config, keys=keys, trust_remote_code=True)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    "code",
    [
        {"override": OVERRIDE},
        {"override": OF_VERSION_4},
        {"made": "self.head.weight = self.embed.weight; self.post_init()", "override": OVERRIDE},
        {"declared": '_tied_weights_keys = ["head.weight"]', "made": "pass"},
        {"declared": '_tied_weights_keys = {"head.weight": "embed.weight"}', "made": "pass"},
    ],
    ids=["override", "override of version 4", "made and override", "list without post_init", "dict without post_init"],
)
def test_what_code_ties_when_the_model_is_loaded_is_declared_by_its_class(tmp_path: Path, code: dict[str, str]) -> None:
    ties = remote(tmp_path, **code)
    assert pairs(ties) == {"head.weight": "embed.weight"}
    assert [w for w in ties.warnings if "remote code" not in w] == []


@pytest.mark.usefixtures("own_modules")
def test_modules_that_are_one_object_are_tied(tmp_path: Path) -> None:
    ties = remote(tmp_path, made="self.twin = self.more; self.post_init()")
    assert pairs(ties) == {"twin.weight": "more.weight", "twin.bias": "more.bias"}


@pytest.mark.usefixtures("own_modules")
def test_what_only_the_constructor_ties_is_kept_with_a_warning(tmp_path: Path) -> None:
    # transformers 5 loads each parameter by its name, and fills a missing one with random numbers.
    ties = remote(tmp_path, made="self.head.weight = self.embed.weight; self.post_init()")
    assert pairs(ties) == {}
    assert "the class makes 'head.weight' and 'embed.weight' one parameter without declaring it" in ties.warnings[0]
    assert "--ties FILE" in ties.warnings[0]


@pytest.mark.usefixtures("own_modules")
def test_embeddings_that_the_config_calls_tied_and_nobody_declares_are_said(tmp_path: Path) -> None:
    said = "config.json says tie_word_embeddings true, and 'head.weight' and 'embed.weight' are both stored"
    assert [said in warning for warning in remote(tmp_path, tie_word_embeddings=True).warnings] == [False, True]
    assert len(remote(tmp_path, tie_word_embeddings=False).warnings) == 1


def test_of_transformers_own_classes_nothing_is_taken_by_identity() -> None:
    import transformers

    from tierewrite.ties.tied_in_code import tied_in_code

    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=True))
    before = model.lm_head.weight
    assert tied_in_code(model, {}).pairs == {}
    assert model.lm_head.weight is before
