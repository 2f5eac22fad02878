"""merge_tensor: the entry for other programs; values are checked in tests/methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pymerge


def test_numpy_in_numpy_out() -> None:
    base, model = np.zeros((2, 3), np.float16), np.ones((2, 3), np.float16)
    result = pymerge.merge_tensor("task_arithmetic", base, [model], weight=0.5)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float16
    assert result.tolist() == [[0.5] * 3] * 2


def test_torch_in_torch_out_and_inputs_are_untouched() -> None:
    base, model = torch.zeros(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    result = pymerge.merge_tensor("ties", base, [model, model], weight=[1, 2], density=0.4)
    assert result.dtype == torch.bfloat16
    assert result.tolist() == [1, 1, 0, 0, 0]
    assert model.tolist() == [1.0] * 5


def test_mixed_dtypes_give_float32_and_out_dtype_overrides() -> None:
    models = [torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float16)]
    assert pymerge.merge_tensor("linear", None, models, weight=1.0).dtype == torch.float32
    result = pymerge.merge_tensor("linear", None, models, weight=1.0, out_dtype="float64")
    assert result.dtype == torch.float64
    assert result.tolist() == [0.5] * 3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_bytes(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(3_000_017, generator=generator).bfloat16() for _ in range(3))
    results = [
        pymerge.merge_tensor("ties", base, models, weight=0.7, density=0.3, threads=t)
        for t in (1, threads)
    ]
    assert results[0].view(torch.int16).equal(results[1].view(torch.int16))


def test_empty_tensors_merge_to_empty() -> None:
    for method in ("linear", "ties"):
        empty = torch.empty(0, 4)
        result = pymerge.merge_tensor(method, empty, [empty, empty], weight=1.0)
        assert result.shape == (0, 4)


def test_model_wide_trim_of_one_tensor_is_the_tensor_trim() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(40, 50, generator=generator) for _ in range(3))
    wide, narrow = (
        pymerge.merge_tensor("ties", base, models, weight=1.0, density=0.3, trim_scope=scope)
        for scope in ("model", "tensor")
    )
    assert wide.equal(narrow)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("linaer", None, 1, {}), "did you mean 'linear'"),
        (("linear", None, 1, {"wieght": 1.0}), "did you mean 'weight'"),
        (("linear", None, 1, {}), "needs the parameter 'weight'"),
        (("linear", None, 2, {"weight": [1.0]}), "1 values for 2 tensors"),
        (("linear", None, 1, {"weight": "much"}), "expects a number"),
        (("linear", None, 1, {"weight": 1.0, "normalize": 1}), "true or false"),
        (("linear", None, 2, {"weight": [1.0, -1.0]}), "sum to zero"),
        (("ties", None, 1, {"weight": 1.0}), "needs a base"),
        (("passthrough", None, 2, {}), "passthrough takes 1"),
        (("ties", 0, 1, {"weight": 1.0, "density": 1.5}), "from 0.0 to 1.0"),
        (("ties", 0, 1, {"weight": 1.0, "trim_scope": "world"}), "tensor"),
        (("linear", None, 1, {"weight": 1.0, "out_dtype": "int8"}), "int8"),
    ],
)
def test_mistakes_are_named(call: tuple, message: str) -> None:
    method, base, count, parameters = call
    tensors = [torch.ones(3) for _ in range(count)]
    with pytest.raises(pymerge.PymergeError, match=message):
        pymerge.merge_tensor(
            method, None if base is None else torch.zeros(3), tensors, **parameters
        )


def test_shapes_must_agree_and_arrays_be_contiguous() -> None:
    with pytest.raises(pymerge.PymergeError, match=r"shape \(3,\), expected \(2,\)"):
        pymerge.merge_tensor("linear", None, [torch.ones(2), torch.ones(3)], weight=1.0)
    with pytest.raises(pymerge.PymergeError, match="contiguous"):
        pymerge.merge_tensor("linear", None, [torch.ones(4, 4).T, torch.ones(4, 4)], weight=1.0)
