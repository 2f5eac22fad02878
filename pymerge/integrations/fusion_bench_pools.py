"""The models of a FusionBench pool, merged where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.errors import PymergeError
from pymerge.names import listed

if TYPE_CHECKING:
    import torch

Parameters = dict[str, Any]
Tensors = Mapping[str, "torch.Tensor"]


class Left(Exception):
    """Why a run is left to FusionBench."""


class Pooled(NamedTuple):
    """The models of a pool: the one that receives the result, the base of the method or None, and
    the models that are merged."""

    receiver: Any
    base: Any | None
    models: list[Any]

    @property
    def tensors(self) -> Tensors:
        found: Tensors = state_dict(self.receiver)
        return found


def as_pool(given: Any) -> Any:
    from fusion_bench import BaseModelPool

    return given if isinstance(given, BaseModelPool) else BaseModelPool(given)


def with_base(self: Any, pool: Any) -> Pooled:
    """The pretrained model, which receives the result, and all others."""
    base = pool.load_pretrained_model()
    return Pooled(base, base, [pool.load_model(name) for name in pool.model_names])


def without_base(self: Any, pool: Any) -> Pooled:
    """The models alone; the first receives the result."""
    models = [pool.load_model(name) for name in pool.model_names]
    if any(getattr(model, "_fusion_bench_target_modules", None) for model in models):
        raise Left("a model names its target modules (_fusion_bench_target_modules)")
    return Pooled(models[0], None, models)


def state_dict(model: Any) -> Any:
    """A module's state dict; a lazy one as it is."""
    return model if isinstance(model, Mapping) else model.state_dict()


def merged(
    method: str,
    pooled: Pooled,
    parameters: Parameters,
    kept: Sequence[str] = (),
    in_place: bool = True,
) -> Any:
    """Merge all tensors but those that are kept, and give them to the receiver."""
    from pymerge.state_dicts import merge_state_dicts

    receiver: Any = pooled.receiver
    names = set(kept)
    wanted = [name for name in pooled.tensors if name not in names]
    base = None if pooled.base is None else Part(state_dict(pooled.base), wanted)
    models = [Part(state_dict(model), wanted) for model in pooled.models]
    if isinstance(receiver, Mapping):
        receiver = receiver if pooled.receiver.meta_module is None else _module_of(receiver)
    elif not in_place:
        receiver = deepcopy(receiver)
    if isinstance(receiver, Mapping):
        found = merge_state_dicts(base, models, method=method, **parameters)
        return {**{name: receiver[name] for name in kept}, **found}
    out = receiver.state_dict()
    merge_state_dicts(base, models, method=method, out=Part(out, wanted), **parameters)
    if isinstance(pooled.receiver, Mapping):
        for name in names & out.keys():
            out[name].copy_(pooled.receiver[name])
        if hasattr(receiver, "tie_weights"):
            receiver.tie_weights()
    return receiver


def _module_of(lazy: Any) -> Any:
    """A module of the lazy state dict's kind, whose parameters are not written yet."""
    import torch

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        is_meta = tensor.device.type == "meta"
        return torch.empty_like(tensor, device=lazy._device) if is_meta else tensor

    module = deepcopy(lazy.meta_module)._apply(filled)
    missing = [name for name in lazy if name not in module.state_dict()]
    if missing:
        raise PymergeError(
            f"{lazy.checkpoint}: the module has no parameters {listed(missing)} that the "
            "checkpoint has; choose a meta_module_class that fits"
        )
    return module


class Part(Mapping[str, Any]):
    """Some tensors of a mapping, each asked for when it is read."""

    def __init__(self, whole: Tensors, names: Sequence[str]) -> None:
        self._whole, self._names = whole, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._whole[name]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def plain_dict(
    method: str, pooled: Pooled, parameters: Parameters, kept: Sequence[str] = ()
) -> dict[str, Any]:
    from pymerge.state_dicts import merge_state_dicts

    names = [name for name in pooled.tensors if name not in set(kept)]
    base, *models = (Part(each, names) for each in (pooled.base or {}, *pooled.models))
    found: dict[str, Any] = merge_state_dicts(base, models, method=method, **parameters)
    return found
