"""What a survey measured, as pure data: sums of tensors that add up to those of layers and models.

docs/report.md defines every number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

#: Names the output among the experts of inner products.
OUTPUT = ""


@dataclass(frozen=True)
class Product:
    """The inner product of two vectors and their squared norms, over the tensors that have both."""

    dot: float
    left: float
    right: float

    @property
    def cosine(self) -> float | None:
        """In [-1, 1]; None where a vector is zero or not finite."""
        norms = math.sqrt(self.left) * math.sqrt(self.right)
        if not (math.isfinite(self.dot) and 0 < norms < math.inf):
            return None
        return min(1.0, max(-1.0, self.dot / norms))


@dataclass(frozen=True)
class Figures:
    """Sums over the elements of one or more tensors.

    ``products`` are those of the deltas to the base by the names of two experts, in their order,
    the output last and named OUTPUT; without a base those of the weights themselves. ``output`` is
    the product of output and base, whose right norm is the base's. ``compared`` counts the elements
    that have a base, ``contested`` those where at least two experts have a delta.
    """

    num_tensors: int
    elements: int
    nonfinite: int
    inputs_nonfinite: int
    squared: float
    products: Mapping[tuple[str, str], Product] = field(default_factory=dict)
    output: Product | None = None
    compared: int = 0
    changed: int = 0
    contested: int = 0
    conflicts: int = 0

    @property
    def norm(self) -> float | None:
        """Of the output."""
        return _root(self.squared)

    @property
    def norm_ratio(self) -> float | None:
        """The output's norm over the base's, where there is one."""
        return None if self.output is None else _ratio(self.output.left, self.output.right)

    @property
    def base_cosine(self) -> float | None:
        """Of the output with the base."""
        return None if self.output is None else self.output.cosine

    @property
    def delta_norm(self) -> float | None:
        """Of the output minus the base."""
        found = self.products.get((OUTPUT, OUTPUT)) if self.output is not None else None
        return None if found is None else _root(found.dot)

    @property
    def delta_ratio(self) -> float | None:
        """The norm of the output's delta over the mean of the norms of the experts' deltas."""
        delta = self.delta_norm
        norms = [
            _root(p.dot) for (left, right), p in self.products.items() if left and left == right
        ]
        known = [norm for norm in norms if norm is not None]
        total = math.fsum(known)
        if delta is None or not known or len(known) < len(norms) or not total:
            return None
        return delta * len(known) / total

    @property
    def kept_share(self) -> float | None:
        """Share of the elements that differ from the base."""
        return self.changed / self.compared if self.compared else None

    @property
    def conflict_rate(self) -> float | None:
        """Share of the elements where two experts' deltas have opposite signs."""
        return self.conflicts / self.contested if self.contested else None

    def cosine(self, expert: str) -> float | None:
        """Of the output's delta with an expert's; of the weights where there is no base."""
        found = self.products.get((expert, OUTPUT))
        return None if found is None else found.cosine

    def expert_norm(self, expert: str) -> float | None:
        """Of an expert's delta, or of its weights where there is no base."""
        found = self.products.get((expert, expert))
        return None if found is None else _root(found.dot)


def _root(squared: float) -> float | None:
    return math.sqrt(squared) if math.isfinite(squared) and squared >= 0 else None


def _ratio(above: float, below: float) -> float | None:
    if not (math.isfinite(above) and math.isfinite(below)) or below <= 0:
        return None
    return math.sqrt(above / below)


def together(figures: Iterable[Figures]) -> Figures:
    """The figures of all tensors as if their elements stood in one vector."""
    found = list(figures)
    pairs = list(dict.fromkeys(pair for each in found for pair in each.products))
    outputs = [each.output for each in found if each.output is not None]
    return Figures(
        num_tensors=sum(each.num_tensors for each in found),
        elements=sum(each.elements for each in found),
        nonfinite=sum(each.nonfinite for each in found),
        inputs_nonfinite=sum(each.inputs_nonfinite for each in found),
        squared=_total(each.squared for each in found),
        products={
            pair: _added([each.products[pair] for each in found if pair in each.products])
            for pair in pairs
        },
        output=_added(outputs) if outputs else None,
        compared=sum(each.compared for each in found),
        changed=sum(each.changed for each in found),
        contested=sum(each.contested for each in found),
        conflicts=sum(each.conflicts for each in found),
    )


def _added(products: Sequence[Product]) -> Product:
    return Product(
        _total(each.dot for each in products),
        _total(each.left for each in products),
        _total(each.right for each in products),
    )


def _total(values: Iterable[float]) -> float:
    """The sum, rounded once; NaN where a term is not finite."""
    terms = list(values)
    return math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan


@dataclass(frozen=True)
class TensorFigures:
    """One output tensor; ``layer`` is None outside the layers, and ``module`` what its name has
    beside the layer's. ``figures`` is None for numbers that are not floating point."""

    name: str
    layer: str | None
    module: str
    shape: tuple[int, ...]
    format: str
    experts: tuple[str, ...]
    has_base: bool
    figures: Figures | None


@dataclass(frozen=True)
class Survey:
    """A merged model measured against what it was made of.

    ``base`` is None where nothing is a base; products are then of weights. ``labels`` are short
    names of the experts. ``warnings`` are sentences.
    """

    out: str
    method: str | None
    base: str | None
    experts: tuple[str, ...]
    labels: Mapping[str, str]
    tensors: tuple[TensorFigures, ...]
    warnings: tuple[str, ...] = ()

    @property
    def measured(self) -> list[TensorFigures]:
        """The tensors that have figures."""
        return [each for each in self.tensors if each.figures is not None]

    @property
    def overall(self) -> Figures:
        """All tensors together."""
        return together(each.figures for each in self.tensors if each.figures is not None)

    @property
    def layers(self) -> dict[str, Figures]:
        """Layer → its tensors together, in the output's order; "" for those outside the layers."""
        return self._by(lambda each: each.layer or "")

    @property
    def modules(self) -> dict[str, Figures]:
        """Module → that of all layers together, those outside the layers by their name."""
        return self._by(lambda each: each.module)

    def _by(self, key: Callable[[TensorFigures], str]) -> dict[str, Figures]:
        found: dict[str, list[Figures]] = {}
        for each in self.tensors:
            if each.figures is not None:
                found.setdefault(key(each), []).append(each.figures)
        return {name: together(figures) for name, figures in found.items()}
