"""mergekit's own tests, unmodified: what passes with mergekit alone passes with pymerge in it.

They come from its source distribution, which `make bench-peers` unpacks; the plug-in in
``mergekit_suite`` redirects mergekit, and ``excluded.py`` there lists what need not pass and why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).with_name("mergekit_suite")
SUITE = ROOT / ".peers" / "mergekit-0.1.5"
#: Natively: 518 pass and 82 need a GPU.
FEWEST_PASSED = 500
#: End-to-end merges of the suite that our engine runs, and their tensors.
FEWEST_MERGES, FEWEST_TENSORS = 75, 2000

Run = Callable[[str], dict[str, Any]]


def excluded(mode: str) -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("excluded", PLUGIN / "excluded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.EXCLUDED[mode]
    return found


@pytest.fixture(scope="module")
def run_suite(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the suite against native, engine, executor or methods, once each; gives its report."""
    if not (SUITE / "tests").is_dir():
        pytest.skip(f"mergekit's tests are not in {SUITE}: run `make bench-peers`")
    done: dict[str, dict[str, Any]] = {}

    def run(mode: str) -> dict[str, Any]:
        if mode not in done:
            report = tmp_path_factory.mktemp(mode) / "report.json"
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(PLUGIN),
                "MERGEKIT_SUITE": mode,
                "MERGEKIT_SUITE_REPORT": str(report),
            }
            command = [peers_python.with_name("pytest"), "-q", "-p", "plugin", "-p"]
            command += ["no:cacheprovider", "--rootdir", ".", "tests"]
            ended = subprocess.run(
                command, cwd=SUITE, env=environment, capture_output=True, text=True, timeout=1800
            )
            assert report.exists(), ended.stdout[-3000:] + ended.stderr[-3000:]
            done[mode] = json.loads(report.read_text())
        return done[mode]

    return run


def passed(report: dict[str, Any]) -> set[str]:
    return {test for test, outcome in report["outcomes"].items() if outcome == "passed"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["engine", "executor", "methods"])
def test_passes_as_natively(mode: str, run_suite: Run) -> None:
    native = passed(run_suite("native"))
    assert len(native) >= FEWEST_PASSED
    lost = native - passed(run_suite(mode))
    names = {test.partition("[")[0] for test in lost}
    assert names == set(excluded(mode)), sorted(lost)


@pytest.mark.slow
def test_merges_are_planned_and_run_by_our_engine(run_suite: Run) -> None:
    done = run_suite("engine")["lowered"]
    assert done["merges"] == done["planned"] >= FEWEST_MERGES
    assert done["tensors"] >= FEWEST_TENSORS
    assert (done["left"], done["whole"]) == ({}, {})


@pytest.mark.slow
def test_planned_merges_are_run_by_our_engine(run_suite: Run) -> None:
    lowered = run_suite("executor")["lowered"]
    assert lowered["merges"] >= FEWEST_MERGES
    assert lowered["planned"] == 0
    assert lowered["tensors"] >= FEWEST_TENSORS
    # What mergekit ran or computed itself: only what the tests expect it to refuse.
    assert lowered["left"] == {"inputs of different shapes": 6}
    assert lowered["whole"] == {"della: epsilon is at most 0.5, found 1.35": 1}
