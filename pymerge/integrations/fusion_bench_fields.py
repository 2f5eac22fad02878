"""What the fields of FusionBench's algorithms mean as parameters of our methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pymerge.integrations.fusion_bench_pools import (
    Left,
    Parameters,
    Pooled,
    with_base,
    without_base,
)


class Algorithm(NamedTuple):
    """One of FusionBench's classes: where it is, our method, and what its fields mean."""

    module: str
    method: str
    parameters: Callable[[Any, Pooled], Parameters]
    kept: Callable[[Any, Pooled], Sequence[str]] = lambda self, pooled: ()
    gather: Callable[[Any, Any], Pooled] | None = None


def _pair(self: Any, pool: Any) -> Pooled:
    names = pool.all_model_names
    if len(names) != 2:
        raise Left(f"slerp takes 2 models, found {len(names)}")
    first, second = (pool.load_model(name) for name in names)
    return Pooled(first, first, [second])


def names_pattern(names: Sequence[str]) -> str:
    """A regular expression that these names alone match; empty for none."""
    return f"^(?:{'|'.join(map(re.escape, names))})$" if names else ""


def _no_matrices(self: Any, pooled: Pooled) -> str:
    """FusionBench takes what has two dimensions and is not in ``exclude_keys`` as a matrix."""
    excluded = list(getattr(self, "exclude_keys", None) or ())
    return names_pattern(
        [name for name, value in pooled.tensors.items() if value.dim() != 2 or name in excluded]
    )


def _linear_weights(model: Any) -> set[str]:
    import torch

    if isinstance(model, Mapping):
        raise Left("which layers are linear cannot be told from a lazy state dict")
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _drawn_seed() -> int:
    """From torch's generator, so that its seed decides over masks."""
    import torch

    return int(torch.randint(1 << 31, ()))


def ties(self: Any, pooled: Pooled) -> Parameters:
    return ties_parameters(self.threshold, self.merge_func, self.scaling_factor)


def ties_parameters(threshold: float, merge_func: str, scaling_factor: float) -> Parameters:
    """FusionBench's TIES: a threshold above 1 is in percent."""
    rules = {"sum": "sum", "mean": "count", "max": "max"}
    rule = str(merge_func).split("-")[-1]
    if rule not in rules:
        raise Left(f"merge_func {merge_func!r} is not known")
    share = threshold / 100 if threshold > 1 else threshold
    return {
        "preset": "official",
        "density": float(share),
        "merge": rules[rule],
        "lambda": float(scaling_factor),
    }


def removed(self: Any, pooled: Pooled) -> Sequence[str]:
    removed = list(self.remove_keys or ())
    if removed and "transformer.shared.weight" in pooled.tensors:
        raise Left("remove_keys of a model with transformer.shared.weight are copies of it")
    return removed


def _task_arithmetic(self: Any, pooled: Pooled) -> Parameters:
    return {"weight": 1.0, "lambda": float(self.config.scaling_factor)}


def _weighted(self: Any, pooled: Pooled) -> Parameters:
    weights = [float(weight) for weight in self.weights]
    if len(weights) != len(pooled.models):
        raise Left(f"{len(weights)} weights for {len(pooled.models)} models")
    return {"weight": weights, "normalize": bool(self.normalize)}


def _slerp(self: Any, pooled: Pooled) -> Parameters:
    if (self.DOT_THRESHOLD, self.epsilon) != (0.9995, 1e-8):
        raise Left("pymerge's slerp has DOT_THRESHOLD 0.9995 and epsilon 1e-8")
    return {"t": float(self.t)}


def _tsv_m(self: Any, pooled: Pooled) -> Parameters:
    if self.return_single_task_models:
        raise Left("return_single_task_models")
    alpha = 1.0 if self.alpha is None else self.alpha
    if not isinstance(alpha, int | float):
        raise Left("a list of alphas weighs tensors that are no matrices, too")
    return {"lambda": float(alpha), "exclude": _no_matrices(self, pooled)}


def _iso(self: Any, pooled: Pooled) -> Parameters:
    found = {"lambda": float(self.scaling_factor), "exclude": _no_matrices(self, pooled)}
    if hasattr(self, "common_space_fraction"):
        found["common_space_fraction"] = float(self.common_space_fraction)
    return found


def _wudi(self: Any, pooled: Pooled) -> Parameters:
    return {"steps": int(self.iter_num), "exclude": _no_matrices(self, pooled)}


def _doge_ta(self: Any, pooled: Pooled) -> Parameters:
    share = self.K / 100 if self.K > 1 else self.K
    return {
        "preset": "official",
        "subspace": float(self.subspace),
        "density": float(share),
        "lamda": float(self.lamda),
    }


def _model_stock(self: Any, pooled: Pooled) -> Parameters:
    if self.model_save_path is not None:
        raise Left("model_save_path")
    ignored = set(self.ignore_keys or ())
    return {"preset": "official", "skip": lambda name: name in ignored}


def _magmax(self: Any, pooled: Pooled) -> Parameters:
    return {"lambda": float(self.scaling_factor)}


def dare(self: Any, pooled: Pooled) -> Parameters:
    keep = 1.0 - float(self.sparsity_ratio)
    if not 0 < keep <= 1:
        raise Left(f"sparsity_ratio {self.sparsity_ratio} is not at least 0 and below 1")
    linear = _linear_weights(pooled.receiver) if self.only_on_linear_weights else None
    return {
        "weight": 1.0,
        "lambda": float(getattr(self, "scaling_factor", 1 / len(pooled.models))),
        "density": lambda name: keep if linear is None or name in linear else 1.0,
        "rescale": bool(self.rescale),
        "rescale_by": "density",
        "seed": _drawn_seed(),
    }


def frozen(self: Any, pooled: Pooled) -> Sequence[str]:
    """FusionBench's DARE merges what can be trained; buffers are not among that."""
    trained = {n for n, each in pooled.receiver.named_parameters() if each.requires_grad}
    return [name for name in pooled.tensors if name not in trained]


def modules(self: Any, pool: Any) -> Pooled:
    pooled = with_base(self, pool)
    if any(isinstance(each, Mapping) for each in (pooled.base, *pooled.models)):
        raise Left("its DARE takes modules, found a lazy state dict")
    return pooled


def _shuffled(self: Any, pool: Any) -> Pooled:
    """OPCM's order of models; the first one receives the result."""
    import random

    if self.num_ray_actors > 0 or self.evaluate_on_every_step:
        raise Left("num_ray_actors and evaluate_on_every_step")
    if self.save_on_every_step and self.log_dir is not None:
        raise Left("save_on_every_step needs the models in between")
    if self.seed is not None:
        import lightning

        lightning.seed_everything(self.seed)
    names = list(pool.model_names)
    if self.shuffle_order:
        random.shuffle(names)
    models = [pool.load_model(name) for name in names]
    return Pooled(models[0], pool.load_pretrained_model(), models)


def _opcm(self: Any, pooled: Pooled) -> Parameters:
    linear = _linear_weights(pooled.receiver)
    return {
        "alpha": float(self.alpha),
        "exclude": names_pattern([name for name in pooled.tensors if name not in linear]),
    }


ISO_C, ISO_CTS = "IsotropicMergingInCommonSubspace", "IsotropicMergingInCommonAndTaskSubspace"
ALIASES = {"ISO_C_Merge": ISO_C, "ISO_CTS_Merge": ISO_CTS}

ALGORITHMS: Mapping[str, Algorithm] = {
    "DareSimpleAverage": Algorithm("dare", "dare_linear", dare, frozen, modules),
    "DareTaskArithmetic": Algorithm("dare", "dare_linear", dare, frozen, modules),
    "DOGE_TA_Algorithm": Algorithm("doge_ta.doge_ta", "doge_ta", _doge_ta),
    ISO_C: Algorithm("isotropic_merging", "iso_c", _iso),
    ISO_CTS: Algorithm("isotropic_merging", "iso_cts", _iso),
    "MagMaxAlgorithm": Algorithm("magmax", "magmax", _magmax),
    "ModelStock": Algorithm("model_stock.model_stock", "model_stock", _model_stock),
    "OPCM": Algorithm("opcm.opcm_general", "opcm", _opcm, gather=_shuffled),
    "SimpleAverageAlgorithm": Algorithm(
        "simple_average", "linear", lambda self, pooled: {"weight": 1.0}, gather=without_base
    ),
    "SlerpMergeAlgorithm": Algorithm("slerp", "slerp", _slerp, gather=_pair),
    "TaskArithmeticAlgorithm": Algorithm("task_arithmetic", "task_arithmetic", _task_arithmetic),
    "TaskSingularVectorMerging": Algorithm("task_singular_vector", "tsv_m", _tsv_m),
    "TiesMergingAlgorithm": Algorithm("ties_merging", "ties", ties, removed),
    "WeightedAverageAlgorithm": Algorithm(
        "weighted_average", "linear", _weighted, gather=without_base
    ),
    "WUDIMerging": Algorithm("wudi", "wudi", _wudi),
}
