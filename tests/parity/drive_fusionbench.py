"""Runs FusionBench's own merging code on matrices, many merges in one process.

Executed by the Python of FusionBench's own environment: ``python drive_fusionbench.py JOBS.json``,
where JOBS is a list of::

    {"method": a key of METHODS, "options": arguments of FusionBench's class or function,
     "tensors": .safetensors or .npz file, "out": folder,
     "threads": 1, "repeat": 1, "seed": 0, "activation": "none" or "relu"}

The last four may be left out. TENSORS holds ``base/NAME`` and ``task/0/NAME``, ``task/1/NAME``, ...
where NAME is a parameter's (``layer.weight``; a matrix called weight is an nn.Linear's [out, in],
or an nn.Embedding's where the name says embed). Methods that look at data also read ``inputs/0``,
... ([examples, in] of the first nn.Linear, for each task), or what was computed from them:
``gram/0/MODULE`` for RegMean and ``fisher/0/NAME`` for Fisher merging. The model runs its
nn.Linear modules in alphabetical order, with the activation between them.

Writes OUT/merged.safetensors (NAME to merged parameter, unless the method says otherwise) and
OUT/report.json: versions, threads, the seconds of each repetition of FusionBench's call alone
(models are made anew before each), and peak_bytes: how far the first one raised the resident
memory, or null where that cannot be told. Writes OUT/error.txt instead where a merge failed, and
goes on.

Everything runs on the CPU, in the dtype of the tensors. FusionBench's classes ask Lightning's
Fabric for a device, so they are handed a Fabric on the CPU; functions that default to CUDA are told
"cpu" where they are called directly.
"""

import ctypes
import gc
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import lightning
import numpy as np
import torch
from fusion_bench import BaseModelPool
from fusion_bench.constants import FUSION_BENCH_VERSION
from fusion_bench.mixins import LightningFabricMixin
from safetensors.torch import load_file, save_file
from torch import nn

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu}


class Case:
    """The tensors of a job, by what they are."""

    def __init__(self, tensors, activation):
        self.base = under(tensors, "base/")
        self.tasks = numbered(tensors, "task")
        self.grams = numbered(tensors, "gram")
        self.fishers = numbered(tensors, "fisher")
        self.inputs = [tensors[f"inputs/{i}"] for i in counted(tensors, "inputs")]
        self.activation = ACTIVATIONS[activation]

    def deltas(self):
        names = self.base
        return [{name: task[name] - self.base[name] for name in names} for task in self.tasks]

    def parameters(self):
        """NAME to the list of its values in the tasks, as FusionBench's functions want it."""
        return {name: [task[name] for task in self.tasks] for name in self.tasks[0]}

    def models(self, prefix=""):
        """The base and the tasks as modules with tensors of their own: merges are in place."""
        base, *tasks = (
            Model({prefix + name: value for name, value in values.items()}, self.activation)
            for values in (self.base, *self.tasks)
        )
        return base, tasks

    def pool(self, prefix=""):
        base, tasks = self.models(prefix)
        pool = Pool({"_pretrained_": base, **{f"task{i}": task for i, task in enumerate(tasks)}})
        pool.inputs = {f"task{i}": inputs for i, inputs in enumerate(self.inputs)}
        return pool


def under(tensors, prefix):
    keys = sorted(key for key in tensors if key.startswith(prefix))
    return {key.removeprefix(prefix): tensors[key] for key in keys}


def counted(tensors, kind):
    def present(i):
        return any(f"{key}/".startswith(f"{kind}/{i}/") for key in tensors)

    return itertools.takewhile(present, itertools.count())


def numbered(tensors, kind):
    return [under(tensors, f"{kind}/{i}/") for i in counted(tensors, kind)]


class Pool(BaseModelPool):
    def load_train_dataset(self, dataset_name):
        return self.inputs[dataset_name]


class Model(nn.Module):
    """A tree of modules with the given parameters, that runs its nn.Linear one after the other."""

    def __init__(self, parameters, activation):
        super().__init__()
        self._activation, self._linears, leaves = activation, [], {}
        for name, value in parameters.items():
            path, _, own = name.rpartition(".")
            leaves.setdefault(path, {})[own] = nn.Parameter(value.clone())
        for path, own in leaves.items():
            *steps, last = path.split(".")
            parent = self
            for step in steps:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent._modules[step]
            parent.add_module(last, leaf(path, own))
            if isinstance(parent._modules[last], nn.Linear):
                self._linears.append(path)

    def layers(self):
        """One module for each nn.Linear, which shares its parameters with this model."""
        return [
            Layer(path, self.get_submodule(path), path != self._linears[-1] and self._activation)
            for path in self._linears
        ]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return SimpleNamespace(logits=x)


class Layer(nn.Module):
    def __init__(self, path, linear, activation):
        super().__init__()
        self.path, self.linear, self.activation = path, linear, activation

    def forward(self, x):
        return self.activation(self.linear(x)) if self.activation else self.linear(x)


def leaf(path, parameters):
    if "weight" in parameters and parameters["weight"].dim() == 2:
        rows, columns = parameters["weight"].shape
        if "embed" in path:
            module = nn.Embedding(rows, columns, device="meta")
        else:
            module = nn.Linear(columns, rows, bias="bias" in parameters, device="meta")
    else:
        module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, value)
    return module


class Trainer:
    """What FusionBench asks of a Hugging Face trainer: batches of keyword arguments."""

    def __init__(self, inputs, batch_size):
        self.batches = [{"x": x} for x in inputs.split(batch_size or len(inputs))]
        self._train_batch_size = len(self.batches[0]["x"])

    def get_train_dataloader(self):
        return self.batches

    def _prepare_inputs(self, inputs):
        return inputs


# A method takes a Case and options and returns what is timed, and how its result is read.


def parameters_of(model):
    return dict(model.state_dict())


def named(result):
    return result


def on_cpu(merger):
    if isinstance(merger, LightningFabricMixin):
        merger.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return merger


def algorithm(module, name, **defaults):
    """One of FusionBench's classes, run on a pool of models; defaults where its class has none."""

    def prepare(case, options):
        merger = on_cpu(getattr(imported(module), name)(**{**defaults, **options}))
        pool = case.pool()
        return lambda: merger.run(pool), parameters_of

    return prepare


def imported(module):
    """Imported when it is needed, because some of FusionBench's modules take seconds."""
    return importlib.import_module(f"fusion_bench.method.{module}")


def tsvm_variant(name):
    """A function for task vectors that no class of FusionBench's calls."""

    def prepare(case, options):
        merge = getattr(imported("task_singular_vector.utils.TSVM_utils"), name)
        deltas = case.deltas()

        def add(merged):
            return {name: case.base[name] + delta for name, delta in merged.items()}

        return lambda: merge(deltas, accelerator="cpu", **options), add

    return prepare


def opcm_for_clip(case, options):
    merger = on_cpu(imported("opcm.opcm").OPCMForCLIP(**{**OPCM, **options}))
    merger._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    pool = case.pool()
    return lambda: merger.run(pool), parameters_of


def opcm_step(case, options):
    """One step before it is rescaled: task/0 is the model merged so far, task/1 the next task."""
    merger = on_cpu(imported("opcm.opcm_general").OPCM(**OPCM))
    merger.previous_lambda_t = options.get("previous_lambda", 1)
    merger.lambda_t = options.get("lambda", 1)
    alpha = options.get("alpha", OPCM["alpha"])
    before, after = case.tasks

    @torch.no_grad()
    def call():
        merged = {}
        for name, base in case.base.items():
            values = (before[name], base, after[name], name)
            if base.dim() == 2:
                merged[name] = merger.merge_linear_weights(*values, alpha=alpha)[1]
            else:
                merged[name] = merger.merge_other_parameters(*values)
        return merged

    return call, named


def doge_ta(case, options):
    """Merges only parameters with "encoder" and "weight" in their names, so ours are renamed."""
    settings = {"subspace": 6, "K": 30, "lamda": 0.07, **options}
    merger = on_cpu(imported("doge_ta.doge_ta").DOGE_TA_Algorithm(**settings))
    pool = case.pool("encoder.")
    return lambda: merger.run(pool), lambda model: under(model.state_dict(), "encoder.")


def smile(case, options):
    """Upscales one nn.Linear and runs it on inputs/0.

    Writes "outputs", and where it was upscaled "router" (the gate's logits) and "expert/0", ...
    (each expert's low-rank product).
    """
    settings = {"device": "cpu", **options}
    merger = imported("smile_upscaling.smile_upscaling").SmileUpscalingAlgorithm(**settings)
    pool = case.pool()
    path, inputs = pool.load_model("_pretrained_")._linears[0], case.inputs[0]

    @torch.no_grad()
    def read(model):
        layer = model.get_submodule(path)
        found = {"outputs": layer(inputs)}
        if not isinstance(layer, nn.Linear):
            found["router"] = layer.gate(inputs)
            for i, expert in enumerate(layer.experts):
                whole = isinstance(expert, nn.Linear)
                found[f"expert/{i}"] = expert.weight if whole else expert.u @ expert.svh
        return found

    return lambda: merger.run(pool), read


def slerp(case, options):
    """Between the two tasks; it refuses a pool that has a base."""
    merger = imported("slerp").SlerpMergeAlgorithm(**{"t": 0.5, **options})
    _, models = case.models()
    pool = BaseModelPool(models)
    return lambda: merger.run(pool), parameters_of


def knots(case, options):
    """The shared basis of each matrix: writes u/NAME, s/NAME and the tasks' vh/0/NAME, ..."""
    align = imported("knots.knots_utils").subspace_alignment
    settings = dict(options)
    if settings.get("svd_dtype"):
        settings["svd_dtype"] = getattr(torch, settings["svd_dtype"])
    deltas = case.deltas()
    names = [name for name, value in case.base.items() if value.dim() == 2]

    def read(found):
        tensors = {}
        for name, (u, s, vhs) in found.items():
            tensors |= {f"u/{name}": u, f"s/{name}": s}
            tensors |= {f"vh/{i}/{name}": vh for i, vh in enumerate(vhs)}
        return tensors

    return lambda: {name: align([d[name] for d in deltas], **settings) for name in names}, read


def regmean(case, options):
    """From gram/i/MODULE where there are any, else from inputs/i."""
    module = imported("regmean.regmean")
    if case.grams:
        arguments = (case.parameters(), case.grams)
        merge = torch.no_grad()(module.merging_with_regmean_weights)
        return lambda: merge(*arguments, **options), named
    settings, trainers, counts = trained(case, options)
    _, models = case.models()
    arguments = (models, trainers, [], counts)
    return lambda: module.regmean_merging(*arguments, **settings), named


def trained(case, options):
    settings = dict(options)
    batch_size = settings.pop("batch_size", None)
    trainers = [Trainer(inputs, batch_size) for inputs in case.inputs]
    return settings, trainers, [len(inputs) for inputs in case.inputs]


def regmean_plusplus(case, options):
    """Layer by layer on the merged model's own activations, from inputs/i.

    FusionBench ships it for CLIP; its Grams, its merging and its order are run, and only its
    questions about CLIP's modules are answered for ours. Merges nn.Linear modules alone, which
    must all have a bias or all have none.
    """
    module = imported("regmean_plusplus.clip_regmean_plusplus")
    settings = {**REGMEAN_PLUSPLUS, **options}
    batch_size = settings.pop("batch_size")

    class RegMeanPlusPlus(module.RegMeanAlgorithmForCLIPPlusPlus):
        # CLIP's class puts a dict in the place of the bidict that its parents look options up in
        _config_mapping = module.RegMeanAlgorithmPlusPlus._config_mapping

        def on_regmean_start(self):
            pass

        def merge_embedding_layer(self, models_to_merge_dict):
            return {}

        def get_input_for_first_layer(self, model, train_dataset):
            self.paths = model._linears
            return list(train_dataset.split(batch_size or len(train_dataset)))

        def get_layers(self, model):
            return model.layers()

        def layer_batches_forward(self, layer, batches_input):
            return [layer(x).detach() for x in batches_input]

        def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
            for key, value in new_merged_params.items():
                name = f"{self.paths[layer_idx]}.{key.removeprefix('linear.')}"
                merged_params_dict[name] = value
            return merged_params_dict

    merger = on_cpu(RegMeanPlusPlus(**settings))
    pool = case.pool()
    return lambda: merger.run(pool), parameters_of


def fisher(case, options):
    """From fisher/i/NAME where there are any, else from inputs/i with the outputs as logits."""
    module = imported("fisher_merging.fisher_merging")
    if case.fishers:
        settings, num_tasks = dict(options), len(case.tasks)
        scales = settings.pop("fisher_scaling_coefficients", [1 / num_tasks] * num_tasks)
        arguments = (case.parameters(), case.fishers, torch.tensor(scales))
        merge = torch.no_grad()(module.merging_with_fisher_weights)
        return lambda: merge(*arguments, **settings), named
    settings, trainers, counts = trained(case, options)
    _, models = case.models()
    arguments = (models, trainers, [], counts)
    return lambda: module.fisher_merging(*arguments, **settings), named


def peft_merge(name):
    """One of PEFT's functions for task tensors, which PEFT itself applies to factors of LoRA."""

    def prepare(case, options):
        merge = getattr(importlib.import_module("peft.utils.merge_utils"), name)
        settings = dict(options)
        weights = torch.tensor(settings.pop("weights", [1.0] * len(case.tasks)))
        deltas = case.deltas()

        def call():
            return {
                key: base + merge([d[key] for d in deltas], weights, **settings)
                for key, base in case.base.items()
            }

        return call, named

    return prepare


OPCM = {
    "alpha": 0.5,
    "shuffle_order": False,
    "save_on_every_step": False,
    "evaluate_on_every_step": False,
}
REGMEAN_PLUSPLUS = {
    "num_regmean_examples": 256,
    "exclude_param_names_regex": [],
    "reduce_non_diagonal_ratio": 1.0,
    "weight_transpose": True,
    "dataloader_kwargs": {},
    "batch_size": None,
}
TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}

METHODS = {
    "doge_ta": doge_ta,
    "fisher": fisher,
    "iso_c": algorithm("isotropic_merging", "ISO_C_Merge", scaling_factor=1.0),
    "iso_cts": algorithm(
        "isotropic_merging", "ISO_CTS_Merge", scaling_factor=1.0, common_space_fraction=0.8
    ),
    "knots": knots,
    "opcm": algorithm("opcm.opcm_general", "OPCM", **OPCM),
    "opcm_clip": opcm_for_clip,
    "opcm_step": opcm_step,
    "peft_magnitude_prune": peft_merge("magnitude_prune"),
    "peft_task_arithmetic": peft_merge("task_arithmetic"),
    "peft_ties": peft_merge("ties"),
    "regmean": regmean,
    "regmean_plusplus": regmean_plusplus,
    "simple_average": algorithm("simple_average", "SimpleAverageAlgorithm"),
    "slerp": slerp,
    "smile": smile,
    "task_arithmetic": algorithm("task_arithmetic", "TaskArithmeticAlgorithm", scaling_factor=0.3),
    "ties": algorithm("ties_merging", "TiesMergingAlgorithm", **TIES),
    "tsvm": algorithm("task_singular_vector", "TaskSingularVectorMerging", alpha=1),
    "tsvm_eigen": tsvm_variant("compute_and_sum_svd_mem_reduction_2"),
    "tsvm_lossless": tsvm_variant("compute_and_sum_svd_mem_reduction_lossless"),
    "tsvm_lossless_eigen": tsvm_variant("compute_and_sum_svd_mem_reduction_lossless_eigen"),
    "weighted_average": algorithm("weighted_average", "WeightedAverageAlgorithm", normalize=True),
    "wudi": algorithm("wudi", "WUDIMerging", iter_num=300),
}


class PeakMemory:
    """How far the resident memory rises above where it is when this is made."""

    def __init__(self):
        reset = Path("/proc/self/clear_refs")
        self.start = None
        if os.access(reset, os.W_OK):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would be used unseen
            reset.write_text("5")
            self.start = resident("VmRSS")

    def bytes(self):
        return None if self.start is None else max(0, resident("VmHWM") - self.start)


def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def read_tensors(path):
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}
    return load_file(path)


def run(job, out):
    torch.set_num_threads(job.get("threads", 1))
    case = Case(read_tensors(Path(job["tensors"])), job.get("activation", "none"))
    report = {
        "method": job["method"],
        "fusion_bench": FUSION_BENCH_VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": [],
    }
    for _ in range(job.get("repeat", 1)):
        torch.manual_seed(job.get("seed", 0))
        call, read = METHODS[job["method"]](case, job.get("options", {}))
        peak = None if report["seconds"] else PeakMemory()
        start = time.perf_counter()
        result = call()
        report["seconds"].append(time.perf_counter() - start)
        if peak:
            report["peak_bytes"] = peak.bytes()
    tensors = {name: t.detach().contiguous().clone() for name, t in read(result).items()}
    save_file(tensors, out / "merged.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=2))


def main():
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True)
        try:
            run(job, out)
        except Exception:
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
