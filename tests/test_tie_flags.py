"""`fix_config`: tie_word_embeddings says what is stored, in every (sub)config, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, Tensor, edit_tensors, read_tensors, write_checkpoint
from tierewrite.ties.tie_map import TieMap

ONE, OTHER = Tensor("BF16", [2, 2], bytes(range(8))), Tensor("BF16", [2, 2], bytes(range(1, 9)))
QUANTIZED = {"lm_head.weight": Tensor("F8_E4M3", [2, 2], b"abcd"), "lm_head.weight_scale": Tensor("F32", [], b"1234")}


def told(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewritten(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], ties: dict[str, str]) -> dict[str, Any]:
    """The config of what becomes of `tensors` under a ties file, proved."""
    (folder / "ties.json").write_text(json.dumps(ties))
    options: dict[str, Any] = {"on_mismatch": "keep", "fix_config": True, "ties": folder / "ties.json"}
    src = write_checkpoint(folder / "src", tensors, config=config)
    tierewrite.rewrite(src, folder / "dst", verify=True, **options)
    assert tierewrite.verify(src, folder / "dst", **options).ok
    return told(folder / "dst")


HEAD = {"lm_head.weight": "embed.weight"}
EMBEDDING = {"embed.weight": ONE}


@pytest.mark.parametrize(
    ("head", "before", "after"),
    [
        ({"lm_head.weight": ONE}, False, True),
        ({"lm_head.weight": ONE}, True, True),
        ({"lm_head.weight": OTHER}, True, False),
        ({"lm_head.weight": OTHER}, False, False),
        (QUANTIZED, True, False),
    ],
    ids=["dropped", "dropped, said", "differing", "differing, said", "quantized"],
)
def test_true_where_a_head_was_dropped_false_where_it_was_kept(
    head: dict[str, Tensor], before: bool, after: bool, tmp_path: Path
) -> None:
    config = {"vocab_size": 2, "tie_word_embeddings": before, "last": [1]}
    assert rewritten(tmp_path, {**EMBEDDING, **head}, config, HEAD) == {**config, "tie_word_embeddings": after}


def test_a_subconfig_of_the_same_vocabulary_says_the_same_and_others_are_left(tmp_path: Path) -> None:
    config = {
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True, "vocab_size": 2},
        "vision_config": {"tie_word_embeddings": True},
        "audio_config": {"tie_word_embeddings": True, "vocab_size": 7},
    }
    made = rewritten(tmp_path, {**EMBEDDING, "lm_head.weight": OTHER}, config, HEAD)
    flags = {
        key: value if key == "tie_word_embeddings" else value["tie_word_embeddings"] for key, value in made.items()
    }
    assert flags == {"tie_word_embeddings": False, "text_config": False, "vision_config": True, "audio_config": True}


def test_a_config_without_the_flag_is_not_given_one_for_a_head_that_was_dropped(tmp_path: Path) -> None:
    assert rewritten(tmp_path, {**EMBEDDING, "lm_head.weight": ONE}, {"vocab_size": 2}, HEAD) == {"vocab_size": 2}


def test_a_flag_that_other_names_need_stays_and_a_warning_says_so(tmp_path: Path) -> None:
    ties = {**HEAD, "encoder.embed.weight": "embed.weight"}
    tensors = {**EMBEDDING, "encoder.embed.weight": ONE, "lm_head.weight": OTHER}
    config = {"tie_word_embeddings": True}
    assert rewritten(tmp_path, tensors, config, ties) == config
    report = tierewrite.rewrite(
        tmp_path / "src", tmp_path / "again", ties=tmp_path / "ties.json", on_mismatch="keep", fix_config=True
    )
    assert any("'lm_head.weight' is stored and differs" in warning for warning in report.warnings)


def test_the_text_keeps_its_style_and_order(copied: Callable[[str], Path], tmp_path: Path) -> None:
    src = copied("qwen3_tied_but_diverged_bf16")
    before = (src / "config.json").read_text()
    tierewrite.rewrite(src, tmp_path / "dst", on_mismatch="keep", fix_config=True, verify=True)
    after = (tmp_path / "dst" / "config.json").read_text()
    assert after == before.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false') != before


def test_without_the_option_the_config_is_copied(tmp_path: Path) -> None:
    src = FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive"
    tierewrite.rewrite(src, tmp_path / "dst", on_mismatch="keep")
    assert (tmp_path / "dst" / "config.json").read_bytes() == (src / "config.json").read_bytes()


def test_both_flags_of_a_model_with_a_text_config(copied: Callable[[str], Path], tmp_path: Path) -> None:
    src = copied("llava_tied_bf16")
    config = told(src)
    (src / "config.json").write_text(
        json.dumps({**config, "text_config": {**config["text_config"], "tie_word_embeddings": False}})
    )
    tierewrite.rewrite(src, tmp_path / "dst", fix_config=True, verify=True)
    assert told(tmp_path / "dst")["text_config"]["tie_word_embeddings"] is True, "the head was dropped"
    head = read_tensors(src)["language_model.lm_head.weight"]
    edit_tensors(src, {"language_model.lm_head.weight": (head.dtype, head.shape, bytes(len(head.data)))})
    (src / "config.json").write_text(json.dumps(config))
    tierewrite.rewrite(src, tmp_path / "kept", on_mismatch="keep", fix_config=True, verify=True)
    made = told(tmp_path / "kept")
    assert (made["tie_word_embeddings"], made["text_config"]["tie_word_embeddings"]) == (False, False)


def test_a_class_that_ties_whatever_its_flag_says_keeps_the_flag(tmp_path: Path) -> None:
    """T5 scales the decoder's output by the flag, and ties the embeddings in any case."""
    config = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 2, "d_model": 2, "d_kv": 1,
        "d_ff": 2, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = {"shared.weight": ONE, "encoder.embed_tokens.weight": ONE, "lm_head.weight": ONE}
    src = write_checkpoint(tmp_path / "src", tensors, config=config)
    tierewrite.rewrite(src, tmp_path / "dst", fix_config=True, verify=True)
    assert read_tensors(tmp_path / "dst").keys() == {"shared.weight"}
    assert told(tmp_path / "dst") == config


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("head", "lie"), [({"lm_head.weight": ONE}, False), ({"lm_head.weight": OTHER}, True)], ids=["dropped", "kept"]
)
def test_verify_sees_a_flag_that_the_bytes_give_no_reason_for(
    head: dict[str, Tensor], lie: bool, manifest: bool, tmp_path: Path
) -> None:
    (tmp_path / "ties.json").write_text(json.dumps(HEAD))
    options: dict[str, Any] = {"on_mismatch": "keep", "fix_config": True, "ties": tmp_path / "ties.json"}
    src = write_checkpoint(tmp_path / "src", {**EMBEDDING, **head}, config={"tie_word_embeddings": not lie})
    tierewrite.rewrite(src, tmp_path / "dst", manifest=manifest, **options)
    (tmp_path / "dst" / "config.json").write_text(json.dumps({"tie_word_embeddings": lie}))
    found = tierewrite.verify(src, tmp_path / "dst", **options)
    assert {problem.id for problem in found.problems} == {"side-file"}
    assert any("is not SRC's" in problem.message or "no reason" in problem.message for problem in found.problems)


def test_each_tie_hangs_on_the_flag_of_the_submodel_that_declares_it() -> None:
    def flags(case: str) -> dict[str, tuple[tuple[str, ...], ...]]:
        folder = FIXTURES / case / "naive"
        model = TieMap.resolve(folder, told(folder)).model
        assert model is not None
        return dict(model.flags)

    assert flags("llava_tied_bf16") == {"lm_head.weight": ((),)}
    assert set(flags("dg_nvfp4").values()) == {((),)}


def test_a_subconfigs_flag_switches_the_ties_of_its_submodel() -> None:
    config = {
        "architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder", "is_encoder_decoder": True,
        "encoder": {"model_type": "bert", "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1,
                    "intermediate_size": 4, "vocab_size": 8},
        "decoder": {"model_type": "gpt2", "n_embd": 4, "n_head": 1, "n_layer": 1, "vocab_size": 8,
                    "is_decoder": True, "add_cross_attention": True},
    }  # fmt: skip
    model = TieMap.resolve(Path(), config).model
    assert model is not None
    assert model.flags == {"decoder.lm_head.weight": (("decoder",),)}
