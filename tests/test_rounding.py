"""What rounding activations is said to do, against products that round as llama.cpp's two kinds of
kernel do."""

from types import SimpleNamespace

import numpy as np
import pytest
from bench_rounding_cause import AFTER, BEFORE, EXACT, product, weights
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from llamatelemetry.rounding import deviation


@pytest.fixture(scope="module")
def inputs():
    """Activations with outliers of a few dimensions, as models have them. (token, in)"""
    x = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    x[:, [3, 77, 300]] *= 20
    return x


def matrix(kind, seed=1):
    values = np.random.default_rng(seed).normal(size=(300, 512)).astype(np.float32)
    type_ = GGMLQuantizationType[kind]
    return weights(SimpleNamespace(data=quantize(values, type_), tensor_type=type_))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q5_1"])
def test_it_is_the_spread_of_products_that_round(inputs, kind):
    weight = matrix(kind)
    exact = product(inputs, weight, EXACT)
    for scheme, gpu in ((AFTER, False), (BEFORE, True)):
        if kind == "Q5_0" and gpu:
            continue  # only for short texts are its codes multiplied from 0 up: the larger of both is said
        said = deviation(inputs, weight[0], kind, gpu)
        ratio = (product(inputs, weight, scheme) - exact) / said
        assert 0.9 < ratio.std() < 1.1 and abs(ratio.mean()) < 0.05, scheme
    coarser = deviation(inputs, weight[0], kind, True) / deviation(inputs, weight[0], kind, False)
    assert (coarser == 1).all() if kind == "Q8_0" else 1.8 < coarser.mean() < 3.5


def test_a_step_of_k_quants_spans_256_on_a_cpu():
    x = np.ones((1, 512))
    x[0, 0] = 127
    one = deviation(x, np.eye(512), "Q6_K", gpu=True)[0] * np.sqrt(12)
    np.testing.assert_allclose(one, [1.0] * 256 + [1 / 127] * 256)
    np.testing.assert_allclose(
        deviation(x, np.eye(512), "IQ4_NL", False)[0, [31, 32]] * np.sqrt(12), [1, 1 / 127]
    )


def test_a_k_quants_weight_of_code_zero_is_its_smallest_below_zero():
    x, weight = np.full((1, 256), 127.0), np.zeros((1, 256))
    weight[0, :32], weight[0, 0] = 3.0, -1.0  # codes reach 4, once from -1 ...
    weight[0, 32:64] = 2.0  # ... and 2 where no weight is below 0
    expected = np.sqrt((31 * 4.0**2 + 32 * 2.0**2) / 12)
    assert deviation(x, weight, "Q4_K", gpu=True)[0, 0] == pytest.approx(expected)
    assert deviation(x, weight, "Q4_K", gpu=False)[0, 0] == pytest.approx(
        np.sqrt((31 * 9 + 1 + 32 * 4) / 12)
    )


@pytest.mark.parametrize("kind, step", [("F16", 2.0**-11), ("BF16", 2.0**-8), ("F32", 2.0**-23)])
def test_floats_round_relative_to_each_input(kind, step):
    assert deviation([[2.0, 0.0]], [[3.0, 5.0]], kind, gpu=False)[0, 0] == pytest.approx(
        6 * step / np.sqrt(3)
    )


def test_a_gpu_keeps_ten_bits_of_both_factors_of_32_bit_floats():
    def tf32(values):  # 13 of the 23 bits of the fraction are rounded away
        bits = values.view(np.uint32)
        return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)

    x, w = np.random.default_rng(0).normal(size=(2, 50, 400)).astype(np.float32)
    off = tf32(x).astype(np.float64) @ tf32(w).T.astype(np.float64) - x.astype(
        np.float64
    ) @ w.T.astype(np.float64)
    ratio = (off / deviation(x, w, "F32", gpu=True)).std()
    assert (
        0.6 < ratio < 1
    )  # the step is an upper bound: it is relative to the power of two below each value
