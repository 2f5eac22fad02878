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
        (("linear", None, 1, {"weight": "much"}), "linear: weight is a number, found 'much'"),
        (("linear", None, 1, {"weight": float("nan")}), "a number and finite, found nan"),
        (("linear", None, 2, {"weight": [1.0, float("inf")]}), "and finite, found inf"),
        (("linear", None, 1, {"weight": 1e300}), r"finite in float32, found 1e\+300"),
        (("linear", None, 1, {"weight": np.float32("nan")}), "finite, found nan"),
        (("linear", None, 1, {"weight": np.array(1.0)}), r"a number, found array\(1\.\)"),
        (("linear", None, 1, {"weight": True}), "weight is a number, found True"),
        (("linear", None, 1, {"weight": 1.0, "normalize": 2}), "true or false, found 2"),
        (("linear", None, 1, {"weight": 1.0, "threads": 0}), "threads: .* found 0"),
        (("linear", None, 1, {"weight": 1.0, "threads": -3}), "threads: .* found -3"),
        (("linear", None, 1, {"weight": 1.0, "threads": 1025}), "at most 1024, found 1025"),
        (("linear", None, 1, {"weight": 1.0, "threads": 2.0}), r"whole number .* found 2\.0"),
        (("linear", None, 2, {"weight": [1.0, -1.0]}), "sum to zero"),
        (("ties", None, 1, {"weight": 1.0}), "needs a base"),
        (("passthrough", None, 2, {}), "passthrough takes 1"),
        (("ties", 0, 1, {"weight": 1.0, "density": 1.5}), "density is at most 1, found 1.5"),
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


@pytest.mark.parametrize(
    ("base", "tensors", "message"),
    [
        (None, [[1.0, 2.0]], r"tensors\[0\]: .* expected a numpy array or a torch tensor.* list"),
        (None, [torch.ones(2), 5], r"tensors\[1\]: .* found int"),
        (None, torch.ones(2, 2), "tensors is a list of arrays.* found Tensor"),
        (None, np.ones((2, 2)), "tensors is a list of arrays.* found ndarray"),
        (None, 5, "tensors is a list of arrays.* found int"),
        ("base", [torch.ones(2)], "base: .* found str"),
        (None, [np.ones(2, np.int64)], r"tensors\[0\]: .* found int64"),
    ],
    ids=["list", "number", "tensor", "array", "no list", "base", "integers"],
)
def test_what_is_no_array_is_refused(base: object, tensors: object, message: str) -> None:
    with pytest.raises(pymerge.PymergeError, match=message):
        pymerge.merge_tensor("linear", base, tensors, weight=1.0)


def test_values_are_those_of_a_recipe() -> None:
    """Whatever a recipe may say of a parameter, a call may say too."""
    models = [np.full(3, 1.0, np.float32), np.full(3, 4.0, np.float32)]
    for weight in (["2", 1], np.array([2, 1]), np.array([2.0, 1.0], np.float32), (2, 1.0)):
        for normalize in ("yes", 1, np.True_):
            result = pymerge.merge_tensor(
                "linear", None, models, weight=weight, normalize=normalize
            )
            assert result.tolist() == [2.0] * 3


def test_a_dtype_of_torch_names_the_result_too() -> None:
    result = pymerge.merge_tensor(
        "linear", None, [torch.ones(3)], weight=1.0, out_dtype=torch.bfloat16
    )
    assert result.dtype == torch.bfloat16


def test_shapes_must_agree_and_arrays_be_contiguous() -> None:
    with pytest.raises(pymerge.PymergeError, match=r"shape \(3,\), expected \(2,\)"):
        pymerge.merge_tensor("linear", None, [torch.ones(2), torch.ones(3)], weight=1.0)
    with pytest.raises(pymerge.PymergeError, match="contiguous"):
        pymerge.merge_tensor("linear", None, [torch.ones(4, 4).T, torch.ones(4, 4)], weight=1.0)
