"""The integrations without their hosts: importing loads nothing, asking says what is missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from pymerge.errors import BackendError, RecipeError
from pymerge.integrations import fusion_bench, hosts, peft, sd_mecha
from pymerge.integrations.fusion_bench_fields import names_pattern, ties_parameters
from pymerge.integrations.fusion_bench_pools import Left
from pymerge.methods import METHODS

HOSTS = {"fusion_bench": "fusion-bench", "sd_mecha": "sd-mecha", "peft": "peft"}


@pytest.mark.parametrize("name", HOSTS)
def test_importing_loads_no_host_and_no_torch(name: str) -> None:
    program = f"import sys, pymerge.integrations.{name}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert not loaded & {*HOSTS, "torch", "transformers", "hydra"}


def is_there(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", HOSTS)
def test_a_missing_host_is_named(name: str) -> None:
    if is_there(HOSTS[name]):
        pytest.skip(f"{HOSTS[name]} is installed here")
    ask = {
        "fusion_bench": lambda: fusion_bench.TiesMergingAlgorithm,
        "sd_mecha": sd_mecha.install,
        "peft": peft.install,
    }[name]
    with pytest.raises(BackendError, match=f"{HOSTS[name]} is not installed here"):
        ask()


def test_an_unknown_version_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: "1.10.0")
    with pytest.warns(hosts.HostWarning, match=r"host 1\.10\.0: pymerge knows 1\.1"):
        hosts.host_version("host", ("1.1",))
    assert hosts.host_version("host", ("1.10",)) == "1.10.0"


def test_an_unknown_class_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="TiesMerging"):
        _ = fusion_bench.TiesMerging
    assert {"TiesMergingAlgorithm", "ISO_C_Merge", "PymergeAlgorithm"} <= set(dir(fusion_bench))


@pytest.mark.parametrize("method", ["fisher", "regmean", "emr", "smile", "tall_masks", "opcm"])
def test_methods_that_need_more_than_a_tensor(method: str) -> None:
    with pytest.raises(RecipeError, match=f"{method} .*but the host merges one tensor at a time"):
        hosts.by_tensor(METHODS[method].spec, {}, "the host")


def test_ranking_within_each_tensor() -> None:
    spec = METHODS["pcb"].spec
    assert hosts.by_tensor(spec, {"ratio": 0.1}, "x") == {"ratio": 0.1, "scope": "tensor"}
    with pytest.raises(RecipeError, match="pcb: scope: model needs the whole model, but x merges"):
        hosts.by_tensor(spec, {"scope": "model"}, "x")


@pytest.mark.parametrize("zero_sign", [0, 1])
def test_a_vote_by_count(zero_sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element by element in plain Python, over more than one piece."""
    monkeypatch.setattr(hosts, "VOTES", 7)
    generator = torch.Generator().manual_seed(3)
    kept = [torch.randn(4, 6, generator=generator) for _ in range(4)]
    kept = [each * (torch.rand(4, 6, generator=generator) > 0.4) for each in kept]
    weights = [1.0, -0.5, 2.0, 0.25]
    found = hosts.elected_by_count(kept, weights, zero_sign=zero_sign)
    for place, value in enumerate(found.reshape(-1).tolist()):
        values = [float(each.reshape(-1)[place]) for each in kept]
        votes = sum((value > 0) - (value < 0) for value in values)
        sign = (votes > 0) - (votes < 0) or zero_sign
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if sign * v > 0]
        expected = sum(v * w for v, w in agree) / max(1, len(agree))
        assert abs(value - expected) < 1e-6


def test_ties_of_fusionbench() -> None:
    found = ties_parameters(20, "dis-mean", 0.3)
    assert found == {"preset": "official", "density": 0.2, "merge": "count", "lambda": 0.3}
    assert ties_parameters(0.5, "sum", 1)["density"] == 0.5
    with pytest.raises(Left, match="median"):
        ties_parameters(20, "median", 1)


def test_patterns_of_names_match_these_alone() -> None:
    import re

    pattern = names_pattern(["a.weight", "b(c"])
    assert [bool(re.search(pattern, n)) for n in ("a.weight", "b(c", "aaweight", "xa.weight")] == [
        True,
        True,
        False,
        False,
    ]
    assert names_pattern([]) == ""


@pytest.mark.slow
def test_a_tensor_past_two_gigabytes() -> None:
    """2.2 GB of float16: TIES as sd-mecha asks for it, where all but a few elements are zero."""
    num = 1_100_000_000
    deltas = [torch.zeros(num, dtype=torch.float16) for _ in range(2)]
    places = torch.tensor([0, num // 3, num - 1])
    deltas[0][places] = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float16)
    deltas[1][places] = torch.tensor([3.0, 8.0, 4.0], dtype=torch.float16)
    # the three largest of each; its rank from the top is num - max(int((1 - k) · num), 1) + 1
    found = sd_mecha._ties(deltas, 1e-9, True)
    assert found.dtype == torch.float16
    assert found[places].tolist() == [2.0, 8.0, 4.0]
    assert int(found.count_nonzero()) == 3
