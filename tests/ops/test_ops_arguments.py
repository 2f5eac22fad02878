"""Wrong arguments, a missing instruction set or extension: what is said, and that nothing runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from wrong_calls import BINS, BITS, OUT, SHORT, SUMS, WRONG, X

from pymerge import _C, ops
from pymerge.errors import BackendError, PymergeError
from pymerge.formats import BF16, F16
from pymerge.ops import OPS, arguments, cpu, reference, view
from pymerge.ops.selection import Keep


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, calls in WRONG.items() for name in calls]
)
def test_a_wrong_argument_is_named(op: str, name: str, backend: Any) -> None:
    call, message = WRONG[op][name]
    with pytest.raises(PymergeError, match=f"^{op}: .*{message}"):
        call(backend)
    for written in (OUT, BITS, BINS, SUMS):
        assert not written.any()
    np.testing.assert_array_equal(X, np.arange(8))


def test_every_op_has_a_wrong_call() -> None:
    assert set(WRONG) == set(OPS)


def test_right_arguments_of_every_kind_of_number_pass() -> None:
    """numpy's integers and floats, ranges, tuples; what is too large for float32 is infinite."""
    found = arguments.axpy_n(view(OUT), (view(X),), np.array([1e300]), scale=np.float64(0.1))
    assert found == (8, [float("inf")], 1.0, float(np.float32(0.1)))
    keeps = [Keep(np.int32(5), np.int64(7), draws=np.uint64(2**32), seed=np.uint64(2**64 - 1))]
    checked = arguments.kept_sums(None, [view(X)], keeps, np.int64(3), span=np.int32(3))
    assert checked == (8, [Keep(5, 7, draws=2**32, seed=2**64 - 1)], 3, 3)
    assert {type(field) for field in checked[1][0]} == {int}
    grid = arguments.axpy_grid(view(OUT), [view(X)], [[1, 2]], columns=4, along="rows")[1]
    assert (grid.dtype, grid.shape) == (np.float32, (1, 2))


@pytest.mark.parametrize(
    ("array", "format", "message"),
    [
        ([1.0], None, "expected a numpy array or a torch tensor, found list"),
        (np.zeros(4, np.int32), None, "found int32"),
        (np.zeros(4, np.uint16), None, "needs format=BF16, found no format"),
        (np.zeros(4, np.uint8), BF16, "needs format=F8_E4M3 or F8_E5M2, found BF16"),
        (np.zeros(4, np.float32), F16, "asked for F16, but a float32 array holds F32"),
        (np.zeros((4, 4), np.float32).T[1:], None, "expected a contiguous array"),
        (np.zeros(4, ">f4"), None, "native byte order"),
    ],
)
def test_a_view_says_what_it_cannot_take(array: Any, format: Any, message: str) -> None:
    with pytest.raises(PymergeError, match=message):
        view(array, format)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.complex(x, x).conj(), "found complex64"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "found qint8"),
        (lambda x: x.to("meta"), "in CPU memory, found one on meta"),
        (lambda x: x.to_sparse(), r"found layout sparse_coo; pass tensor\.to_dense\(\)"),
        (torch._neg_view, r"negated only when it is read; pass .*resolve_neg\(\)"),
    ],
    ids=["conjugate", "quantised", "meta", "sparse", "negated"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_whose_memory_is_not_its_value_is_refused(
    make: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(PymergeError, match=message):
        view(make(torch.ones(4)))


def test_a_negated_view_of_torch_itself_is_refused_and_its_copy_taken() -> None:
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    with pytest.raises(PymergeError, match="negated"):
        view(negated)
    assert ops.count_nonfinite(view(negated.resolve_neg().contiguous())) == 0


X8, X7 = view(X), view(SHORT)
KEYS = np.zeros(64, np.int64)
AT = KEYS.ctypes.data

WRONG_RAW_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "axpy": (lambda: _C.axpy_n(view(OUT), None, [X8, X7], [1, 1], 1, 1), "8 elements.* found 7"),
    "axpy base": (lambda: _C.axpy_n(view(OUT), X7, [X8], [1], 1, 1), "8 elements in the base.* 7"),
    "sample": (lambda: _C.magnitude_sample(None, [X7], 8, 0, 1, 1, AT, 8), "8 elements.* found 7"),
    "sample group": (lambda: _C.magnitude_sample(None, [X8], 8, 0, 0, 1, AT, 8), "found 0 and 1"),
    "sample keys": (lambda: _C.magnitude_sample(None, [X8], 8, 0, 1, 1, 0, 8), "found address 0"),
    "sample size": (lambda: _C.magnitude_sample(None, [X8], 8, 0, 1, 1, AT, 9), "found 9"),
    "num_sampled": (lambda: _C.num_sampled(0, 10, 0, 0), "at least 1.* found 0 and 0"),
    "num_sampled stride": (lambda: _C.num_sampled(0, 10, 1, 0), "at least 1.* found 1 and 0"),
    "num_sampled period": (lambda: _C.num_sampled(0, 10, 2**32, 2**32), r"below 2\*\*63"),
    "bracket": (lambda: _C.bracket_count(X7, [X8], 8, [0], [1], AT, AT, 8), "base, found 7"),
    "candidates": (
        lambda: _C.bracket_count(None, [X8], 8, [0], [1], AT, AT, 9),
        "most, found 9",
    ),
    "counts": (lambda: _C.bracket_count(None, [X8], 8, [0], [1], 0, AT, 8), "found address 0"),
    "histogram": (
        lambda: _C.magnitude_histogram(None, [X7], 8, 27, None, 31, AT, 16),
        "8 elements in every view, found 7",
    ),
    "bins": (
        lambda: _C.magnitude_histogram(None, [X8], 8, 27, None, 31, AT, 15),
        "expected 16 entries, found 15",
    ),
    "locate": (lambda: _C.locate_equal(X7, X8, 0, 0), "8 elements in the base, found 7"),
    "disjoint": (
        lambda: _C.disjoint_merge(
            view(OUT), X8, [X7], [1], [Keep()], 0, 1, 0, 1, None, 1, 1, None, False
        ),
        "8 elements in every view, found 7",
    ),
    "disjoint word": (
        lambda: _C.disjoint_merge(
            view(OUT), X8, [X8], [1], [Keep()], 0, 9, 0, 1, None, 1, 1, None, False
        ),
        "unknown election 9",
    ),
    "score": (
        lambda: _C.disjoint_merge(
            view(OUT), X8, [X8], [1], [Keep()], 0, 1, 0, 1, None, 1, 1, X7, False
        ),
        "8 elements in the score, found 7",
    ),
    "masks": (lambda: _C.masked_sums(X8, [0], 4, AT), "memory for .* bits, found address 0"),
    "convert": (lambda: _C.convert(view(OUT), X7), "8 elements in every view, found 7"),
}


@pytest.mark.parametrize("name", WRONG_RAW_CALLS)
def test_the_extension_itself_refuses_what_would_touch_foreign_memory(name: str) -> None:
    call, message = WRONG_RAW_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_instruction_set_is_refused_and_changes_nothing() -> None:
    before = ops.isa()
    with pytest.raises(BackendError, match=r"'sse9' cannot be used.*have scalar"):
        ops.use_isa("sse9")
    assert ops.isa() == before


def test_dispatch_takes_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    assert ops.choose("axpy_n", "cpu") == ("cpu", {})
    assert ops.choose("axpy_n", "reference").backend == "reference"
    assert ops.dispatch.function("axpy_n", "reference") is reference.axpy_n
    monkeypatch.setenv("PYMERGE_BACKEND", "reference")
    assert ops.choose("convert").backend == "reference"


def test_dispatch_takes_the_first_backend_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    for name in ("cuda", "triton"):
        module = ops.dispatch.backend_module(name)
        monkeypatch.setattr(module, "why_not", lambda op=None, name=name: f"no {name} here")
    assert ops.choose("axpy_n") == ("cpu", {"cuda": "no cuda here", "triton": "no triton here"})


def test_dispatch_refuses_what_it_does_not_know() -> None:
    with pytest.raises(BackendError, match=r"unknown op 'axpy'; the ops are axpy_n"):
        ops.choose("axpy")
    with pytest.raises(BackendError, match=r"unknown backend 'tpu'; the backends are cuda, triton"):
        ops.choose("axpy_n", "tpu")


def test_traffic_counts_every_stream_once() -> None:
    assert ops.TRAFFIC["disjoint_merge"](2, 2, 4, 2) == 12
    assert ops.TRAFFIC["axpy_n"](0, 2, 4, 4) == 12
    assert ops.TRAFFIC["bracket_count"](2, 2, 4, 2) == 10
    assert ops.TRAFFIC["convert"](0, 2, 1, 4) == 6
    assert ops.TRAFFIC["tall_masks"](2, 2, 4, 2) == 10.5
    assert ops.TRAFFIC["masked_sums"](2, 2, 8, 2) == 3
    assert ops.TRAFFIC["apply_task"](2, 2, 1, 2) == 6.125


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


USE = """
import numpy as np
from pymerge import ops
from pymerge.errors import BackendError
x = np.ones(4, np.float32)
try:
    print(ops.count_nonfinite(ops.view(x)), ops.isa())
except BackendError as error:
    print(error)
"""


def test_the_environment_names_the_instruction_set() -> None:
    assert run_python(USE, PYMERGE_ISA="scalar") == "0 scalar"


def test_an_instruction_set_of_the_environment_that_is_missing_stops_the_first_use() -> None:
    said = run_python(USE, PYMERGE_ISA="avx1024")
    assert said.startswith("PYMERGE_ISA asks for 'avx1024'; this machine and build have scalar")
    assert run_python("import pymerge.ops as o; o.use_isa('scalar'); print(o.isa())") == "scalar"


def test_a_missing_extension_stops_the_first_use_and_not_the_import() -> None:
    hidden = "import sys; sys.modules['pymerge._C'] = None"
    assert "pymerge._C cannot be imported: import of pymerge._C halted" in run_python(hidden + USE)
    choose = hidden + "\nfrom pymerge import ops\nprint(ops.choose('convert', {!r}))"
    assert run_python(choose.format("reference")) == "Choice(backend='reference', passed_over={})"


def test_the_reference_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "why_not", lambda op: "it is broken")
    with pytest.raises(BackendError, match=r"cpu: it is broken; the backend 'reference' can"):
        ops.choose("convert")
