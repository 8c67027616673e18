"""The largest magnitude of each row, of every dtype, against torch's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tierewrite.numbers.extremes import LAYOUTS, Extremes, extremes, values_of

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}


def data_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 900)])
def test_the_largest_of_each_row_is_that_of_torch(dtype: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(shape, generator=generator) * 20).to(TORCH[dtype])
    found = extremes(data_of(tensor), dtype, shape[1])
    assert values_of(found.largest, dtype).tolist() == tensor.to(torch.float64).abs().amax(1).tolist()


@pytest.mark.parametrize("dtype", [name for name in TORCH if name != "I8"])
def test_nan_is_above_infinity_and_infinity_above_all_numbers(dtype: str) -> None:
    layout, largest = LAYOUTS[dtype], torch.finfo(TORCH[dtype]).max
    rows = torch.tensor([[0.0, -0.0], [0.0, -largest], [largest, float("nan")]], dtype=torch.float64)
    zero, number, nan = extremes(data_of(rows.to(TORCH[dtype])), dtype, 2).largest.tolist()
    assert zero == layout.zero
    assert number == layout.limit
    assert nan > layout.infinity
    if dtype != "F8_E4M3":  # it has none
        infinite = extremes(data_of(torch.tensor([[-float("inf"), 1.0]]).to(TORCH[dtype])), dtype, 2).largest
        assert infinite.tolist() == [layout.infinity]


def test_the_smallest_int8_has_a_magnitude_of_its_own() -> None:
    found = extremes(np.array([-128, 3, 0, -1], np.int8).view(np.uint8), "I8", 2)
    assert values_of(found.largest, "I8").tolist() == [128.0, 1.0]
    positive = extremes(np.array([5, -1, -3, -2], np.int8).view(np.uint8), "I8", 2)
    assert values_of(positive.largest, "I8").tolist() == [5.0, 3.0]


def test_codes_of_nvfp4_are_zero_or_not() -> None:
    codes = np.array([0x00, 0x88, 0x80, 0x01, 0x10, 0x00], np.uint8)  # 8 is minus zero
    found = extremes(codes, "E2M1", 2)
    assert values_of(found.largest, "E2M1").tolist() == [0.0, 1.0, 1.0]


def test_scales_of_eight_bits_at_their_limits_are_counted_and_nan_is_not_one() -> None:
    e4m3 = np.array([0x7E, 0xFE, 0x7F, 0x01, 0x00, 0x38], np.uint8)
    found = extremes(e4m3, "F8_E4M3", 3, count=True)
    assert found.at_limit is not None
    assert found.at_bottom is not None
    assert (found.at_limit.tolist(), found.at_bottom.tolist()) == ([2, 0], [0, 2])


def test_extremes_are_split_and_joined_again() -> None:
    found = extremes(np.arange(24, dtype=np.uint8), "F8_E4M3", 3, count=True)
    parts = found.split([1, 0, 5, 2])
    assert [len(part.largest) for part in parts] == [1, 0, 5, 2]
    again = Extremes.joined(parts)
    assert again.largest.tolist() == found.largest.tolist() == [2, 5, 8, 11, 14, 17, 20, 23]
    assert again.at_bottom is not None
    assert again.at_bottom.tolist() == [2, 0, 0, 0, 0, 0, 0, 0]
