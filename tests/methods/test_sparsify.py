"""DARE, DELLA and Breadcrumbs against float64 computations of their formulas, written here from the
papers and the authors' code; the masks against a Philox of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest

import pymerge
from pymerge.methods.randomness import key
from pymerge.ops import dispatch

SHAPES = [(37, 41), (3, 5, 7), (97,), (), (6, 1), (1, 300), (0, 5)]
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = dispatch.why_not(name, "row_sparsify")
    assert reason is None, reason
    return name


def models(num: int, shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and models on a grid of 2⁻¹²: task vectors are exact and full of equal magnitudes."""
    random = np.random.default_rng([num, *shape])
    base = random.integers(-60, 60, shape) / 4096
    tuned = [base + random.integers(-20, 21, shape) / 4096 for _ in range(num)]
    return np.asarray(base, np.float32), [np.asarray(each, np.float32) for each in tuned]


def philox(index: int, seed: int) -> int:
    """Word ``index % 4`` of Philox4x32-10 with counter ``index // 4``, from the paper."""
    c = [index // 4 & 0xFFFFFFFF, index // 4 >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1]]
        c.append(first & 0xFFFFFFFF)
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[index % 4]


def draws(num: int, seed: int) -> np.ndarray:
    return np.array([philox(i, seed) for i in range(num)], np.int64)


def merged(
    base: np.ndarray,
    sparse: list[np.ndarray],
    weights: list[float],
    *,
    elects: bool,
    normalize: bool,
    scale: float,
) -> np.ndarray:
    """The end of every method of the family, on sparse rescaled task vectors in float64.

    NaN where the votes cancel but for float32's rounding, so that either sign may be elected.
    """
    votes = [np.float64(np.float32(w)) * tau for w, tau in zip(weights, sparse, strict=True)]
    if elects:
        sign = np.where(sum(votes) >= 0, 1, -1)
        agree = [np.sign(vote) == sign for vote in votes]
        total = sum(vote * a for vote, a in zip(votes, agree, strict=True))
        divisor = sum(np.float64(np.float32(w)) * a for w, a in zip(weights, agree, strict=True))
        divisor = np.where(divisor == 0, 1, divisor)
        size = sum(np.abs(vote) for vote in votes)
        total = np.where((sum(votes) != 0) & (np.abs(sum(votes)) < 2**-20 * size), np.nan, total)
    else:
        total, divisor = sum(votes), sum(weights)
        divisor = 1 if abs(divisor) < 1e-8 else divisor
    return base + scale * (total / divisor if normalize else total)


def l1(tau: np.ndarray, sparse: np.ndarray) -> float:
    before, after = np.abs(tau).sum(), np.abs(sparse).sum()
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


def assert_near(found: np.ndarray, truth: np.ndarray) -> None:
    assert found.shape == truth.shape
    assert found.dtype == np.float32
    open_to_rounding = np.isnan(truth)
    assert np.count_nonzero(open_to_rounding) <= 2
    where = ~open_to_rounding
    np.testing.assert_allclose(found[where], truth[where], rtol=2**-20, atol=2**-24)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elects", [False, True], ids=["linear", "ties"])
@pytest.mark.parametrize(
    ("rescale", "rescale_by", "normalize", "scale"),
    [(True, "l1", False, 1.0), (True, "density", True, 0.7), (False, "l1", True, 1.0)],
)
def test_dare(
    backend: str,
    shape: tuple[int, ...],
    elects: bool,
    rescale: bool,
    rescale_by: str,
    normalize: bool,
    scale: float,
) -> None:
    base, tuned = models(4, shape)
    weights, densities = [0.5, -0.25, 1.5, 0.75], [0.3, 0.75, 1.0, 0.0]
    found = pymerge.merge_tensor(
        "dare_ties" if elects else "dare_linear",
        base,
        tuned,
        weight=weights,
        density=densities,
        rescale=rescale,
        rescale_by=rescale_by,
        normalize=normalize,
        lambda_=scale,
        seed=9,
        name="layer.w",
        backend=backend,
    )
    sparse = []
    for i, (x, density) in enumerate(zip(tuned, densities, strict=True)):
        tau = x.astype(np.float64) - base
        drawn = draws(tau.size, key(9, "dare", "layer.w", i)).reshape(shape)
        kept = np.where(drawn < math.floor(density * 2**32), tau, 0)
        factor = 1.0
        if rescale and 0 < density < 1:
            factor = l1(tau, kept) if rescale_by == "l1" else 1 / density
        sparse.append(factor * kept)
    truth = merged(
        base.astype(np.float64), sparse, weights, elects=elects, normalize=normalize, scale=scale
    )
    assert_near(found, truth)


def test_dare_is_task_arithmetic_at_density_one(backend: str) -> None:
    base, tuned = models(3, (20, 30))
    weights = [0.5, 0.3, -0.2]
    whole = pymerge.merge_tensor(
        "task_arithmetic", base, tuned, weight=weights, lambda_=0.8, backend=backend
    )
    found = pymerge.merge_tensor(
        "dare_linear", base, tuned, weight=weights, lambda_=0.8, density=1.0, backend=backend
    )
    assert np.array_equal(found, whole)


def test_both_dares_drop_the_same(backend: str) -> None:
    """With one model and no election to lose, the two differ in nothing."""
    base, tuned = models(1, (50, 20))
    both = [
        pymerge.merge_tensor(name, base, tuned, weight=1.0, density=0.4, backend=backend)
        for name in ("dare_linear", "dare_ties")
    ]
    assert np.array_equal(*both)


def rank_in_rows(tau: np.ndarray) -> np.ndarray:
    """0 for the smallest magnitude of a row; of equal ones the lower index is the larger."""
    rows = tau.reshape(-1, tau.shape[-1] if tau.ndim else 1)
    ranks = np.empty(rows.shape, np.int64)
    for row, rank in zip(rows, ranks, strict=True):
        order = sorted(range(len(row)), key=lambda j: (abs(row[j]), -j))
        rank[order] = np.arange(len(row))
    return ranks.reshape(tau.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elects", [False, True], ids=["linear", "ties"])
@pytest.mark.parametrize("rescale_by", ["l1", "density", None])
def test_della(backend: str, shape: tuple[int, ...], elects: bool, rescale_by: str | None) -> None:
    base, tuned = models(4, shape)
    weights, densities, epsilons = [0.5, 1.0, 1.5, 0.75], [0.3, 0.75, 1.0, 0.0], [0.2, 0.1, 0.5, 0]
    found = pymerge.merge_tensor(
        "della" if elects else "della_linear",
        base,
        tuned,
        weight=weights,
        density=densities,
        epsilon=epsilons,
        rescale=rescale_by is not None,
        rescale_by=rescale_by or "l1",
        lambda_=0.9,
        seed=4,
        name="layer.w",
        backend=backend,
    )
    columns = shape[-1] if shape else 1
    sparse = []
    for i, (x, density, epsilon) in enumerate(zip(tuned, densities, epsilons, strict=True)):
        tau = x.astype(np.float64) - base
        if density in (0, 1):
            sparse.append(density * tau)
            continue
        low, window = math.floor((density - epsilon) * 2**32), math.floor(2 * epsilon * 2**32)
        steps = rank_in_rows(tau) * window // (columns - 1) if columns > 1 else window // 2
        limit = low + steps
        drawn = draws(tau.size, key(4, "della", "layer.w", i)).reshape(shape)
        kept = np.where(drawn < limit, tau, 0)
        if rescale_by == "density":
            kept = kept / (limit / 2**32)
        sparse.append(kept * (l1(tau, kept) if rescale_by == "l1" else 1.0))
    truth = merged(
        base.astype(np.float64), sparse, weights, elects=elects, normalize=elects, scale=0.9
    )
    assert_near(found, truth)


def test_della_keeps_large_elements_more_often(backend: str) -> None:
    """In a million draws, each tenth of the ranks is kept with its own probability."""
    columns, rows = 1000, 1000
    base = np.zeros((rows, columns), np.float32)
    magnitudes = np.arange(1, columns + 1) * np.float32(2**-10)
    order = np.random.default_rng(1).permutation(columns)
    model = np.tile(magnitudes[order], (rows, 1))
    found = pymerge.merge_tensor(
        "della_linear",
        base,
        [model],
        weight=1.0,
        density=0.4,
        epsilon=0.3,
        rescale=False,
        backend=backend,
    )
    share = (found != 0).mean(axis=0)[np.argsort(order)].reshape(10, 100).mean(axis=1)
    expected = (0.1 + 0.6 * np.arange(columns) / (columns - 1)).reshape(10, 100).mean(axis=1)
    sigma = np.sqrt(expected * (1 - expected) / (rows * 100))
    assert np.all(np.abs(share - expected) < 5 * sigma)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_of_zero_and_one(
    density: float, epsilon: float
) -> None:
    base, tuned = models(1, (4, 4))
    with pytest.raises(pymerge.RecipeError, match="strictly between 0 and 1"):
        pymerge.merge_tensor(
            "della", base, tuned, weight=1.0, density=density, epsilon=epsilon, backend="reference"
        )


def crumbs(tau: np.ndarray, density: float, gamma: float, order: str, scope: str) -> np.ndarray:
    """What is kept, one flat vector at a time, by sorting."""
    if scope == "row":
        if tau.ndim == 0:
            return tau
        rows = [crumbs_of_row(row, density, gamma, order) for row in tau.reshape(-1, tau.shape[-1])]
        return np.array(rows).reshape(tau.shape)
    if density >= 1:
        return tau
    flat = tau.ravel()
    target, top = int(density * flat.size), int(gamma * flat.size)
    largest_first = np.argsort(-np.abs(flat), kind="stable")
    if order == "small_first":
        chosen = largest_first[:target][top:]
    else:  # mergekit: fewer outliers go where there are not enough elements
        bottom = max(0, flat.size - target - top)
        chosen = largest_first[::-1][bottom : bottom + target]
    kept = np.zeros_like(flat)
    kept[chosen] = flat[chosen]
    return kept.reshape(tau.shape)


def crumbs_of_row(row: np.ndarray, density: float, gamma: float, order: str) -> np.ndarray:
    """The authors' two masks, one applied to the outcome of the other."""

    def without_top(x: np.ndarray) -> np.ndarray:
        result = x.copy()
        result[np.argsort(-np.abs(x), kind="stable")[: int(gamma * x.size)]] = 0
        return result

    def only_top(x: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x)
        chosen = np.argsort(-np.abs(x), kind="stable")[: int(density * x.size)]
        result[chosen] = x[chosen]
        return result

    if order == "outliers_first":
        return only_top(without_top(row))
    return without_top(only_top(row))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elects", [False, True], ids=["linear", "ties"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("order", ["outliers_first", "small_first"])
@pytest.mark.parametrize("rescale", [False, True])
def test_breadcrumbs(
    backend: str, shape: tuple[int, ...], elects: bool, scope: str, order: str, rescale: bool
) -> None:
    base, tuned = models(5, shape)
    weights = [0.5, 1.0, 1.5, 0.75, 0.25]
    densities, gammas = [0.3, 0.9, 1.0, 0.0, 0.5], [0.1, 0.3, 0.05, 0.2, 0.0]
    found = pymerge.merge_tensor(
        "breadcrumbs_ties" if elects else "breadcrumbs",
        base,
        tuned,
        weight=weights,
        density=densities,
        gamma=gammas,
        trim_scope=scope,
        order=order,
        rescale=rescale,
        backend=backend,
    )
    taus = [x.astype(np.float64) - base for x in tuned]
    sparse = [
        crumbs(tau, density, gamma, order, scope)
        for tau, density, gamma in zip(taus, densities, gammas, strict=True)
    ]
    if rescale:
        sparse = [l1(tau, kept) * kept for tau, kept in zip(taus, sparse, strict=True)]
    truth = merged(
        base.astype(np.float64), sparse, weights, elects=elects, normalize=False, scale=1.0
    )
    assert_near(found, truth)


@pytest.mark.parametrize(("method", "official"), [
    ("dare_linear", {"rescale_by": "density"}),
    ("dare_ties", {"rescale_by": "density"}),
    ("della", {"rescale_by": "density", "epsilon": 0.0}),
    ("della_linear", {"rescale_by": "density", "epsilon": 0.0}),
    ("breadcrumbs", {"trim_scope": "row", "weight": 1.0}),
    ("breadcrumbs_ties", {"trim_scope": "row", "weight": 1.0}),
    ("sce", {"mask": "weights", "select_topk": 0.5}),
])  # fmt: skip
def test_the_official_preset_is_its_parameters(method: str, official: dict[str, object]) -> None:
    base, tuned = models(3, (30, 40))
    given = {"select_topk": 0.5} if method == "sce" else {"density": 0.4}
    common = dict(backend="reference", **given)
    if "weight" not in official and method != "sce":
        common["weight"] = 0.5
    found = pymerge.merge_tensor(method, base, tuned, preset="official", **common)
    spelled = pymerge.merge_tensor(method, base, tuned, **(common | official))
    plain = pymerge.merge_tensor(
        method, base, tuned, **({"weight": 1.0} if method != "sce" else {}) | common
    )
    assert np.array_equal(found, spelled)
    assert not np.array_equal(found, plain)


@pytest.mark.parametrize("method", ["dare_ties", "della", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_bad_values_stay_where_they_are(backend: str, method: str, scope: str) -> None:
    base, tuned = models(2, (40, 50))
    tuned[0][3, 4], tuned[1][5, 6] = np.nan, np.inf
    # A sum of magnitudes that is not finite leaves no factor, see the next test.
    options = {"trim_scope": scope} if "breadcrumbs" in method else {"rescale_by": "density"}
    found = pymerge.merge_tensor(
        method, base, tuned, weight=1.0, density=0.5, backend=backend, **options
    )
    bad = ~np.isfinite(found)
    assert set(zip(*np.nonzero(bad), strict=True)) <= {(3, 4), (5, 6)}
    if "breadcrumbs" in method:  # an infinite element may be an outlier, what is no number is none
        assert np.isnan(found[3, 4])


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "breadcrumbs", "ties"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_that_is_not_known_shows(backend: str, method: str, bad: float) -> None:
    """Wherever the bad element is, kept or dropped by the mask: what is kept is not left at a
    fraction of its magnitude as if nothing had happened."""
    base, (good, first) = models(2, (8, 25))
    options = {"epsilon": 0.05} if method == "della_linear" else {}
    if method in ("breadcrumbs", "ties"):
        options = {"rescale": True}
    for place in range(12):
        tuned = first.copy()
        tuned[0, place] = bad
        found = pymerge.merge_tensor(
            method, base, [tuned], weight=1.0, density=0.1, backend=backend, **options
        )
        assert not np.isfinite(found).all()
    whole = pymerge.merge_tensor(
        method, base, [good], weight=1.0, density=0.1, backend=backend, **options
    )
    assert np.isfinite(whole).all()


def test_equal_models_leave_the_base(backend: str) -> None:
    base, _ = models(1, (17, 19))
    for method in ("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "sce"):
        options = {} if method == "sce" else {"weight": 1.0, "density": 0.5}
        found = pymerge.merge_tensor(method, base, [base, base], backend=backend, **options)
        assert np.array_equal(found, base), method
