"""Names and sizes of public models: the plan of each, as published and with every alias written out.

The arbiter is transformers' own from_pretrained: what a plan leaves is all that it asks for, with the right shapes. The
layers, experts and widths are the real ones (but see `MERGED`); the tensors it is given take no memory. It is not asked
of quantized weights: the packages that read them are not installed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests import zoo
from tests.real_models import (
    MODELS,
    RealModel,
    Release,
    class_of,
    config_of,
    digest_of,
    release_of,
    spelled,
    total_size,
)
from tierewrite.errors import EXIT_SOURCE, ConfigError

KNOWN = [model for model in MODELS if not model.patterns]
FOREIGN = [model for model in MODELS if model.patterns]
MERGED = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 16, "vocab_size": 64},
    "qwen3_5_moe_text": {"hidden_size": 64, "moe_intermediate_size": 16, "vocab_size": 64, "num_experts": 8},
}
"""from_pretrained needs memory to make one tensor of many experts': its models are narrow, one has 8 of 180 experts."""


def named(model: RealModel) -> str:
    return model.name


def names_are_those_of_the_release(model: RealModel, made: Release) -> None:
    assert (len(made.real), digest_of(made.real)) == (model.tensors, model.digest)


def planned(folder: Path, entries: Mapping[str, zoo.Entry], model: RealModel) -> tierewrite.RewritePlan:
    zoo.write_headers(folder, zoo.Naive("hub", entries, {}), model.config)
    return tierewrite.plan(folder)


def changes(plan: tierewrite.RewritePlan) -> dict[str, tuple[str, str]]:
    return {key: (p.action.value, p.target) for key, p in plan.tensors.items() if p.action.value != "keep"}


def loaded(model: RealModel, entries: Mapping[str, zoo.Entry], **narrow: Any) -> dict[str, Any]:
    """What from_pretrained says of tensors of these names and shapes."""
    import torch

    state = {name: torch.zeros(()).expand(shape) for name, (_, shape) in entries.items()}
    with zoo.quiet():
        config = config_of(model, **narrow)
        _, info = class_of(model).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
        )
    return dict(info)


def test_the_table_is_large_and_varied() -> None:
    assert len(MODELS) >= 40
    assert len({(model.repository, model.index) for model in MODELS}) == len(MODELS)
    assert len({model.name for model in MODELS}) == len(MODELS)
    assert len({model.config["model_type"] for model in MODELS}) >= 25


def test_a_pattern_of_names() -> None:
    assert spelled("a.{0..2,7}.{x,y.z}") == [f"a.{n}.{word}" for n in (0, 1, 2, 7) for word in ("x", "y.z")]
    assert spelled("a.0.weight") == ["a.0.weight"]


@pytest.mark.parametrize("model", KNOWN, ids=named)
def test_exactly_the_aliases_are_dropped_and_nothing_is_missed(model: RealModel, tmp_path: Path) -> None:
    made = release_of(model)
    names_are_those_of_the_release(model, made)
    if model.total_size:
        counted = total_size(model, made.real)
        assert counted < model.total_size if model.of_files else counted == model.total_size
    forms = {"real": made.real, "naive": made.naive} if made.real != made.naive else {"naive": made.naive}
    for form, entries in forms.items():
        plan = planned(tmp_path / form, entries, model)
        assert changes(plan) == {a: ("drop", c) for a, c in made.drops.items() if a in entries}
        assert plan.tensors.keys() == entries.keys()
        assert [group.id for group in plan.groups if group.status == "unconfirmed"] == []
        assert [model.warns in warning for warning in plan.warnings] == [True] * bool(model.warns)
    if model.packed is None:
        narrow = MERGED.get(model.config["model_type"], {})
        sizes = release_of(model, **narrow) if narrow else made
        info = loaded(model, {k: v for k, v in sizes.naive.items() if k not in made.drops}, **narrow)
        assert {what: found for what, found in info.items() if found} == {}


def test_the_arbiter_misses_what_is_not_there() -> None:
    [model] = [model for model in KNOWN if model.config["model_type"] == "layoutlm"]
    made = release_of(model)
    gone = set(made.drops) | set(made.drops.values())
    info = loaded(model, {k: v for k, v in made.naive.items() if k not in gone})
    assert info["missing_keys"] >= set(made.drops.values())


@pytest.mark.parametrize("model", FOREIGN, ids=named)
def test_code_that_transformers_lacks_is_refused_and_a_ties_file_decides(model: RealModel, tmp_path: Path) -> None:
    made = release_of(model)
    names_are_those_of_the_release(model, made)
    with pytest.raises(ConfigError, match=r"config\.json: .*ties=FILE") as caught:
        planned(tmp_path / "real", made.real, model)
    assert caught.value.exit_code == EXIT_SOURCE
    assert (model.config.get("architectures") or [model.config["model_type"]])[0] in str(caught.value)
    assert changes(tierewrite.plan(tmp_path / "real", ties={})) == {}
