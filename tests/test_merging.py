"""Merging scales: the result covers every side, in the stored dtype, and says where it came from."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import count_calls
from tierewrite.formats import Companion, Role, classify
from tierewrite.numbers.merging import MergeResult, Side, merge_many, mergeable

MAX = Companion("input_scale", Role.ACTIVATION, "max")
MIN = Companion("input_global_scale", Role.ACTIVATION, "min", uncalibrated=(1.0,))
PACK = {"F64": "<d", "F32": "<f", "F16": "<e"}
# (dtype, largest finite value, smallest valid value)
DTYPES = {"F64": (1e300, 1e-300), "F32": (3e38, 1e-37), "BF16": (3e38, 1e-37), "F16": (6e4, 7e-5)}


def read(dtype: str, data: bytes) -> list[float]:
    """The values, by Python's own struct: an implementation independent of the one under test."""
    if dtype == "BF16":
        pairs = [data[i : i + 2] for i in range(0, len(data), 2)]
        return [struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs]
    return [value for (value,) in struct.iter_unpack(PACK[dtype], data)]


def write(dtype: str, *values: float) -> bytes:
    if dtype == "BF16":  # truncated: any BF16 will do
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return b"".join(struct.pack(PACK[dtype], value) for value in values)


def side(key: str, *values: float, dtype: str = "F32", shape: tuple[int, ...] | None = None) -> Side:
    return Side(
        key,
        dtype,
        (() if len(values) == 1 else (len(values),)) if shape is None else shape,
        write(dtype, *values),
    )


def merge(companion: Companion, *sides: Side) -> MergeResult:
    (result,) = merge_many([(sides, companion)])
    return result


def valid_values(dtype: str) -> st.SearchStrategy[float]:
    high, low = DTYPES[dtype]
    return st.floats(min_value=low, max_value=high).map(lambda value: read(dtype, write(dtype, value))[0])


@st.composite
def jobs(draw: st.DrawFn, mixed: bool = False) -> tuple[list[Side], Companion]:
    """Two to four sides of one to five elements, some of them never calibrated."""
    count = draw(st.integers(1, 5))
    first = draw(st.sampled_from(sorted(DTYPES)))
    # Other sides of another dtype stay within F16's range, so that the first can hold them.
    bounds = st.floats(min_value=1e-4, max_value=5e4)
    sides = []
    for number in range(draw(st.integers(2, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPES))) if mixed and number else first
        value = bounds.map(lambda v, d=dtype: read(d, write(d, v))[0]) if mixed else valid_values(dtype)
        broken = st.sampled_from([0.0, -1.0, math.nan, math.inf, -0.0])
        values = draw(st.lists(st.one_of(value, value, value, broken), min_size=count, max_size=count))
        sides.append(side(f"side{number}", *values, dtype=dtype, shape=(count,)))
    return sides, draw(st.sampled_from([MAX, MIN]))


def is_valid(value: float, companion: Companion) -> bool:
    return math.isfinite(value) and value >= 2.0**-126 and value not in companion.uncalibrated


@given(jobs(mixed=True))
def test_result_covers_every_valid_side_and_is_the_nearest_value_that_does(
    job: tuple[list[Side], Companion],
) -> None:
    sides, companion = job
    result = merge(companion, *sides)
    assert result.dtype == sides[0].dtype
    assert result.shape == sides[0].shape
    for at, value in enumerate(read(result.dtype, result.data)):
        valid = [v for v in (read(s.dtype, s.data)[at] for s in sides) if is_valid(v, companion)]
        if not valid:
            size = len(result.data) // len(read(result.dtype, result.data))
            assert result.data[at * size : (at + 1) * size] == sides[0].data[at * size : (at + 1) * size]
        elif companion.merge == "max":
            assert value >= max(valid)
            assert before(result.dtype, value) < max(valid)
        else:
            assert value <= min(valid)
            assert after(result.dtype, value) > min(valid)


def before(dtype: str, value: float) -> float:
    """The next smaller positive value of the dtype."""
    code = int.from_bytes(write(dtype, value), "little")
    return read(dtype, (code - 1).to_bytes(len(write(dtype, value)), "little"))[0]


def after(dtype: str, value: float) -> float:
    code = int.from_bytes(write(dtype, value), "little")
    return read(dtype, (code + 1).to_bytes(len(write(dtype, value)), "little"))[0]


@given(jobs())
def test_merging_is_idempotent(job: tuple[list[Side], Companion]) -> None:
    sides, companion = job
    once = merge(companion, *sides)
    merged = Side("merged", once.dtype, once.shape, once.data)
    assert merge(companion, merged, *sides[1:]).data == once.data
    assert merge(companion, merged, merged).data == once.data


@given(jobs())
def test_merging_is_symmetrical(job: tuple[list[Side], Companion]) -> None:
    sides, companion = job
    forth, back = merge(companion, *sides), merge(companion, *reversed(sides))
    kept = [
        any(is_valid(read(s.dtype, s.data)[at], companion) for s in sides)
        for at in range(len(read(forth.dtype, forth.data)))
    ]
    for at, calibrated in enumerate(kept):
        if calibrated:
            assert read(forth.dtype, forth.data)[at] == read(back.dtype, back.data)[at]
    assert forth.calibrated == back.calibrated
    assert forth.ratio == back.ratio
    assert set(forth.invalid) == set(back.invalid)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=40))
def test_any_bits_at_all_merge_to_bits_of_a_side(pairs: list[tuple[int, int]]) -> None:
    sides = [
        [Side(name, "F32", (), bits.to_bytes(4, "little")) for name, bits in zip("ab", pair, strict=True)]
        for pair in pairs
    ]
    for companion in (MAX, MIN):
        results = merge_many([(pair, companion) for pair in sides])
        for pair, result in zip(sides, results, strict=True):
            assert result.data in (pair[0].data, pair[1].data)
            if not result.calibrated:
                assert result.data == pair[0].data
                assert result.taken_from is None


def test_max_takes_the_larger_scale_and_names_its_key() -> None:
    result = merge(MAX, side("canonical", 0.5), side("alias", 2.0))
    assert result == MergeResult(write("F32", 2.0), "F32", (), True, "alias", 4.0, False, ())


def test_min_takes_the_smaller_reciprocal() -> None:
    result = merge(MIN, side("canonical", 300.0), side("alias", 100.0))
    assert result == MergeResult(write("F32", 100.0), "F32", (), True, "alias", 3.0, False, ())


def test_equal_sides_keep_their_bytes_and_the_first_key() -> None:
    result = merge(MAX, side("canonical", 0.1), side("alias", 0.1))
    assert result == MergeResult(write("F32", 0.1), "F32", (), True, "canonical", 1.0, True, ())


def test_per_channel_scales_merge_element_by_element() -> None:
    result = merge(MAX, side("canonical", 1.0, 5.0, 0.0), side("alias", 2.0, 4.0, 3.0))
    assert read("F32", result.data) == [2.0, 5.0, 3.0]
    assert result.taken_from is None
    assert result.ratio == 2.0
    assert result.invalid == ("canonical",)


@pytest.mark.parametrize(
    "never", [0.0, -0.0, -3.0, math.nan, math.inf, -math.inf, 1.6e-43, 2.0**-127], ids=lambda v: f"{v}"
)
@pytest.mark.parametrize("companion", [MAX, MIN], ids=["max", "min"])
def test_value_that_calibration_never_set_takes_no_part(never: float, companion: Companion) -> None:
    for sides in (
        (side("canonical", never), side("alias", 0.25)),
        (side("alias", 0.25), side("canonical", never)),
    ):
        result = merge(companion, *sides)
        assert read("F32", result.data) == [0.25]
        assert result.taken_from == "alias"
        assert result.invalid == ("canonical",)
        assert result.ratio is None
        assert result.calibrated


def test_one_is_never_calibrated_for_an_input_global_scale_only() -> None:
    reciprocal = classify("weight", "input_global_scale")
    scale = classify("weight", "input_scale")
    assert reciprocal is not None
    assert scale is not None
    assert read("F32", merge(reciprocal, side("a", 1.0), side("b", 300.0)).data) == [300.0]
    assert read("F32", merge(scale, side("a", 1.0), side("b", 0.25)).data) == [1.0]


def test_no_valid_side_keeps_the_first_bytes_and_says_so() -> None:
    nan = Side("canonical", "F32", (1,), bytes.fromhex("0100c07f"))  # a NaN with a payload
    result = merge(MIN, nan, side("alias", 1.0, shape=(1,)))
    assert result == MergeResult(nan.data, "F32", (1,), False, None, None, False, ("canonical", "alias"))


def test_bf16_rounds_up_for_max_and_down_for_min() -> None:
    # 1 + 2^-8 is half way between the BF16 neighbours 1 and 1 + 2^-7; nearest-even would give 1.
    for companion, first, expected in ((MAX, 0.5, 1 + 2.0**-7), (MIN, 2.0, 1.0)):
        result = merge(companion, side("canonical", first, dtype="BF16"), side("alias", 1 + 2.0**-8))
        assert read("BF16", result.data) == [expected]
        assert result.taken_from is None


def test_quiet_f16_scale_is_valid_as_a_scale_and_not_as_a_reciprocal() -> None:
    quiet = 2.0**-16  # a subnormal of F16
    assert merge(MAX, side("a", quiet, dtype="F16"), side("b", quiet / 2, dtype="F16")).calibrated
    assert read("F16", merge(MIN, side("a", quiet, dtype="F16"), side("b", 300.0, dtype="F16")).data) == [300.0]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_eight_bit_scales_agree_with_torch_for_every_pair_of_codes(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kinds = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(getattr(torch, kinds[dtype])).to(torch.float64).numpy()
    normal = {"F8_E4M3": 2.0**-6, "F8_E5M2": 2.0**-14, "F8_E8M0": 2.0**-126}[dtype]
    pairs = [(a, b) for a in range(256) for b in range(0, 256, 17)]
    for companion in (MAX, MIN):
        results = merge_many(
            [((Side("a", dtype, (), bytes([a])), Side("b", dtype, (), bytes([b]))), companion) for a, b in pairs]
        )
        for (a, b), result in zip(pairs, results, strict=True):
            valid = [
                values[c] for c in (a, b) if normal <= values[c] < math.inf and values[c] not in companion.uncalibrated
            ]
            if not valid:
                assert result.data == bytes([a])
            else:
                assert values[result.data[0]] == (max if companion.merge == "max" else min)(valid)


def test_shapes_that_differ_by_axes_of_length_one_merge_into_the_first_shape() -> None:
    result = merge(MAX, side("canonical", 1.0, shape=()), side("alias", 2.0, shape=(1,)))
    assert result.shape == ()
    assert read("F32", result.data) == [2.0]
    assert merge(MAX, side("a", 1.0, 2.0, shape=(2, 1)), side("b", 2.0, 1.0, shape=(2,))).shape == (2, 1)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([("F32", ()), ("F32", (1,))], None),
        ([("F32", (8,)), ("BF16", (8, 1))], None),
        ([("F32", (2, 3)), ("F32", (3, 2))], "different shapes"),
        ([("F32", ()), ("F32", (8,))], "different shapes"),
        ([("F32", (0,)), ("F32", (0,))], "holds no value"),
        ([("U8", ()), ("U8", ())], "dtype U8"),
        ([("F32", ()), ("F6_E2M3", ())], "dtype F6_E2M3"),
    ],
)
def test_mergeable_tells_from_headers_alone(headers: list[tuple[str, tuple[int, ...]]], reason: str | None) -> None:
    found = mergeable(headers)
    assert found is None if reason is None else found is not None and reason in found


def test_what_is_not_mergeable_is_a_value_error_naming_the_keys() -> None:
    with pytest.raises(ValueError, match=r"'alias'.*different shapes"):
        merge(MAX, side("canonical", 1.0), side("alias", 1.0, 2.0))
    with pytest.raises(ValueError, match="do not fill"):
        merge(MAX, Side("a", "F32", (), b"\0\0"), side("b", 1.0))
    with pytest.raises(ValueError, match="no merging rule"):
        merge(Companion("weight_scale", Role.WEIGHT), side("a", 1.0), side("b", 1.0))
    with pytest.raises(ValueError, match=r"'small', 'large': .* does not fit into F16"):
        merge(MAX, side("small", 1.0, dtype="F16"), side("large", 1e6))


CALLS_PER_SCALAR = 20  # ten today


def test_twelve_thousand_scalars_merge_in_ten_times_the_calls_of_twelve_hundred() -> None:
    values = np.random.default_rng(0).uniform(0.01, 1.0, (12_000, 2)).astype("<f4")
    work = [((Side("a", "F32", (), x.tobytes()), Side("b", "F32", (), y.tobytes())), MAX) for x, y in values]
    _, few = count_calls(lambda: merge_many(work[:1_200]))
    results, many = count_calls(lambda: merge_many(work))
    assert b"".join(result.data for result in results) == values.max(axis=1).tobytes()
    assert many < 11 * few
    assert many < CALLS_PER_SCALAR * len(work)
