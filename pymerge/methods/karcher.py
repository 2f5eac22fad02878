"""Karcher (Riemannian) mean of the models' directions; mergekit's ``karcher``, arXiv 2603.04972.

``out = (Σ nᵢ / N)·u`` with norms ``nᵢ = ‖θᵢ‖`` of whole tensors and u the point of the unit sphere
whose squared angles φᵢ to the directions ``uᵢ = θᵢ/nᵢ`` have the least sum. From their normalised
mean, u follows ``T = 1/N·Σ φᵢ/sin φᵢ·(uᵢ − cos φᵢ·u)`` along the sphere, at most ``max_iter`` times
or until ``‖T‖ < tol``. Models count alike. A ``base_model`` is one model more. Tensors of norm
``tol`` or less count in the norms only; directions opposite to u have no way to go and are passed
over; where the first mean vanishes, u starts at the first direction.

u stays a combination of the models, so the iteration runs on its coefficients in float64 and the
models are read twice, however many steps it takes; mergekit rounds u to the working type each step.
"""

from __future__ import annotations

import math

import numpy as np

from pymerge.methods.angles import arccosine, cosine, sine
from pymerge.methods.gram import RESOLUTION, Doubles, gram_of_tensor, norm_of, task_vectors
from pymerge.methods.parameters import by_name
from pymerge.methods.protocol import Apply, Measuring, Tensor
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec

SPEC = MethodSpec(
    name="karcher",
    summary="Riemannian mean of the models' directions, at their mean norm.",
    paper="https://arxiv.org/abs/2603.04972",
    base="input",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec("max_iter", "int", "shared", 10, "Most steps of the iteration.", minimum=0),
        ParameterSpec(
            "tol",
            "float",
            "shared",
            1e-5,
            "Smallest norm, angle and step that count.",
            minimum=0.0,
        ),
    ),
    statistics="tensor",
)

#: |sin φ| below which a direction counts as opposite.
SMALLEST_SINE = 1e-6


def karcher_weights(gram: Doubles, max_iter: int, tol: float) -> list[float]:
    """The factor on each tensor, from their Gram matrix."""
    if not np.isfinite(gram).all():
        return [math.nan] * len(gram)
    norms = np.sqrt(np.diag(gram))
    (valid,) = np.nonzero(norms > tol)
    factors = np.zeros(len(norms))
    if len(valid):
        units = gram[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        mean_norm = math.fsum(norms) / len(norms)
        factors[valid] = mean_norm * _mean_direction(units, max_iter, tol) / norms[valid]
    result: list[float] = factors.tolist()
    return result


def _mean_direction(units: Doubles, max_iter: int, tol: float) -> Doubles:
    """The coefficients of the mean of unit vectors, from their Gram matrix."""
    num = len(units)
    mean = np.full(num, 1 / num)
    length = norm_of(mean, units)
    mean = np.eye(num)[0] if length < max(tol, RESOLUTION) else mean / length
    for _ in range(max_iter):
        tangent = _tangent(mean, units, tol)
        step = norm_of(tangent, units)
        if step < tol or step == 0:
            break
        mean = cosine(step) * mean + sine(step) / step * tangent
        length = norm_of(mean, units)
        if length > tol:
            mean = mean / length
    return mean


def _tangent(mean: Doubles, units: Doubles, tol: float) -> Doubles:
    """The coefficients of the mean of the directions from ``mean`` to the units."""
    num = len(mean)
    tangent = np.zeros(num)
    for i in range(num):
        dot = min(1.0, max(-1.0, math.fsum(mean * units[i])))
        angle = float(arccosine(dot))
        height = float(sine(angle))
        if angle < tol or height == 0 or (dot < 0 and height < SMALLEST_SINE):
            continue
        pull = angle / height / num
        tangent[i] += pull
        tangent -= pull * dot * mean
    return tangent


@method(
    SPEC,
    ops=("gram_n", "axpy_n", "convert"),
    looks=lambda tensor: 1 if tensor.num_models > 1 else 0,
)
def karcher(tensor: Tensor) -> Measuring:
    """Measure the Gram matrix, iterate on it, then one weighted sum."""
    if tensor.num_models == 1:
        return Apply(lambda tile, out: tensor.ops.convert(out, tile.models[0]))
    weights = [0.0] * tensor.num_models
    if tensor.num_elements:
        gram = yield from gram_of_tensor(tensor, task_vectors)
        max_iter = int(tensor.parameters["max_iter"])
        weights = karcher_weights(gram, max_iter, float(tensor.parameters["tol"]))
    return Apply(lambda tile, out: tensor.ops.axpy_n(out, tile.models, weights))
