"""FusionBench's algorithms that take more than parameters: drop and trim, masks, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from pymerge.integrations.fusion_bench_fields import (
    dare,
    frozen,
    modules,
    names_pattern,
    removed,
    ties,
)
from pymerge.integrations.fusion_bench_pools import (
    Left,
    Parameters,
    Part,
    Pooled,
    Tensors,
    plain_dict,
    state_dict,
    with_base,
)


class Special(NamedTuple):
    """One of FusionBench's classes: where it is, and our ``run``."""

    module: str
    run: Callable[[Any, Any], Any]


def _dare_ties(self: Any, pool: Any) -> Any:
    """Drop at random, then TIES of what is left, both on the task vectors themselves."""
    import torch

    pooled = modules(self, pool)
    if frozen(self, pooled):
        raise Left("of tensors that cannot be trained its DARE takes the weights for task vectors")
    kept = removed(self, pooled)
    first, second = dare(self, pooled), ties(self, pooled)
    first["lambda"] = 1.0
    base = pooled.tensors
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    dropped = []
    for index, model in enumerate(pooled.models):
        own = state_dict(model)
        deltas = {name: own[name] - tensor for name, tensor in base.items()}
        settings = {**first, "seed": (first["seed"] + index) % (1 << 31)}
        dropped.append(plain_dict("dare_linear", Pooled(zeros, zeros, [deltas]), settings))
    total = plain_dict("ties", Pooled(zeros, zeros, dropped), second, kept)
    for name, update in total.items():
        base[name].add_(update)
    return pooled.receiver


def _emr(self: Any, pool: Any) -> Any:
    """One vector for all tasks, and a mask and a scale for each, as FusionBench's modulators."""
    import torch
    from fusion_bench.method.emr_merging.utils import EMRModulatedModel, EMRTaskModulator

    from pymerge.in_memory import merge_tensor

    pooled = with_base(self, pool)
    tensors, models = pooled.tensors, [state_dict(model) for model in pooled.models]
    vector: dict[str, Any] = {}
    masks: list[dict[str, Any]] = [{} for _ in models]
    before, after = torch.zeros(len(models)), torch.zeros(len(models))
    for name in tensors:
        base = tensors[name]
        if not base.is_floating_point() or base.device.type != "cpu":
            raise Left(f"{name} is {base.dtype} on {base.device}")
        own = [model[name].contiguous() for model in models]
        found = merge_tensor("emr", base.contiguous(), own, name=name)
        vector[name] = found.vector
        bits = _unpacked(found.masks, base.numel())
        for task, model in enumerate(own):
            masks[task][name] = bits[task].reshape(base.shape)
            before[task] += (model - base).abs().mean()
            after[task] += (found.vector * masks[task][name]).abs().mean()
    result = EMRModulatedModel(backbone=pooled.receiver, modulators={}, unified_task_vector=vector)
    for task, task_name in enumerate(pool.model_names):
        modulator = EMRTaskModulator(mask=masks[task], rescaler=before[task] / after[task])
        result.add_modulator(task_name=task_name, modulator=modulator)
    return result


def _unpacked(masks: Any, num: int) -> Any:
    """Bits of bytes, the lowest first, as booleans [tasks, num]."""
    import torch

    places = torch.arange(8, dtype=torch.uint8)
    bits = (masks[..., None] >> places) & 1
    return bits.reshape(len(masks), -1)[:, :num].bool()


def _regmean(self: Any, pool: Any) -> Any:
    """FusionBench collects the Grams on its data, we solve."""
    self.modelpool = pool
    self.on_regmean_start()
    utils = import_module("fusion_bench.method.regmean.utils")
    models, grams = [], []
    for name, model in pool.named_models():
        linear = utils.get_modules_to_merge(
            model=model, include_module_types=self._include_module_type
        )
        found = self.get_regmean_weights(
            name,
            model,
            train_dataset=pool.load_train_dataset(name),
            linear_modules_to_merge=linear,
        )
        models.append(model)
        grams.append({f"{each}.weight": gram for each, gram in found.items()})
    as_outputs_inputs = self.config.get("weight_transpose", True)
    parameters = {
        "alpha": float(self.reduce_non_diagonal_ratio),
        "ridge": 0.0,
        "exclude": "",
        "transpose": "" if as_outputs_inputs else names_pattern(list(grams[0])),
    }
    return _with_statistics("regmean", pool, models, _chosen(self, models[0]), grams, parameters)


def _fisher(self: Any, pool: Any) -> Any:
    """FusionBench collects the diagonals on its data, we merge."""
    import torch

    self.modelpool = pool
    self.on_fisher_merging_start()
    models: list[Any] = []
    diagonals: list[Tensors] = []
    names: list[str] = []
    for name, model in pool.named_models():
        names = names or _chosen(self, model)
        with torch.enable_grad():
            found = self.get_fisher_weights(
                model_name=name,
                model=model,
                train_dataset=pool.load_train_dataset(name),
                param_names_to_merge=names,
            )
        models.append(model)
        diagonals.append(found)
    parameters = {
        "weight": 1 / len(models),
        "normalize": bool(self.config.get("normalize_fisher_weight", True)),
        "epsilon": float(self.config.get("minimal_fisher_weight", 1e-6)),
    }
    return _with_statistics("fisher", pool, models, names, diagonals, parameters)


def _chosen(self: Any, model: Any) -> list[str]:
    utils = import_module("fusion_bench.method.regmean.utils")
    names: list[str] = utils.get_param_names_to_merge(
        input_param_names=list(model.state_dict()),
        exclude_param_names_regex=self.config.get("exclude_param_names_regex", []),
    )
    return names


def _with_statistics(
    method: str,
    pool: Any,
    models: list[Any],
    names: Sequence[str],
    statistics: Sequence[Tensors],
    parameters: Parameters,
) -> Any:
    """Merge the named parameters by what was collected, and give them to the pretrained model."""
    from pymerge.state_dicts import merge_state_dicts

    parts = [Part(model.state_dict(), names) for model in models]
    found = merge_state_dicts(None, parts, method=method, statistics=statistics, **parameters)
    receiver = pool.load_model("_pretrained_")
    receiver.load_state_dict(found, strict=False)
    return receiver


SPECIAL: Mapping[str, Special] = {
    "DareTiesMerging": Special("dare", _dare_ties),
    "EMRMerging": Special("emr_merging", _emr),
    "FisherMergingAlgorithm": Special("fisher_merging.fisher_merging", _fisher),
    "FisherMergingAlgorithmForGPT2": Special("fisher_merging.gpt2_fisher_merging", _fisher),
    "FisherMergingForCLIPVisionModel": Special("fisher_merging.clip_fisher_merging", _fisher),
    "RegMeanAlgorithm": Special("regmean.regmean", _regmean),
    "RegMeanAlgorithmForCLIP": Special("regmean.clip_regmean", _regmean),
    "RegMeanAlgorithmForGPT2": Special("regmean.gpt2_regmean", _regmean),
}
