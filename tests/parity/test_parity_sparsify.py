"""The sparsifying methods through mergekit 0.1.5 and through pymerge.

What is not random agrees element by element to two units in the last place of the operands' summed
magnitudes in float32; to four where task vectors are rescaled, since mergekit sums magnitudes in
float32 and each program multiplies by its own rounded factor. SCE's selection may differ at its
edge, where both round the variances that are ranked. Random masks
are other ones in each program (mergekit draws from torch's global generator), so there both are
held to the same statistics: how many elements are kept, which ones, how they are rescaled, and the
mean and the second moment of the outcome, within 5 standard deviations.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

pymerge = pytest.importorskip("pymerge")

DRIVER = Path(__file__).with_name("drive_mergekit.py")
Tensors = dict[str, np.ndarray]


def recipe(method: str, models: dict[str, str], shared: str = "{}") -> str:
    """``models``: name → its parameters."""
    lines = [f"  - {{model: {{{n}}}, parameters: {p}}}" for n, p in models.items()]
    head = [f"merge_method: {method}", "base_model: {base}", "models:", *lines]
    return "\n".join([*head, f"parameters: {shared}", "dtype: float32"])


TRIMMED = {
    "a": "{weight: 0.5, density: 0.3, gamma: 0.02}",
    "b": "{weight: 1.0, density: 0.7, gamma: 0.1}",
    "c": "{weight: -0.4, density: 0.95, gamma: 0.2}",
}
#: A norm has 64 elements, of which gamma 0.01 takes none.
FEW = dict.fromkeys("abc", "{weight: 0.4, density: 0.5, gamma: 0.01}")
KEPT = {"a": "{weight: 0.5, density: 1.0}", "b": "{weight: 0.9, density: 1.0}"}
ENERGY = dict.fromkeys("abc", "{}")
EXACT = {
    "ties-rescale": recipe("ties", FEW, "{rescale: true, lambda: 0.7}"),
    "ties-rescale-sum": recipe("ties", TRIMMED, "{rescale: true, normalize: false}"),
    "breadcrumbs": recipe("breadcrumbs", TRIMMED),
    "breadcrumbs-few": recipe("breadcrumbs", FEW, "{lambda: 1.2}"),
    "breadcrumbs-normalized": recipe("breadcrumbs", FEW, "{normalize: true, rescale: true}"),
    "breadcrumbs-ties": recipe("breadcrumbs_ties", TRIMMED),
    "breadcrumbs-ties-mean": recipe("breadcrumbs_ties", TRIMMED, "{normalize: true}"),
    "breadcrumbs-ties-rescale": recipe("breadcrumbs_ties", FEW, "{rescale: true}"),
    "dare-linear-all": recipe("dare_linear", KEPT, "{normalize: true}"),
    "dare-ties-all": recipe("dare_ties", KEPT, "{int8_mask: true}"),
    "della-all": recipe("della", KEPT),
    "della-linear-all": recipe("della_linear", KEPT, "{lambda: 0.3}"),
    "dare-none": recipe("dare_ties", dict.fromkeys("ab", "{weight: 1.0, density: 0.0}")),
    "della-none": recipe("della", dict.fromkeys("ab", "{weight: 1.0, density: 0.0}")),
    "sce": recipe("sce", ENERGY),
    "sce-none": recipe("sce", ENERGY, "{select_topk: 0.0}"),
}
#: smallest_sum is pymerge's own; mergekit ignores what it does not know.
SELECTED = {
    "sce-half": recipe("sce", ENERGY, "{select_topk: 0.5, smallest_sum: 1e-6}"),
    "sce-few": recipe("sce", ENERGY, "{select_topk: 0.01, smallest_sum: 1e-6}"),
}
SCE_OWN = recipe("sce", ENERGY, "{select_topk: 0.01}")
DENSITY, EPSILON = 0.3, 0.2
ALONE = {"a": f"{{weight: 1.0, density: {DENSITY}, epsilon: {EPSILON}}}"}
RANDOM = {
    name: recipe(name, ALONE) for name in ("dare_linear", "dare_ties", "della", "della_linear")
}
OFFICIAL = {name: recipe(name, ALONE, "{preset: official}") for name in RANDOM}
OWN = {"sce-own": SCE_OWN} | {f"{name}-official": text for name, text in OFFICIAL.items()}


class Both(NamedTuple):
    """The merged tensors of each program; theirs is None for recipes of pymerge alone."""

    theirs: Path | None
    ours: Tensors


@pytest.fixture(scope="module")
def outputs(
    peers_python: Path, llamas: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Both]:
    work = tmp_path_factory.mktemp("sparsify")
    jobs, files = [], {}
    for name, text in {**EXACT, **SELECTED, **RANDOM, **OWN}.items():
        for folder in llamas.iterdir():
            text = text.replace(f"{{{folder.name}}}", str(folder))
        files[name] = work / f"{name}.yaml"
        files[name].write_text(text)
        if name not in OWN:
            jobs.append({"recipe": str(files[name]), "out": str(work / "theirs" / name)})
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    subprocess.run([peers_python, DRIVER, work / "jobs.json"], check=True, env=environment)
    found = {}
    for name, file in files.items():
        pymerge.merge(file, work / "ours" / name)
        ours = load_file(work / "ours" / name / "model.safetensors")
        found[name] = Both(None if name in OWN else work / "theirs" / name, ours)
    return found


@pytest.fixture(scope="module")
def inputs(llamas: Path) -> dict[str, Tensors]:
    return {name: load_file(llamas / name / "model.safetensors") for name in ("base", *"abc")}


def theirs(both: Both) -> Tensors:
    assert both.theirs is not None
    error = both.theirs / "error.txt"
    assert not error.exists(), error.read_text()
    tensors: Tensors = load_file(both.theirs / "model.safetensors")
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in both.ours.items()}
    return tensors


def units(found: np.ndarray, expected: np.ndarray, operands: list[np.ndarray]) -> np.ndarray:
    """The distance in units in the last place of the operands' summed magnitudes."""
    size = np.sum([np.abs(x.astype(np.float64)) for x in operands], axis=0)
    ulp = np.exp2(np.floor(np.log2(np.maximum(size, 2.0**-126)))) * 2.0**-23
    return np.asarray(np.abs(found.astype(np.float64) - expected) / ulp)


@pytest.mark.parametrize("name", EXACT)
def test_agrees_in_the_last_places(
    outputs: dict[str, Both], inputs: dict[str, Tensors], name: str
) -> None:
    limit = 4 if "rescale: true" in EXACT[name] else 2
    for tensor, expected in theirs(outputs[name]).items():
        operands = [model[tensor] for model in inputs.values()]
        found = units(outputs[name].ours[tensor], expected, operands)
        assert found.max() <= limit, f"{tensor}: {found.max():.1f} units apart at {found.argmax()}"


@pytest.mark.parametrize("name", SELECTED)
def test_sce_agrees_but_at_the_edge_of_the_selection(
    outputs: dict[str, Both], inputs: dict[str, Tensors], name: str
) -> None:
    """Which of two elements with nearly the same variance is selected last may differ."""
    share = 0.5 if name == "sce-half" else 0.01
    for tensor, expected in theirs(outputs[name]).items():
        operands = [model[tensor] for model in inputs.values()]
        far = units(outputs[name].ours[tensor], expected, operands) > 2
        tau = np.stack([x.astype(np.float64) - operands[0] for x in operands[1:]])
        variance = tau.var(axis=0)
        k = int(share * np.count_nonzero(variance))
        limit = np.sort(variance, axis=None)[::-1][k - 1] if k else 0.0
        at_edge = np.abs(variance - limit) <= 1e-5 * limit
        assert not np.any(far & ~at_edge), tensor
        assert np.count_nonzero(far) <= 4, tensor


def test_sce_weighs_small_models_by_their_energy(outputs: dict[str, Both]) -> None:
    """mergekit falls back to equal weights where the mean squares sum to less than 1e-6."""
    name = "model.layers.0.mlp.up_proj.weight"
    equal, own = theirs(outputs["sce-few"])[name], outputs["sce-own"].ours[name]
    assert np.count_nonzero(np.abs(equal - own) > 1e-6) > 20


def test_breadcrumbs_without_an_outlier_keeps_small_tensors(
    outputs: dict[str, Both], inputs: dict[str, Tensors]
) -> None:
    """mergekit before 0.1.5 dropped the whole task vector where gamma·n is below 1."""
    name = "model.norm.weight"
    base = inputs["base"][name]
    assert int(0.01 * base.size) == 0
    for side in (theirs(outputs["breadcrumbs-few"])[name], outputs["breadcrumbs-few"].ours[name]):
        assert np.count_nonzero(side != base) >= base.size // 2


def sides(outputs: dict[str, Both], name: str) -> list[tuple[str, Tensors]]:
    """What of the method's results is held to the same statistics."""
    return [("mergekit", theirs(outputs[name])), ("pymerge", outputs[name].ours)]


def deltas(side: Tensors, base: Tensors) -> Tensors:
    return {name: side[name].astype(np.float64) - base[name] for name in base}


def probabilities(tau: np.ndarray, method: str) -> np.ndarray:
    """The chance of each element, from the papers: for DELLA by rank of magnitude in its row."""
    if "della" not in method:
        return np.full(tau.shape, DENSITY)
    rows = np.abs(tau).reshape(-1, tau.shape[-1])
    ranks = rows.argsort(axis=1).argsort(axis=1)
    share = DENSITY - EPSILON + 2 * EPSILON * ranks / (rows.shape[1] - 1)
    return np.asarray(share.reshape(tau.shape))


@pytest.mark.parametrize("method", RANDOM)
def test_keeps_as_many_and_of_every_rank(
    outputs: dict[str, Both], inputs: dict[str, Tensors], method: str
) -> None:
    taus = deltas(inputs["a"], inputs["base"])
    for program, side in sides(outputs, method):
        kept = {name: d != 0 for name, d in deltas(side, inputs["base"]).items()}
        chances, hits = [], []
        for name, tau in taus.items():
            chance = probabilities(tau, method)
            sigma = np.sqrt((chance * (1 - chance)).sum())
            off = kept[name].sum() - chance.sum()
            assert abs(off) < 5 * sigma, (program, name, off / sigma)
            chances.append(chance.ravel())
            hits.append(kept[name].ravel())
        chance, hit = np.concatenate(chances), np.concatenate(hits)
        for part in np.array_split(np.argsort(chance, kind="stable"), 10):
            sigma = np.sqrt((chance[part] * (1 - chance[part])).sum())
            assert abs(hit[part].sum() - chance[part].sum()) < 5 * sigma, program


@pytest.mark.parametrize("method", RANDOM)
def test_rescales_to_the_magnitude_of_each_tensor(
    outputs: dict[str, Both], inputs: dict[str, Tensors], method: str
) -> None:
    """Every kept element by one factor, which restores the sum of magnitudes.

    ``della`` divides by the weights of the models that agree, here 1.
    """
    taus = deltas(inputs["a"], inputs["base"])
    for program, side in sides(outputs, method):
        for name, found in deltas(side, inputs["base"]).items():
            kept = found != 0
            factor = np.abs(taus[name]).sum() / np.abs(taus[name][kept]).sum()
            # base + delta is rounded to float32: half a unit of the largest base.
            slack = np.abs(inputs["base"][name]).max() * 2.0**-23 + factor * 1e-8
            np.testing.assert_allclose(
                found[kept],
                factor * taus[name][kept],
                rtol=2e-6,
                atol=slack,
                err_msg=f"{program} {name}",
            )


@pytest.mark.parametrize("method", RANDOM)
def test_mean_and_second_moment(
    outputs: dict[str, Both], inputs: dict[str, Tensors], method: str
) -> None:
    """Over the whole model: DARE's outcome has the mean of the task vector, whatever rescales it.

    DELLA's has it only where each element is divided by its own probability.
    """
    taus = deltas(inputs["a"], inputs["base"])
    tau = np.concatenate([each.ravel() for each in taus.values()])
    chance = np.concatenate([probabilities(each, method).ravel() for each in taus.values()])
    results = [("pymerge official", outputs[f"{method}-official"].ours)]
    if "della" not in method:
        results += sides(outputs, method)
    for program, side in results:
        found = deltas(side, inputs["base"])
        sparse = np.concatenate([found[name].ravel() for name in taus])
        sigma = np.sqrt((tau**2 * (1 - chance) / chance).sum())
        assert abs((sparse - tau).sum()) < 5 * sigma, program
        sigma = np.sqrt((tau**4 * (1 - chance) / chance**3).sum())
        assert abs((sparse**2 - tau**2 / chance).sum()) < 5 * sigma, program


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_official_dare_divides_by_the_density(
    outputs: dict[str, Both], inputs: dict[str, Tensors], method: str
) -> None:
    taus = deltas(inputs["a"], inputs["base"])
    for name, found in deltas(outputs[f"{method}-official"].ours, inputs["base"]).items():
        kept = found != 0
        slack = np.abs(inputs["base"][name]).max() * 2.0**-23 + 1e-8
        np.testing.assert_allclose(found[kept], taus[name][kept] / DENSITY, rtol=1e-6, atol=slack)
