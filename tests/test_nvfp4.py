"""The codec against ModelOpt's own results (fixtures/nvfp4_codec), and the promises that `repack` makes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.checkpoints import FIXTURES, read_tensors
from tierewrite.numbers import float8, nvfp4

MODELOPT = np.load(FIXTURES / "nvfp4_codec" / "modelopt.npz")
CASES = sorted({name.rpartition(".")[0] for name in MODELOPT.files})
QUICK = settings(max_examples=60, deadline=None)


def modelopt(case: str) -> tuple[nvfp4.Packed, np.ndarray]:
    packed = nvfp4.Packed(*(MODELOPT[f"{case}.{k}"] for k in ("weight", "weight_scale", "weight_scale_2")))
    return packed, MODELOPT[f"{case}.input"]


def encode(case: str) -> tuple[Any, Any, Any]:
    given_scale = MODELOPT[f"{case}.given"] if f"{case}.given" in MODELOPT.files else None
    return nvfp4.encode(MODELOPT[f"{case}.input"], given_scale)


def random_weight(seed: int, shape: tuple[int, ...] = (24, 64), spread: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factor = np.exp2(rng.uniform(-spread, 0, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * factor).astype(np.float32)


def fixture_weights(case: str, names: tuple[str, str, str]) -> dict[str, nvfp4.Packed]:
    """Module name -> its three tensors, for every module of the naive checkpoint that has all three."""
    found = read_tensors(FIXTURES / case / "naive")
    weights = {}
    for name in found:
        module, _, suffix = name.rpartition(".")
        if suffix != names[0] or any(f"{module}.{n}" not in found for n in names):
            continue
        codes, scales, scale = (found[f"{module}.{n}"] for n in names)
        weights[module] = nvfp4.Packed(
            np.frombuffer(codes[2], np.uint8).reshape(codes[1]),
            np.frombuffer(scales[2], np.uint8).reshape(scales[1]),
            np.frombuffer(scale[2], np.float32).reshape(scale[1]),
        )
    return weights


def by_hand(weight: np.ndarray, weight_scale: np.ndarray, scale: float) -> np.ndarray:
    """A second decoder, element by element in Python: the definition of the format, and nothing else."""
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    block = weight.shape[-1] * 2 // weight_scale.shape[-1]
    out = np.zeros((*weight.shape[:-1], weight.shape[-1] * 2))
    for index in np.ndindex(*out.shape):
        byte = int(weight[(*index[:-1], index[-1] // 2)])
        code = byte >> 4 if index[-1] % 2 else byte & 15
        e4m3 = int(weight_scale[(*index[:-1], index[-1] // block)])
        exponent, mantissa = (e4m3 >> 3) & 15, e4m3 & 7
        factor = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        out[index] = (-1 if code & 8 else 1) * magnitudes[code & 7] * factor * scale
    return out


# --- E4M3 ---------------------------------------------------------------------------------------------------------


def test_every_e4m3_byte_survives_the_way_to_float32_and_back() -> None:
    bits = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(float8.float32_to_e4m3(float8.e4m3_to_float32(bits)), bits)


def test_e4m3_halfway_points_go_to_the_even_byte_and_their_neighbours_to_the_nearer_one() -> None:
    values = float8.e4m3_to_float32(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    lower = np.arange(0x7E, dtype=np.uint8)
    np.testing.assert_array_equal(float8.float32_to_e4m3(middle), lower + (lower & 1))
    np.testing.assert_array_equal(float8.float32_to_e4m3(np.nextafter(middle, np.float32(0))), lower)
    np.testing.assert_array_equal(float8.float32_to_e4m3(np.nextafter(middle, np.float32(999))), lower + 1)
    np.testing.assert_array_equal(float8.float32_to_e4m3(-middle), (lower + (lower & 1)) | 0x80)


def test_e4m3_saturates_at_448_and_keeps_nan() -> None:
    values = np.array([448, 449, 464, 465, 1e38, np.inf, -np.inf, -500, np.nan, 1e-45, 2**-10], dtype=np.float32)
    expected = [0x7E] * 6 + [0xFE, 0xFE, 0x7F, 0, 0]
    assert float8.float32_to_e4m3(values).tolist() == expected
    assert float8.float32_to_e4m3(np.float32(-0.0).reshape(())).item() == 0x80


def test_e4m3_agrees_with_torch_on_random_bit_patterns() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.clip(bits.view(np.float32), -448, 448)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(float8.float32_to_e4m3(values), expected)


# --- encode and decode against ModelOpt -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_encode_gives_modelopts_bytes(case: str) -> None:
    expected, _ = modelopt(case)
    weight, weight_scale, weight_scale_2 = encode(case)
    assert weight.dtype == weight_scale.dtype == np.uint8
    assert weight_scale_2.dtype == np.float32
    assert weight_scale_2.shape == ()
    assert weight.shape == expected.weight.shape
    assert weight_scale.shape == expected.weight_scale.shape
    assert weight.tobytes() == expected.weight.tobytes()
    assert weight_scale.tobytes() == expected.weight_scale.tobytes()
    assert weight_scale_2.tobytes() == expected.scale.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_decode_gives_modelopts_bits(case: str) -> None:
    packed, _ = modelopt(case)
    decoded = nvfp4.decode(*packed)
    assert decoded.dtype == np.float32
    assert decoded.shape == MODELOPT[f"{case}.input"].shape
    assert decoded.tobytes() == MODELOPT[f"{case}.decoded"].tobytes()


def test_a_tensor_of_zeros_encodes_to_nan_scales_as_in_modelopt() -> None:
    weight, weight_scale, weight_scale_2 = nvfp4.encode(np.zeros((2, 32), np.float32))
    assert weight_scale_2 == 0
    assert np.isnan(float8.e4m3_to_float32(weight_scale)).all()
    assert (weight == 0x77).all()


def test_code_8_decodes_to_positive_zero() -> None:
    decoded = nvfp4.decode(np.full((1, 8), 0x88, np.uint8), np.full((1, 1), 0x38, np.uint8), np.float32(1))
    assert decoded.tobytes() == np.zeros((1, 16), np.float32).tobytes()


def test_a_tiny_negative_gets_code_8_and_negative_zero_code_0() -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :4] = [6, -1e-30, -0.0, 0.0]
    codes, _, _ = nvfp4.encode(weight)
    assert codes[0, :2].tolist() == [0x87, 0x00]


def test_the_even_element_is_in_the_low_nibble() -> None:
    weight = np.zeros((1, 16), np.float32)
    weight[0, :2] = [6, 1]
    codes, _, _ = nvfp4.encode(weight)
    assert codes[0, 0] == 0x27


def test_dividing_by_six_first_would_give_other_bytes_now_and_then() -> None:
    """Why the order of operations is pinned: the other order is not the same function."""
    weight = random_weight(1, (4000, 16))
    _, scales, scale = nvfp4.encode(weight)
    amax = np.abs(weight).max(axis=1)
    other = float8.float32_to_e4m3(np.clip(amax / np.float32(6) / scale, np.float32(2**-9), np.float32(448)))
    mine = float8.float32_to_e4m3(np.clip(amax / (np.float32(6) * scale), np.float32(2**-9), np.float32(448)))
    np.testing.assert_array_equal(scales[:, 0], mine)
    quotients = np.random.default_rng(0).uniform(0, 448, 400_000).astype(np.float32)
    assert ((quotients / np.float32(6) / scale) != (quotients / (np.float32(6) * scale))).any()
    assert np.abs(other.astype(int) - mine.astype(int)).max() <= 1


@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_w4a16_nvfp4", "dg_w4a8_nvfp4_fp8"])
def test_real_checkpoints_decode_as_the_format_says(case: str) -> None:
    weights = fixture_weights(case, ("weight", "weight_scale", "weight_scale_2"))
    assert len(weights) == 74
    for module in sorted(weights)[::15]:
        packed = weights[module]
        decoded = nvfp4.decode(*packed)
        np.testing.assert_allclose(decoded, by_hand(*packed[:2], float(packed.scale)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_nvfp4_sharded", "dg_w4a8_nvfp4_fp8"])
def test_real_checkpoints_encode_to_what_they_were(case: str) -> None:
    """Decoding what an exporter wrote and encoding it again changes no decoded value: the grid is the same."""
    weights = fixture_weights(case, ("weight", "weight_scale", "weight_scale_2"))
    assert len(weights) >= 74
    for packed in weights.values():
        decoded = nvfp4.decode(*packed)
        block = decoded.shape[-1] // packed.weight_scale.shape[-1]
        again = nvfp4.encode(decoded, packed.scale, block=block)
        multiplier = float8.e4m3_to_float32(packed.weight_scale.ravel()) * packed.scale
        full = np.abs(decoded).reshape(-1, block).max(1) == 6 * multiplier
        assert full.mean() > 0.5  # most blocks use the largest magnitude; for those the scale comes back
        same = (again[1].ravel() == packed.weight_scale.ravel())[full]
        assert same.all()
        codes = again[0].reshape(-1, block // 2)[full], packed.weight.reshape(-1, block // 2)[full]
        # Code 8 decodes to +0.0, which encodes to code 0: the only byte that may change.
        np.testing.assert_array_equal(*(_without_negative_zeros(c) for c in codes))


def _without_negative_zeros(codes: np.ndarray) -> np.ndarray:
    low, high = codes & 15, codes >> 4
    return np.where(low == 8, 0, low) | np.where(high == 8, 0, high) << 4


def test_compressed_tensors_weights_decode_with_the_reciprocal() -> None:
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    weights = fixture_weights("llmcompressor_nvfp4_dg", names)
    assert len(weights) == 74
    module = "model.decoder.layers.0.self_attn.q_proj"
    packed = weights[module]
    decoded = nvfp4.decode(*packed, reciprocal=True)
    np.testing.assert_allclose(decoded, by_hand(*packed[:2], 1 / float(packed.scale[0])), rtol=1e-6)
    # q, k and v share one global scale, that of the largest of them
    trio = [weights[module.replace("q_proj", n)] for n in ("q_proj", "k_proj", "v_proj")]
    assert len({float(p.scale[0]) for p in trio}) == 1
    largest = max(np.abs(nvfp4.decode(*p, reciprocal=True)).max() for p in trio)
    assert largest == pytest.approx(448 * 6 / float(packed.scale[0]), rel=0.07)


def test_both_exporters_wrote_weights_of_one_spread() -> None:
    """The two models are not the same, but both are N(0, 0.02): an error of scale in either form would show."""
    left = fixture_weights("dg_nvfp4", ("weight", "weight_scale", "weight_scale_2"))
    right = fixture_weights("llmcompressor_nvfp4_dg", ("weight_packed", "weight_scale", "weight_global_scale"))
    for weights, reciprocal in ((left, False), (right, True)):
        values = np.concatenate([nvfp4.decode(*p, reciprocal=reciprocal).ravel() for p in weights.values()])
        assert values.std() == pytest.approx(0.02, rel=0.03)


# --- shapes and dtypes ----------------------------------------------------------------------------------------------


def test_a_last_axis_that_is_no_multiple_of_16_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.encode(np.ones((4, 24), np.float32))
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.decode(np.zeros((4, 12), np.uint8), np.zeros((4, 1), np.uint8), np.float32(1))
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.repack(np.zeros((4, 12), np.uint8), np.zeros((4, 1), np.uint8), np.float32(1), np.float32(2))


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (np.zeros((4, 16), np.uint8), np.zeros((4, 3), np.uint8)),
        (np.zeros((4, 16), np.uint8), np.zeros((2, 4), np.uint8)),
        (np.zeros((4, 16), np.int8), np.zeros((4, 2), np.uint8)),
        (np.zeros((4, 16), np.uint8), np.zeros((4, 2), np.float32)),
        (np.zeros((), np.uint8), np.zeros((), np.uint8)),
    ],
)
def test_tensors_that_do_not_belong_together_are_a_value_error(weight: np.ndarray, scale: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected|belongs|scalar"):
        nvfp4.decode(weight, scale, np.float32(1))


def test_blocks_of_32_are_told_by_the_shapes() -> None:
    weight = random_weight(2, (6, 64))
    packed = nvfp4.encode(weight, block=32)
    assert packed[1].shape == (6, 2)
    np.testing.assert_allclose(nvfp4.decode(*packed), by_hand(*packed[:2], float(packed[2])), rtol=1e-6)
    larger = packed[2] * np.float32(1.7)
    again = (*nvfp4.repack(*packed, larger), larger)
    assert again[1].shape == (6, 2)
    assert nvfp4.agree_up_to_scaling(packed, again)


def test_an_empty_weight_decodes_to_an_empty_one() -> None:
    assert nvfp4.decode(np.zeros((0, 8), np.uint8), np.zeros((0, 1), np.uint8), np.float32(1)).shape == (0, 16)
    with pytest.raises(ValueError, match="empty"):
        nvfp4.encode(np.zeros((0, 16), np.float32))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(5, (7, 11, 48), spread=8)
    whole = nvfp4.encode(weight)
    larger = whole[2] * np.float32(1.3)
    other = (*nvfp4.repack(*whole, larger), larger)
    answers = nvfp4.decode(*whole), nvfp4.agree_up_to_scaling(whole, other), nvfp4.change(whole, other)
    monkeypatch.setattr(nvfp4, "CHUNK_BLOCKS", 5)
    chunked = nvfp4.encode(weight)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, chunked, strict=True))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(other, nvfp4.repack(*whole, larger), strict=False))
    assert nvfp4.decode(*whole).tobytes() == answers[0].tobytes()
    assert nvfp4.agree_up_to_scaling(whole, other) == answers[1]
    assert nvfp4.change(whole, other) == pytest.approx(answers[2])


def test_memory_of_a_repack_does_not_grow_with_the_tensor() -> None:
    def peak(rows: int) -> int:
        weight = np.full((rows, 512), 0x35, np.uint8)
        scales = np.full((rows, 64), 0x40, np.uint8)
        tracemalloc.start()
        nvfp4.repack(weight, scales, np.float32(1), np.float32(3))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest - weight.nbytes - scales.nbytes  # less the result itself

    assert peak(12_000) < peak(6_000) * 1.1


# --- repack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_repack_to_the_same_scale_returns_the_input_bytes(case: str) -> None:
    packed, _ = modelopt(case)
    weight, weight_scale = nvfp4.repack(*packed, packed.scale.copy())
    assert weight.tobytes() == packed.weight.tobytes()
    assert weight_scale.tobytes() == packed.weight_scale.tobytes()


def test_repack_by_a_power_of_two_changes_no_decoded_value_and_no_code() -> None:
    packed = nvfp4.encode(random_weight(7, spread=3))
    doubled = packed[2] * np.float32(2)
    weight, weight_scale = nvfp4.repack(*packed, doubled)
    assert weight.tobytes() == packed[0].tobytes()
    assert nvfp4.decode(weight, weight_scale, doubled).tobytes() == nvfp4.decode(*packed).tobytes()


def test_repack_keeps_every_sign_bit_that_of_code_8_included() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(32, 8)
    scales = np.full((32, 1), 0x48, np.uint8)
    for ratio in (1.1, 3.7, 1e6):
        weight, _ = nvfp4.repack(codes, scales, np.float32(1), np.float32(ratio))
        np.testing.assert_array_equal(weight & 0x88, codes & 0x88)


def test_the_new_block_scale_is_the_old_one_times_the_ratio_clamped_and_rounded() -> None:
    packed = nvfp4.encode(random_weight(8, spread=9))
    for new in (packed[2] * np.float32(1.37), packed[2] * np.float32(400), packed[2] / np.float32(5)):
        _, scales = nvfp4.repack(*packed, new)
        wanted = float8.e4m3_to_float32(packed[1]) * packed[2] / new
        expected = float8.float32_to_e4m3(np.clip(wanted, np.float32(2**-9), np.float32(448)))
        np.testing.assert_array_equal(scales, expected)


@QUICK
@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(1, 5000, width=32), spread=st.sampled_from([0.0, 4.0, 20.0]))
def test_repack_to_a_larger_scale_moves_no_element_further_than_promised(
    seed: int, ratio: float, spread: float
) -> None:
    packed = nvfp4.encode(random_weight(seed, (5, 48), spread))
    new = np.float32(packed[2] * np.float32(ratio))
    weight, scales = nvfp4.repack(*packed, new)
    assert not np.isnan(float8.e4m3_to_float32(scales)).any()
    before, after = nvfp4.decode(*packed).astype(float), nvfp4.decode(weight, scales, new).astype(float)
    unit = np.repeat(float8.e4m3_to_float32(scales), 16, axis=-1)
    bound = np.maximum(unit, 3 * 2.0**-9) * float(new)
    assert (np.abs(before - after) <= bound * (1 + 1e-6)).all()
    # and what was nearest stays nearest: no other code of the same sign comes closer
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * (unit * float(new))[..., None]
    best = np.abs(np.abs(before)[..., None] - grid).min(axis=-1)
    assert (np.abs(np.abs(before) - np.abs(after)) <= best + 1e-6 * np.abs(before)).all()
    moved = nvfp4.change(packed, (weight, scales, new))
    assert moved.largest == np.abs(before - after).max()
    assert moved.rms == pytest.approx(np.sqrt(((before - after) ** 2).mean()))


@QUICK
@given(
    codes=st.binary(min_size=16, max_size=16),
    scales=st.binary(min_size=2, max_size=2),
    old=st.floats(2.0**-40, 2.0**40, width=32),
    new=st.floats(2.0**-40, 2.0**40, width=32),
)
def test_repack_never_makes_a_nan(codes: bytes, scales: bytes, old: float, new: float) -> None:
    assume(max(scales) < 0x7F)
    weight, scale = np.frombuffer(codes, np.uint8), np.frombuffer(scales, np.uint8)
    repacked = nvfp4.repack(weight, scale, np.float32(old), np.float32(new))
    assert np.isfinite(nvfp4.decode(*repacked, np.float32(new))).all()


def test_a_block_that_falls_below_the_smallest_scale_is_clamped_to_it() -> None:
    codes, scales = np.full((1, 8), 0x77, np.uint8), np.full((1, 1), 0x01, np.uint8)
    weight, new = nvfp4.repack(codes, scales, np.float32(1), np.float32(1000))
    assert new.tolist() == [[0x01]]
    assert (weight & 0x77 == 0).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_repack_refuses_a_scale_that_means_nothing(bad: float) -> None:
    packed = nvfp4.encode(random_weight(9, (2, 16)))
    with pytest.raises(ValueError, match="finite positive"):
        nvfp4.repack(*packed, np.float32(bad))
    with pytest.raises(ValueError, match="finite positive"):
        nvfp4.repack(packed[0], packed[1], np.float32(bad), packed[2])


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0xB8])
def test_repack_refuses_a_block_scale_that_is_nan_or_negative(byte: int) -> None:
    scales = np.array([[0x38, byte]], np.uint8)
    with pytest.raises(ValueError, match="NaN or a negative"):
        nvfp4.repack(np.zeros((1, 16), np.uint8), scales, np.float32(1), np.float32(2))


def test_modelopts_tensor_of_zeros_is_not_repacked() -> None:
    packed, _ = modelopt("all_zero")
    with pytest.raises(ValueError, match="finite positive"):
        nvfp4.repack(*packed, np.float32(1))


def test_the_reciprocal_form_gives_the_same_weight() -> None:
    """A larger weight_scale_2 is a smaller weight_global_scale; powers of two make both forms exact."""
    packed = nvfp4.encode(random_weight(11), np.float32(2.0**-8))
    direct = nvfp4.repack(*packed, np.float32(2.0**-8 * 1.5))
    inverse = nvfp4.repack(packed[0], packed[1], np.float32(2.0**8), np.float32(2.0**8 / 1.5), reciprocal=True)
    assert direct[0].tobytes() == inverse[0].tobytes()
    assert direct[1].tobytes() == inverse[1].tobytes()
    weight, scale = nvfp4.repack(packed[0], packed[1], np.array([256.0], np.float32), np.float32(256), reciprocal=True)
    assert weight is packed[0]
    assert scale is packed[1]


def test_the_widest_scale_is_the_largest_or_the_smallest_reciprocal() -> None:
    scales = [np.array([3.0], np.float32), np.float32(5), np.float32(4)]
    assert nvfp4.widest(scales) == 5
    assert nvfp4.widest(scales, reciprocal=True) == 3
    with pytest.raises(ValueError, match="finite positive"):
        nvfp4.widest([np.float32(1), np.float32(np.nan)])
    with pytest.raises(ValueError, match="choose"):
        nvfp4.widest([])


def test_real_compressed_tensors_weights_repack_to_a_smaller_global_scale() -> None:
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    weights = fixture_weights("llmcompressor_nvfp4_dg", names)
    gate, up = (weights[f"model.decoder.layers.0.mlp.{n}"] for n in ("gate_proj", "up_proj"))
    target = nvfp4.widest([gate.scale, up.scale], reciprocal=True)
    for packed in (gate, up):
        again = nvfp4.Packed(*nvfp4.repack(*packed, target, reciprocal=True), target)
        assert nvfp4.agree_up_to_scaling(packed, again, reciprocal=True)
        moved = nvfp4.change(packed, again, reciprocal=True)
        assert moved.largest <= 448 / float(target)
        assert moved.rms < 0.1 * nvfp4.decode(*packed, reciprocal=True).std()


# --- agreement ----------------------------------------------------------------------------------------------------


@QUICK
@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(1, 4000, width=32), spread=st.sampled_from([0.0, 4.0, 16.0]))
def test_two_encodings_of_one_weight_agree(seed: int, ratio: float, spread: float) -> None:
    weight = random_weight(seed, (6, 48), spread)
    one = nvfp4.encode(weight)
    larger = np.float32(one[2] * np.float32(ratio))
    other = nvfp4.encode(weight, larger)
    assert nvfp4.agree_up_to_scaling(one, other)
    assert nvfp4.agree_up_to_scaling(other, one)
    assert nvfp4.agree_up_to_scaling(one, (*nvfp4.repack(*one, larger), larger))


@QUICK
@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(1, 8, width=32), where=st.integers(0, 6 * 48 - 1))
def test_one_element_that_is_another_number_is_found(seed: int, ratio: float, where: int) -> None:
    one = nvfp4.encode(random_weight(seed, (6, 48)))
    larger = np.float32(one[2] * np.float32(ratio))
    weight, scales = nvfp4.repack(*one, larger)
    byte, shift = weight.reshape(-1)[where // 2], 4 * (where % 2)
    code = (byte >> shift) & 15
    changed = code ^ 8 if code & 7 >= 2 else (code & 8) | 4  # the other sign, or 2.0 in place of 0 and 0.5
    weight = weight.copy()
    weight.reshape(-1)[where // 2] = byte & ~np.uint8(15 << shift) | np.uint8(changed << shift)
    answer = nvfp4.agree_up_to_scaling(one, (weight, scales, larger))
    assert not answer
    assert answer.outside == 1
    assert answer.first == (where // 48, where % 48)
    assert answer.elements == 6 * 48


def test_equal_scales_and_one_code_changed_by_one_step_is_not_scaling() -> None:
    one = nvfp4.encode(random_weight(12))
    weight = one[0].copy()
    weight[3, 5] ^= 1
    answer = nvfp4.agree_up_to_scaling(one, (weight, one[1], one[2]))
    assert not answer
    assert answer.first == (3, 10)
    assert nvfp4.agree_up_to_scaling(one, one)


def test_another_weight_of_the_same_spread_does_not_agree() -> None:
    one, other = nvfp4.encode(random_weight(13)), nvfp4.encode(random_weight(14))
    answer = nvfp4.agree_up_to_scaling(one, other)
    assert not answer
    assert answer.outside > answer.elements / 2


def test_experts_of_a_real_checkpoint_agree_with_themselves_only() -> None:
    weights = fixture_weights("dg_nvfp4", ("weight", "weight_scale", "weight_scale_2"))
    stem = "layers.1.experts.{}.gate_proj"
    decoder = [weights["model.decoder." + stem.format(e)] for e in range(4)]
    encoder = [weights["model.encoder.language_model." + stem.format(e)] for e in range(4)]
    for i, left in enumerate(decoder):
        for j, right in enumerate(encoder):
            scaled = np.float32(right.scale * np.float32(1.21))
            again = (*nvfp4.repack(*right, scaled), scaled)
            assert bool(nvfp4.agree_up_to_scaling(left, again)) == (i == j)


def test_a_block_of_zeros_does_not_agree_with_anything_however_large_its_scale() -> None:
    one = nvfp4.encode(random_weight(15, (1, 32)))
    zeros = (np.zeros((1, 16), np.uint8), np.full((1, 2), 0x7E, np.uint8), np.float32(1))
    assert not nvfp4.agree_up_to_scaling(one, zeros)


def test_nan_and_negative_scales_agree_with_nothing() -> None:
    one = nvfp4.encode(random_weight(16, (2, 16)))
    for bad in (np.nan, np.inf, -1.0, 0.0):
        assert not nvfp4.agree_up_to_scaling(one, (one[0], one[1], np.float32(bad)))
    for byte in (0x7F, 0xFF, 0xB8):
        scales = one[1].copy()
        scales[1, 0] = byte
        assert not nvfp4.agree_up_to_scaling(one, (one[0], scales, one[2]))


def test_weights_of_different_shapes_cannot_be_compared() -> None:
    one, other = nvfp4.encode(random_weight(17, (2, 16))), nvfp4.encode(random_weight(17, (1, 32)))
    with pytest.raises(ValueError, match="cannot be compared"):
        nvfp4.agree_up_to_scaling(one, other)
    with pytest.raises(ValueError, match="cannot be compared"):
        nvfp4.change(one, other)


# --- CuPy -------------------------------------------------------------------------------------------------------------


def _cupy() -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            pytest.skip("CuPy sees no GPU")
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"CuPy cannot reach a GPU: {error}")
    return cupy


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_same_bytes(case: str) -> None:
    cupy = _cupy()
    expected, weight = modelopt(case)
    given_scale = MODELOPT[f"{case}.given"] if f"{case}.given" in MODELOPT.files else None
    got = nvfp4.encode(cupy.asarray(weight), given_scale)
    assert all(type(part).__module__.startswith("cupy") for part in got)
    assert [part.get().tobytes() for part in got] == [part.tobytes() for part in expected]
    decoded = nvfp4.decode(*got).get()
    if case != "all_zero":  # a GPU's NaN has one bit pattern, a CPU's keeps the sign
        assert decoded.tobytes() == MODELOPT[f"{case}.decoded"].tobytes()


@pytest.mark.gpu
def test_a_gpu_repacks_compares_and_measures_as_numpy_does() -> None:
    cupy = _cupy()
    packed = nvfp4.encode(random_weight(21, (40, 320), spread=12))
    on_gpu = tuple(cupy.asarray(part) for part in packed)
    for ratio in (1.0, 1.37, 3.0, 900.0):
        new = np.float32(packed[2] * np.float32(ratio))
        here, there = nvfp4.repack(*packed, new), nvfp4.repack(*on_gpu, new)
        assert [part.tobytes() for part in here] == [part.get().tobytes() for part in there]
        answers = nvfp4.agree_up_to_scaling(packed, (*here, new)), nvfp4.agree_up_to_scaling(on_gpu, (*there, new))
        assert answers[0].agrees
        assert answers[0] == answers[1]
        changes = nvfp4.change(packed, (*here, new)), nvfp4.change(on_gpu, (*there, new))
        assert changes[0].largest == changes[1].largest
        assert changes[0].rms == pytest.approx(changes[1].rms, rel=1e-12)
