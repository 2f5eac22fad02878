"""pymerge.integrations.fusion_bench, made by hydra, against FusionBench's own algorithms on the
same pools."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("drive_fusionbench_backend.py")

#: What changed of the tensor that differs most, by how much of it both differ: the roundings of
#: float32 of weights of about 1 that change by 0.02, for matrices through decompositions; angles of
#: float32 cosines near 0 for model_stock; for regmean inverses of Gram matrices in float32.
TOLERANCES = {
    "ties": 1e-6,
    "ties-mean": 1e-6,
    "ties-max": 1e-6,
    "task_arithmetic": 1e-6,
    "simple_average": 2e-6,
    "weighted_average": 2e-6,
    "slerp": 1e-5,
    "tsv_m": 2e-5,
    "iso_c": 2e-5,
    "iso_cts": 2e-5,
    "wudi": 2e-5,
    "doge_ta": 2e-5,
    "model_stock": 1e-4,
    "magmax": 1e-6,
    "opcm": 2e-5,
    "dare": 1e-6,
    "dare-average": 1e-6,
    "dare-ties": 1e-6,
    "regmean": 2e-5,
    "fisher": 1e-5,
    "emr": 1e-5,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = Path(os.environ.get("PYMERGE_FUSIONBENCH", ROOT / ".venv-fusionbench"))
    python = environment / "bin" / "python"
    probe = [python, "-c", "import importlib.metadata as m, pymerge; m.version('fusion-bench')"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(
            f"FusionBench or pymerge is not installed in {environment}: "
            "run `make bench-peers`, or set PYMERGE_FUSIONBENCH to an environment that has both"
        )
    folder = tmp_path_factory.mktemp("fusionbench-backend")
    done = subprocess.run([python, DRIVER, folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("case", TOLERANCES)
def test_the_same_result(report: dict[str, Any], case: str) -> None:
    found = report["cases"][case]
    for name, share in found["differences"].items():
        assert share < TOLERANCES[case], name
    assert not found["warnings"], "left to FusionBench"


def test_every_case_is_looked_at(report: dict[str, Any]) -> None:
    assert report["cases"].keys() == TOLERANCES.keys()


def test_they_are_algorithms_that_hydra_finds_again(report: dict[str, Any]) -> None:
    made = [case for case in report["cases"].values() if "config" in case]
    assert len(made) == 18
    assert all(case["is_algorithm"] and case["config"] for case in made)


def test_dropping_at_random(report: dict[str, Any]) -> None:
    found = report["dropping"]
    # half of 384 elements: five standard deviations
    assert abs(found["share"] - 0.5) < 5 * (0.25 / 384) ** 0.5
    assert found["rescaled"] < 1e-6
    assert found["same seed"] == 0
    # with only_on_linear_weights the embedding keeps its whole task vector
    assert found["embedding"] < 1e-7


@pytest.mark.parametrize("case", ["ties", "iso_c"])
def test_lazy_state_dicts(report: dict[str, Any], case: str) -> None:
    found = report["lazily"][case]
    assert found["kind"] == ["dict", "Model"]
    assert not found["warnings"]
    for form in ("dict", "module"):
        assert found[form]
        assert max(found[form].values()) == 0


@pytest.mark.parametrize("method", ["pcb", "linear", "dare_ties"])
def test_any_method_by_name(report: dict[str, Any], method: str) -> None:
    found = report["general"][method]
    assert max(found["differences"].values()) == 0
    assert found["config"]["method"] == method
    assert found["config"]["_target_"].endswith(".PymergeAlgorithm")


def test_what_is_not_understood_is_left_loudly(report: dict[str, Any]) -> None:
    left = report["left"]
    assert left["threshold rule"][0] == "ValueError"
    assert "median" in left["threshold rule"][1]
    for name, word in (("alphas", "list of alphas"), ("slerp", "DOT_THRESHOLD")):
        outcome, told = left[name]
        assert outcome == "merged"
        assert word in told
        assert "this run is FusionBench's own" in told


def test_in_place_or_a_copy(report: dict[str, Any]) -> None:
    assert report["in_place"] == [True, True, True]
