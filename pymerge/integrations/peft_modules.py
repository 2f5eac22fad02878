"""What is computed of one module's factors for PEFT's combination types, and for ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.errors import PlanError, PymergeError
from pymerge.integrations.hosts import by_tensor, elected_by_count, merged
from pymerge.lora import factor_methods as rules
from pymerge.lora.place import workspace
from pymerge.lora.truncate import Truncation
from pymerge.methods import get_method
from pymerge.names import listed, nearest, shown
from pymerge.ops.matrix.spectrum import truncated_svd

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: PEFT's combination types, without ``_svd``, and whether they take a density.
PEFTS = {
    "linear": False,
    "svd": False,
    "cat": False,
    "ties": True,
    "dare_linear": True,
    "dare_ties": True,
    "magnitude_prune": True,
}
#: Ours that take the updates of a module as matrices.
MATRICES = ("iso_c", "iso_cts", "knots", "optmerge", "tsv_m", "wudi")
SEEDS = 1 << 31

Factors = tuple["torch.Tensor", "torch.Tensor"]


@dataclass
class Settings:
    """How modules are combined; ``kind`` None takes the type that PEFT passes."""

    kind: str | None
    seed: int | None = None
    threads: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    scaling: Callable[[Any], float] = lambda target: 1.0

    def name_of(self, target: Any) -> str:
        return self.names.get(id(target), "adapter")

    def draw(self) -> int:
        """The seed of a module's masks, which its name and factor tell apart where it is given."""
        if self.seed is not None:
            return self.seed
        import torch

        return int(torch.randint(SEEDS, ()))


def by_factor(
    settings: Settings,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    target: Any,
    density: float | None,
    majority_sign_method: str,
) -> list[torch.Tensor]:
    """The factors A and B of one module, merged each by itself."""
    group = _group(target, adapters, weights)
    if settings.kind == "robust_merge":
        found = _robust(group, settings, target)
    else:
        check_type(combination_type)
        seed, name = settings.draw(), settings.name_of(target)
        roots = rules.signed_roots([each.low for each in group])
        sides = []
        for side in (0, 1):
            tensors = [each.parameters[side].detach() for each in group]
            factors = [root[side] for root in roots]
            sides.append(
                _elementwise(
                    combination_type,
                    tensors,
                    factors,
                    density,
                    majority_sign_method,
                    seed,
                    f"{name}.{side}",
                )
            )
        found = (sides[0], sides[1])
    return [each.to(group[0].parameters[0].dtype) for each in found]


def by_product(
    settings: Settings,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: Any,
    target_lora_A: torch.Tensor,
    target_lora_B: torch.Tensor,
    density: float | None,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> Factors:
    """The factors of one module, cut from its merged update."""
    group = _group(target, adapters, weights)
    updates = [each.low for each in group]
    kind = settings.kind or combination_type
    with workspace(settings.threads, str(target_lora_A.device)) as ws, ws.active():
        if kind in MATRICES:
            made = _matrices(kind, updates, new_rank, settings, target, ws)
        elif kind == "svd" and clamp is None:
            made = rules.svd(updates, Truncation(new_rank), ws)
        else:
            plain = "linear" if kind == "svd" else kind.removesuffix("_svd")
            check_type(plain)
            rule = partial(
                _elementwise,
                plain,
                election=majority_sign_method,
                seed=settings.draw(),
                name=settings.name_of(target),
            )
            if clamp is not None:
                share = density or 1.0
                a, b = _clamped(rule, updates, share, new_rank, clamp, full_matrices, driver)
                return _fitted(a, target_lora_A, rows=True), _fitted(b, target_lora_B, rows=False)
            made = rules.by_product(rule, updates, density or 1.0, Truncation(new_rank), ws)
        a, b = _values_on_b(made)
        b = b / settings.scaling(target)
    return _fitted(a, target_lora_A, rows=True), _fitted(b, target_lora_B, rows=False)


@dataclass(frozen=True)
class _Update:
    """One adapter's factors of a module, as PEFT keeps them and as matrices."""

    parameters: Factors
    low: rules.Low


def _group(target: Any, adapters: Sequence[str], weights: Sequence[float]) -> list[_Update]:
    """The updates of a module by the adapters that have it."""
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in target.lora_A:
            a, b = target.lora_A[adapter].weight, target.lora_B[adapter].weight
        elif adapter in target.lora_embedding_A:
            a, b = target.lora_embedding_A[adapter], target.lora_embedding_B[adapter]
        else:
            continue
        rank = a.shape[0]
        left = b.detach().reshape(-1, rank).float()
        low = rules.Low(a.detach().reshape(rank, -1).float(), left, target.scaling[adapter], weight)
        found.append(_Update((a, b), low))
    if not found:
        raise PlanError(f"a module that none of the adapters {listed(adapters)} has")
    return found


def _elementwise(
    kind: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float | None = None,
    election: str = "total",
    seed: int = 0,
    name: str = "adapter",
) -> torch.Tensor:
    """PEFT's function of that name on tensors of one shape; float32."""
    import torch

    made = partial(merged, dtype=torch.float32)
    if kind == "linear":
        return made("linear", None, tensors, weight=list(weights), normalize=False)
    share = share_of(kind, density)
    zeros = torch.zeros_like(tensors[0])
    if kind == "dare_linear":
        return made(
            "dare_linear",
            zeros,
            tensors,
            weight=list(weights),
            density=share,
            rescale_by="density",
            seed=seed,
            name=name,
        )
    if kind == "ties" and election == "total" and int(share * zeros.numel()):
        return made("ties", zeros, tensors, preset="peft", weight=list(weights), density=share)
    kept = [_pruned(kind, each, share, seed, f"{name}.{i}") for i, each in enumerate(tensors)]
    if kind == "magnitude_prune":
        return made("linear", None, kept, weight=list(weights), normalize=False)
    if election == "frequency":
        return elected_by_count(kept, weights, zero_sign=1)
    return made("ties", zeros, kept, preset="peft", weight=list(weights))


def _pruned(kind: str, tensor: torch.Tensor, share: float, seed: int, name: str) -> torch.Tensor:
    """What an adapter keeps of a tensor: at random for ``dare``, else its largest elements."""
    import torch

    zeros = torch.zeros_like(tensor)
    made = partial(merged, dtype=torch.float32)
    if kind == "dare_ties":
        return made(
            "dare_linear",
            zeros,
            [tensor],
            weight=1.0,
            density=share,
            rescale_by="density",
            seed=seed,
            name=name,
        )
    if not int(share * tensor.numel()):
        return zeros.float()
    return made("ties", zeros, [tensor], weight=1.0, density=share)


def _matrices(
    kind: str,
    updates: Sequence[rules.Low],
    rank: int,
    settings: Settings,
    target: Any,
    ws: Workspace,
) -> rules.Combined:
    """One of our methods on the updates as matrices, cut to the rank."""
    import torch

    spec = get_method(kind).spec
    parameters = by_tensor(spec, settings.parameters, "PEFT")
    weights = [each.weight for each in updates]
    factors = [each.scale for each in updates]
    if "weight" in spec.parameters:
        parameters.setdefault("weight", weights)
    else:
        factors = [each.factor for each in updates]
    # Every update is a matrix [outputs, inputs], whatever the module is called.
    parameters.setdefault("exclude", "")
    pairs = [
        ((each.b * factor).cpu().numpy(), each.a.cpu().numpy())
        for each, factor in zip(updates, factors, strict=True)
    ]
    zeros = torch.zeros(len(updates[0].b), updates[0].a.shape[1])
    total = merged(
        kind,
        zeros,
        [zeros] * len(updates),
        dtype=torch.float32,
        factors=pairs,
        name=settings.name_of(target),
        threads=settings.threads,
        **parameters,
    )
    left, values, right, _ = truncated_svd(total.to(ws.device), min(rank, *total.shape), ws)
    roots = values.sqrt()
    return rules.Combined(roots[:, None] * right, left * roots)


def _robust(group: Sequence[_Update], settings: Settings, target: Any) -> Factors:
    updates = [each.low for each in group]
    if len({each.scale for each in updates}) > 1 or set(settings.weights) != {1.0}:
        raise PlanError(
            f"{settings.name_of(target)}: robust_merge weighs by itself and looks at no scale: "
            f"expected weights of 1 and one scale, found {listed(map(str, settings.weights))} and "
            f"{listed(str(each.scale) for each in updates)}; use svd or linear"
        )
    made = rules.robust_merge(updates)
    b = made.b * (updates[0].scale / settings.scaling(target))
    a_like, b_like = group[0].parameters
    return made.a.float().reshape(a_like.shape), b.float().reshape(b_like.shape)


def _values_on_b(made: rules.Combined) -> Factors:
    """Factors with the rows of A of unit length, as PEFT has them after a decomposition."""
    import torch

    norms = made.a.double().norm(dim=1)
    safe = torch.where(norms > 0, norms, 1.0)
    return (made.a.double() / safe[:, None]).float(), (made.b.double() * norms).float()


def _clamped(
    rule: Callable[..., torch.Tensor],
    updates: Sequence[rules.Low],
    density: float,
    rank: int,
    quantile: float,
    full_matrices: bool,
    driver: str | None,
) -> Factors:
    """Factors held within a quantile of their elements. It depends on the signs of the singular
    vectors, so that the decomposition is the one that PEFT asks for."""
    import torch

    products = [(each.b @ each.a) * each.scale for each in updates]
    merged_update = rule(products, [each.weight for each in updates], density)
    left, values, right = torch.linalg.svd(
        merged_update, full_matrices=full_matrices, driver=driver
    )
    b, a = left[:, :rank] * values[:rank], right[:rank]
    # torch.quantile takes 16 million elements at most
    elements = np.concatenate([b.cpu().numpy().reshape(-1), a.cpu().numpy().reshape(-1)])
    high = float(np.quantile(elements, quantile))
    return a.clamp(-high, high), b.clamp(-high, high)


def _fitted(factor: torch.Tensor, like: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """A factor in the shape and dtype of the module's, its rank filled up with zeros."""
    import torch

    matrix = (like.shape[0], -1) if rows else (-1, like.shape[1])
    out = torch.zeros_like(like).reshape(matrix)
    window = out[: len(factor)] if rows else out[:, : factor.shape[1]]
    window.copy_(factor)
    return out.reshape(like.shape)


def share_of(kind: str, density: float | None) -> float:
    if density is None or not density > 0:
        raise PymergeError(
            f"density: {kind} needs the share of elements that is kept, above 0 and at most 1, "
            f"found {shown(density)}"
        )
    return min(float(density), 1.0)


def check_type(kind: str) -> None:
    if kind not in PEFTS:
        every = [*PEFTS, *MATRICES, "robust_merge"]
        near = nearest(kind, every)
        raise PymergeError(
            f"combination_type: expected {listed(every)}, found {shown(kind)}"
            + (f"; did you mean {near}?" if near else "")
        )
