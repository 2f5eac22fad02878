"""pymerge.integrations.peft on live models against PEFT's own add_weighted_adapter."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("drive_peft_backend.py")

# float32: what the decompositions of both leave, as a share of the largest element. bfloat16:
# roundings of 16 bits, once by us and after every step by PEFT.
TOLERANCES = {"llama": 1e-5, "gpt2": 2e-5, "convolutions": 1e-5, "bfloat16": 2e-2}
CASES = (
    "svd",
    "svd_clamp",
    "linear",
    "cat",
    "ties",
    "ties_frequency",
    "magnitude_prune",
    "ties_svd",
    "ties_frequency_svd",
    "magnitude_prune_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
)
MATRICES = ("iso_c", "iso_cts", "knots", "optmerge", "tsv_m", "wudi")


@pytest.fixture(scope="module")
def report(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("peft") / "report.json"
    command = [peers_python, DRIVER, out]
    probe = [peers_python, "-c", "import pymerge, peft"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("pymerge is not installed beside PEFT: run `make bench-peers`")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", TOLERANCES)
def test_combination_types(report: dict[str, Any], model: str, case: str) -> None:
    found = report[model][case]
    assert found["difference"] < TOLERANCES[model]
    assert found["config"], "another configuration than PEFT's"
    assert not found["warnings"]


@pytest.mark.parametrize("method", MATRICES)
def test_matrix_methods_by_factors(report: dict[str, Any], method: str) -> None:
    """The core space of the factors gives what the products give."""
    assert report["matrices"][method] < 5e-6


def test_robust_merge_runs_on_every_module(report: dict[str, Any]) -> None:
    assert report["robust_merge"] == 5


def test_masks_follow_the_seed_or_torch(report: dict[str, Any]) -> None:
    seeds = report["seeds"]
    assert seeds["same seed"] == 0 == seeds["torch's seed"]
    assert seeds["other seed"] > 0.1
    assert seeds["next draw"] > 0.1
    # 3/4 of 128 elements are kept by one adapter or both: five standard deviations
    assert abs(seeds["kept by one or both"] - 0.75) < 5 * (0.75 * 0.25 / 128) ** 0.5


def test_installing_twice_and_uninstalling(report: dict[str, Any]) -> None:
    """Calls of our kernels by PEFT's own method: before, installed, installed again, after."""
    before, first, second, after = report["installed"]
    assert before == after == 0
    assert first == second == 10  # A and B of five modules


def test_a_scale_that_peft_gets_wrong_is_told(report: dict[str, Any]) -> None:
    assert "rsLoRA" in " ".join(report["rslora"])


def test_refusals_leave_no_adapter(report: dict[str, Any]) -> None:
    expected = {
        "unknown type": "did you mean tsv_m?",
        "no density": "density: ties needs",
        "parameter": "linear has no parameter lamda",
        "model-wide": "needs the whole model, but PEFT merges one tensor at a time",
        "election": "expected frequency, total",
        "weights": "expected weights of 1",
        "fewer weights": "expected a weight for each of 2 adapters (one, one), found 1",
        "no adapters": "expected a PeftModel with LoRA adapters",
    }
    assert report["refusals"].keys() == expected.keys()
    for name, words in expected.items():
        assert words in report["refusals"][name]
