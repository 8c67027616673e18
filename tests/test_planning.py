"""Thousands of slots are planned together; the plan is that of planning them one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Tensor, write_checkpoint
from tierewrite.planning import groups
from tierewrite.source.folder import open_folder
from tierewrite.ties.on_disk import DiskTies, TieGroup

EXPERTS = 300
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def module(side: str, expert: int) -> str:
    return f"{side}.experts.{expert}.up_proj"


def tensors() -> dict[str, Tensor]:
    scalar = ("F32", [], bytes(4))
    return {
        f"{module(side, expert)}.{suffix}": ("U8", [2], bytes(2)) if suffix == "weight" else scalar
        for side in ("a", "b")
        for expert in range(EXPERTS)
        for suffix in SUFFIXES
    }


def planned(folder: Path, made: dict[str, Tensor], slots: Sequence[tuple[str, ...]], owned: str = "") -> Any:
    checkpoint = open_folder(write_checkpoint(folder, made, {"quantization_config": {"quant_method": "modelopt"}}))
    group = TieGroup("t", "t", ("u",), ("test",), tuple(slots))
    return groups.plan(checkpoint, DiskTies((group,), {owned}, ()))


def one_by_one(self: Any, draft: Any, slots: Sequence[tuple[str, ...]]) -> None:
    for slot in slots:
        self._together(draft, (slot,))


def unchanged(made: dict[str, Tensor]) -> None: ...


def a_side_lacks_a_scale(made: dict[str, Tensor]) -> None:
    del made[f"{module('a', 123)}.input_scale"]


def another_suffix(made: dict[str, Tensor]) -> None:
    for side in ("a", "b"):
        made[f"{module(side, 123)}.bias"] = ("F32", [1], bytes(4))


def an_unknown_suffix_at_the_very_end(made: dict[str, Tensor]) -> None:
    made[f"{module('b', 99)}.zzz"] = ("F32", [], bytes(4))


def three_refuted(made: dict[str, Tensor]) -> None:
    for expert in (299, 288, 131):
        made[f"{module('b', expert)}.weight"] = ("U8", [2, 1], bytes(2))


def an_expert_under_the_aliases_name_alone(made: dict[str, Tensor]) -> None:
    for suffix in SUFFIXES:
        del made[f"{module('a', 7)}.{suffix}"]


@pytest.mark.parametrize("owned", ["", f"{module('b', 50)}.input_scale"])
@pytest.mark.parametrize(
    "change",
    [
        unchanged,
        a_side_lacks_a_scale,
        another_suffix,
        an_unknown_suffix_at_the_very_end,
        three_refuted,
        an_expert_under_the_aliases_name_alone,
    ],
)
def test_slots_planned_together_come_out_as_one_by_one(
    change: Callable[[dict[str, Tensor]], None], owned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tensors()
    change(made)
    slots = [(f"{module('a', expert)}.weight", f"{module('b', expert)}.weight") for expert in range(EXPERTS)]
    slots.insert(20, slots[5][::-1])  # a tensor in two slots: the later one decides
    slots.append(slots[6])
    together = planned(tmp_path, made, slots, owned)
    monkeypatch.setattr(groups._Planner, "_slots", one_by_one)
    alone = planned(tmp_path, made, slots, owned)
    assert together == alone
    assert list(together.tensors.items()) == list(alone.tensors.items())


def test_alike_slots_are_checked_and_merged_in_their_order(tmp_path: Path) -> None:
    slots = [(f"{module('a', expert)}.weight", f"{module('b', expert)}.weight") for expert in range(EXPERTS)]
    (group,) = planned(tmp_path, tensors(), slots).groups
    pairs = [(module("a", expert), module("b", expert)) for expert in range(EXPERTS)]
    assert list(group.checks) == [(f"{a}.{part}", f"{b}.{part}") for a, b in pairs for part in SUFFIXES[:3]]
    assert [(merge.target, merge.keys) for merge in group.merges] == [
        (f"{a}.input_scale", (f"{a}.input_scale", f"{b}.input_scale")) for a, b in pairs
    ]
    assert group.dropped == 4 * EXPERTS


def test_the_first_refuted_slot_is_named(tmp_path: Path) -> None:
    made = tensors()
    three_refuted(made)
    slots = [(f"{module('a', expert)}.weight", f"{module('b', expert)}.weight") for expert in range(EXPERTS)]
    (group,) = planned(tmp_path, made, slots).groups
    assert group.status == "unconfirmed"
    assert group.reason == f"'{module('a', 131)}.weight' is U8 [2] but '{module('b', 131)}.weight' is U8 [2, 1]"
