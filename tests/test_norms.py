"""The norm of the file: which kind, with what gain, bias and epsilon."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from llamatelemetry import norms


def model(epsilon, eps=0.0, **tensors):
    tensors = {name.replace("_", "."): np.array(values) for name, values in tensors.items()}
    return SimpleNamespace(
        architecture="any",
        metadata={f"any.attention.{epsilon}": eps},
        norm_eps=eps,
        tensors=pd.DataFrame(index=list(tensors)),
        tensor=tensors.__getitem__,
    )


def test_rms_norm_keeps_the_mean():
    gguf = model("layer_norm_rms_epsilon", n_weight=[1.0, 2.0])
    length = np.sqrt(12.5)
    assert norms.normalized([[3.0, 4.0]], gguf, "n") == pytest.approx(
        np.array([[3 / length, 8 / length]])
    )
    assert norms.divisor([3.0, 4.0], gguf) == pytest.approx(np.array([length]))
    assert not norms.is_layer_norm(gguf)


def test_layer_norm_takes_the_mean_away_and_adds_the_bias():
    gguf = model("layer_norm_epsilon", n_weight=[1.0, 1.0], n_bias=[0.0, 5.0])
    assert norms.normalized([[3.0, 7.0]], gguf, "n") == pytest.approx(np.array([[-1.0, 6.0]]))
    assert norms.divisor([3.0, 7.0], gguf) == pytest.approx(np.array([2.0]))


def test_a_norm_without_weights_and_a_state_of_zeros():
    gguf = model("layer_norm_rms_epsilon", eps=0.25)
    assert norms.normalized([[0.0, 0.0]], gguf, "n").tolist() == [[0.0, 0.0]]
    assert norms.divisor([0.0, 0.0], gguf).tolist() == [0.5]
