"""Where large runs stand in the output's files, so that a file system can share them with the source."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import read_header
from tests.faults.sources import real
from tierewrite.output import safetensors
from tierewrite.output.safetensors import shard_header
from tierewrite.planning import alignment
from tierewrite.planning.alignment import RUN_BYTES
from tierewrite.planning.layout import element_sizes, shards
from tierewrite.planning.plan import OutShard
from tierewrite.source.table import TensorEntry, Tensors
from tierewrite.stores.sharing import BLOCK_BYTES

Spec = tuple[str, str, tuple[int, ...], int]
"""Name, dtype, shape and bytes of a tensor."""
SIZES = (2 * RUN_BYTES, RUN_BYTES, 7 * RUN_BYTES, RUN_BYTES)
WIDTHS = {"F32": 4, "I64": 8, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def table(*files: Sequence[Spec], data_start: int = 1000) -> Tensors:
    """A source whose files hold these tensors one after the other, each file's header longer by 8 than the last."""
    entries = []
    for number, file in enumerate(files):
        at = data_start + 8 * number
        for name, dtype, shape, size in file:
            entries.append(TensorEntry(name, dtype, shape, number, at, at + size))
            at += size
    return Tensors.of(entries)


def one(name: str, dtype: str, count: int) -> Spec:
    return name, dtype, (count,), count * WIDTHS[dtype]


def laid_out(
    tensors: Tensors, dropped: Callable[[str], bool] = lambda name: False, limit: int | None = None, merged: str = "-"
) -> tuple[OutShard, ...]:
    rows = np.array([row for row, name in enumerate(tensors.names) if not dropped(name)], np.int64)
    other = np.array([merged in name for name in tensors.names], bool)
    return shards(tensors, rows, [tensors.names[row] for row in rows.tolist()], other, [], limit)


def shift(shard: OutShard, name: str) -> int:
    """By how much a tensor's offset in the file differs from that in the source, modulo a block."""
    at = list(shard.names).index(name)
    place = int(shard.start[at]) + (shard.data_start or 0)
    return (place - int(shard.source.start[shard.rows[at]])) % BLOCK_BYTES


def whole(shard: OutShard) -> None:
    """The file's tensors follow one another without holes, each aligned to its element."""
    assert shard.data_start is None or shard.data_start % 8 == 0
    assert shard.start[0] == 0
    assert (shard.start[1:] == shard.end[:-1]).all()
    width = element_sizes(shard.source, shard.rows)[shard.source.kind[shard.rows]]
    assert (((shard.data_start or 0) + shard.start) % np.maximum(width, 1) == 0).all()


def export(scalars: int, big: int, start: str = "") -> list[Spec]:
    """As safetensors' serializer writes NVFP4: scales of one element, norms, block scales, packed weights."""
    sides = ("decoder", "encoder")
    named = [f"{start}{side}.{number}" for side in sides for number in range(scalars)]
    return [
        *(one(f"{name}.scale_2", "F32", 1) for name in named),
        *(one(f"{start}{side}.norm", "BF16", 704) for side in sides),
        *(one(f"{start}{side}.block_scales", "F8_E4M3", big // 8) for side in sides),
        *(one(f"{start}{side}.weight", "U8", big) for side in sides),
    ]


def test_without_large_runs_wide_dtypes_come_first_and_nothing_else_changes() -> None:
    (made,) = laid_out(table(export(3, 4096)), lambda name: name.startswith("encoder"))
    assert made.data_start is None
    widths = element_sizes(made.source, made.rows)[made.source.kind[made.rows]].tolist()
    assert widths == sorted(widths, reverse=True)


def test_the_largest_run_of_a_file_gets_its_offset_from_the_header_and_others_from_small_tensors() -> None:
    big = 16 * RUN_BYTES + 64
    (made,) = laid_out(table(export(2048, big)), lambda name: name.startswith("encoder"))
    whole(made)
    assert shift(made, "decoder.weight") == shift(made, "decoder.block_scales") == 0
    assert sorted(made.names) == sorted(name for name in made.source.names if name.startswith("decoder"))


def test_runs_of_two_files_meet_in_one() -> None:
    source = table(export(1024, 8 * RUN_BYTES, "a."), export(1024, 8 * RUN_BYTES, "b."))
    (made,) = laid_out(source, lambda name: "encoder" in name, limit=1 << 40)
    whole(made)
    for name in ("a.decoder.weight", "a.decoder.block_scales", "b.decoder.weight", "b.decoder.block_scales"):
        assert shift(made, name) == 0, name


def test_where_nothing_fills_a_gap_the_smaller_run_stays_where_it_is() -> None:
    source = table([one("a", "BF16", RUN_BYTES)], [one("b", "BF16", 2 * RUN_BYTES)])
    (made,) = laid_out(source, limit=1 << 40)
    whole(made)
    assert made.names == ["a", "b"]  # what is not aligned comes first
    assert shift(made, "b") == 0 != shift(made, "a")


def test_an_odd_number_of_scales_before_the_first_run_lets_one_stand_behind_it() -> None:
    source = table([*(one(f"s{n}", "F32", 1) for n in range(3)), one("gone", "F32", 1), one("w", "U8", 2 * RUN_BYTES)])
    (made,) = laid_out(source, lambda name: name == "gone", merged="s")
    whole(made)
    assert shift(made, "w") == 0
    assert list(made.names)[-1].startswith("s")


def test_a_narrow_tensor_brings_wide_ones_to_a_place_for_them() -> None:
    parts = [one("a", "U8", 2 * RUN_BYTES + 2), one("gone", "U8", 8186), one("b", "U8", RUN_BYTES)]
    small = [*(one(f"scale{n}", "F32", 1) for n in range(1023)), one("scalar0", "BF16", 1), one("scalar1", "BF16", 1)]
    (made,) = laid_out(table([*parts, *small]), lambda name: name == "gone", merged="scal")
    whole(made)
    assert shift(made, "a") == shift(made, "b") == 0
    # 4090 bytes are between them: a scalar up to a multiple of four, then scales
    assert list(made.names)[:1025] == ["a", "scalar0", *(f"scale{n}" for n in range(1022)), "b"]


def test_a_run_without_a_place_takes_none_from_the_others() -> None:
    large, small = one("large", "U8", 2 * RUN_BYTES), one("small", "U8", RUN_BYTES)
    source = table([one("x", "U8", 6), large], [one("y", "U8", 3), small, one("z", "U8", 5000)])
    (made,) = laid_out(source, limit=1 << 40, merged="z")
    whole(made)
    assert shift(made, "large") == 0 != shift(made, "small")


def test_small_tensors_at_the_beginning_of_a_run_fill_gaps() -> None:
    scales = [one(f"b.scale{n}", "F32", 1) for n in range(1024)]
    source = table([one("a.weight", "U8", 2 * RUN_BYTES + 4)], [*scales, one("b.weight", "U8", RUN_BYTES)])
    (made,) = laid_out(source, limit=1 << 40)
    whole(made)
    assert shift(made, "a.weight") == shift(made, "b.weight") == 0
    names = list(made.names)
    assert names.index("a.weight") < names.index("b.scale0") < names.index("b.weight")


def test_no_file_of_the_source_is_cut_where_others_have_room_together() -> None:
    files = [[one(f"{number}.w", "U8", size), one(f"{number}.x", "U8", RUN_BYTES)] for number, size in enumerate(SIZES)]
    first, second = laid_out(table(*files), limit=9 * RUN_BYTES)
    assert (set(first.names), set(second.names)) == ({"0.w", "0.x", "1.w", "1.x", "3.w", "3.x"}, {"2.w", "2.x"})


def test_where_files_are_cut_each_gets_its_part_of_the_small_tensors_of_every_size() -> None:
    scales = [one(f"{dtype}{n}", dtype, 1) for dtype in ("F32", "BF16") for n in range(8)]
    weights = [one(f"w{n}", "U8", 2 * RUN_BYTES) for n in range(8)]
    made = laid_out(table([*scales, *weights]), limit=5 * RUN_BYTES)
    assert len(made) == 4
    for shard in made:
        whole(shard)
        names = list(shard.names)
        assert [sum(name.startswith(kind) for name in names) for kind in ("F32", "BF16", "w")] == [2, 2, 2]
        assert all(shift(shard, name) == 0 for name in names if name.startswith("w"))


def test_a_merged_scale_is_in_no_run_and_a_run_goes_on_behind_it() -> None:
    parts = [one("w0", "U8", RUN_BYTES), one("merged", "U8", 8), one("w1", "U8", RUN_BYTES), one("merged.2", "U8", 8)]
    (made,) = laid_out(table(parts), merged="merged")
    whole(made)
    assert shift(made, "w0") == shift(made, "w1") == 0


def test_files_of_the_source_stay_separate_where_that_makes_no_more_files() -> None:
    source = table(
        [one("head", "BF16", RUN_BYTES), one("a", "BF16", RUN_BYTES)],
        [one("b", "BF16", RUN_BYTES), one("c", "BF16", RUN_BYTES // 2), one("d", "BF16", RUN_BYTES // 2)],
    )
    first, second = laid_out(source, lambda name: name == "head")
    assert (list(first.names), list(second.names)) == (["a"], ["b", "c", "d"])
    assert shift(first, "a") == shift(second, "b") == 0


def test_a_file_that_is_not_aligned_in_the_source_is_laid_out_as_a_small_one() -> None:
    (made,) = laid_out(table([one("a", "BF16", RUN_BYTES)], data_start=1003))
    assert made.data_start is None


def test_a_canonical_checkpoint_with_aligned_runs_stays_as_it_is() -> None:
    (made,) = laid_out(table(export(2048, 4 * RUN_BYTES)), lambda name: name.startswith("encoder"))
    assert made.data_start is not None
    kinds = [made.source.kinds[kind] for kind in made.source.kind[made.rows].tolist()]
    sizes = made.source.nbytes[made.rows].tolist()
    specs = [(name, *kind, size) for name, kind, size in zip(made.names, kinds, sizes, strict=True)]
    again = table(specs, data_start=made.data_start)
    (same,) = laid_out(again)
    assert list(same.names) == list(made.names)
    assert same.data_start == made.data_start


@pytest.mark.parametrize("seed", range(200))
def test_any_mixture_is_laid_out_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "RUN_BYTES", 64)
    chance = random.Random(seed)
    files = [
        [
            one(f"{number}.{n}", chance.choice(list(WIDTHS)), chance.choice([0, 1, 1, 1, 2, 3, 5, 33, 700, 5000]))
            for n in range(chance.randint(1, 40))
        ]
        for number in range(chance.randint(1, 3))
    ]
    source = table(*files, data_start=chance.choice([8, 1000, 1003, 4096]))
    gone = {name for name in source.names if chance.random() < 0.3}
    made = laid_out(source, gone.__contains__, chance.choice([None, 20_000, 1 << 40]), merged=".3")
    assert sorted(name for shard in made for name in shard.names) == sorted(set(source.names) - gone)
    for shard in made:
        if len(shard.names):
            assert shard.start[0] == 0
            assert (shard.start[1:] == shard.end[:-1]).all()
            assert shard.data_start is None or shard.data_start % 8 == 0
            if source.start[0] % 8 == 0 and shard.data_start is not None:
                whole(shard)


@pytest.mark.parametrize("seed", range(100))
def test_what_was_laid_out_comes_out_as_it_went_in(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "RUN_BYTES", 8192)
    chance = random.Random(seed)
    counts = [1, 1, 1, 2, 3, 5, 33, 700, 1500, 5000, 9000]
    files = [
        [one(f"{number}.{n}", chance.choice(list(WIDTHS)), chance.choice(counts)) for n in range(chance.randint(1, 40))]
        for number in range(chance.randint(1, 3))
    ]
    source = table(*files, data_start=chance.choice([8, 1000, 4096]))
    gone = {name for name in source.names[1:] if chance.random() < 0.3}
    made = laid_out(source, gone.__contains__, chance.choice([None, 20_000, 1 << 40]), merged=".3")
    entries = []
    for number, shard in enumerate(made):
        starts = 8 * chance.randint(1, 500) if shard.data_start is None else shard.data_start
        places = zip(shard.rows.tolist(), shard.start.tolist(), shard.end.tolist(), strict=True)
        for name, (row, start, end) in zip(shard.names, places, strict=True):
            dtype, shape = source.kinds[source.kind[row]]
            entries.append(TensorEntry(name, dtype, shape, number, starts + start, starts + end))
    again = laid_out(Tensors.of(entries))
    assert [shard.names for shard in again] == [shard.names for shard in made]
    aligned = [number for number, shard in enumerate(made) if shard.data_start is not None]
    assert [again[number].data_start for number in aligned] == [made[number].data_start for number in aligned]
    assert [shard.names for shard in laid_out(Tensors.of(entries), merged=".3")] == [shard.names for shard in made]


def test_a_header_near_the_limit_has_no_spaces_that_would_make_it_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = laid_out(table(export(3, 8 * RUN_BYTES)), lambda name: name.startswith("encoder"))
    text = shard_header(made, {})[8:].rstrip()
    padded = -(len(text) + 8) % 8
    assert made.data_start is not None
    assert (made.data_start - len(text) - 8) % BLOCK_BYTES > padded
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", len(text) + padded)
    assert len(shard_header(made, {})) == 8 + len(text) + padded


def test_headers_are_padded_as_the_plan_says_and_verify_expects_just_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "RUN_BYTES", 8192)
    source = real(tmp_path)
    planned = tierewrite.plan(source.path, ties=source.ties, max_shard_size="200KB")
    out = tmp_path / "out"
    assert tierewrite.rewrite(source.path, out, ties=source.ties, max_shard_size="200KB", verify=True).verified
    aligned = [shard for shard in planned.shards if shard.data_start is not None]
    assert aligned
    for shard in aligned:
        header, start = read_header(out / shard.name)
        assert start % BLOCK_BYTES == shard.data_start
        assert [name for name in header if name != "__metadata__"] == list(shard.names)
