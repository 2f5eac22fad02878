"""FusionBench's algorithms beside ours, from hydra configurations. Executed by the Python of
FusionBench's environment: ``python drive_fusionbench_backend.py FOLDER``.

Writes FOLDER/report.json: for each of CASES the norm of the difference of both results as a share
of the norm of what FusionBench's merge changed, tensor by tensor; and what the tests of single
properties need.
"""

import contextlib
import copy
import io
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import lightning
import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool
from fusion_bench.utils.lazy_state_dict import LazyStateDict
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

import pymerge
from pymerge.integrations import fusion_bench as ours
from pymerge.integrations.hosts import HostWarning

TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
DROP = {"sparsity_ratio": 0.0, "only_on_linear_weights": False, "rescale": True}
CASES = {
    "ties": ("ties_merging.TiesMergingAlgorithm", TIES),
    "ties-mean": ("ties_merging.TiesMergingAlgorithm", {**TIES, "merge_func": "dis-mean"}),
    "ties-max": ("ties_merging.TiesMergingAlgorithm", {**TIES, "merge_func": "max"}),
    "task_arithmetic": ("task_arithmetic.TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    "simple_average": ("simple_average.SimpleAverageAlgorithm", {}),
    "weighted_average": (
        "weighted_average.WeightedAverageAlgorithm",
        {"normalize": True, "weights": [1, 2, 5]},
    ),
    "slerp": ("slerp.SlerpMergeAlgorithm", {"t": 0.3}),
    "tsv_m": ("task_singular_vector.TaskSingularVectorMerging", {"alpha": 0.7}),
    "iso_c": (
        "isotropic_merging.ISO_C_Merge",
        {"scaling_factor": 1.2, "exclude_keys": ["embed.weight"]},
    ),
    "iso_cts": (
        "isotropic_merging.ISO_CTS_Merge",
        {"scaling_factor": 1.0, "common_space_fraction": 0.8},
    ),
    "wudi": ("wudi.WUDIMerging", {"iter_num": 30}),
    "doge_ta": ("doge_ta.doge_ta.DOGE_TA_Algorithm", {"subspace": 6, "K": 30, "lamda": 0.07}),
    "model_stock": ("model_stock.model_stock.ModelStock", {"ignore_keys": ["embed.weight"]}),
    "magmax": ("magmax.MagMaxAlgorithm", {}),
    "opcm": (
        "opcm.opcm_general.OPCM",
        {"alpha": 0.5, "seed": 3, "save_on_every_step": False},
    ),
    # without a draw: what is left of DARE is its way to combine
    "dare": ("dare.DareTaskArithmetic", {"scaling_factor": 0.3, **DROP}),
    "dare-average": ("dare.DareSimpleAverage", DROP),
    "dare-ties": ("dare.DareTiesMerging", {**TIES, **DROP}),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
        self.embed = nn.Embedding(20, 16)

    def forward(self, x):
        return self.encoder(x)


torch.manual_seed(0)
BASE = Model()
TASKS = [copy.deepcopy(BASE) for _ in range(3)]
for task in TASKS:
    for parameter in task.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)


class Pool(BaseModelPool):
    def load_train_dataset(self, name):
        return DATA[name]


DATA = {
    f"task{i}": torch.randn(40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)
}


def pool(base=True, count=3):
    models = {"_pretrained_": copy.deepcopy(BASE)} if base else {}
    return Pool({**models, **{f"task{i}": copy.deepcopy(TASKS[i]) for i in range(count)}})


def made(target, fields):
    algorithm = instantiate(OmegaConf.create({"_target_": target, **fields}))
    if isinstance(algorithm, LightningFabricMixin):
        algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return algorithm


def run(algorithm, models):
    """The merged model and what was warned of."""
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always")
        result = algorithm.run(models)
    return result, [str(each.message) for each in caught if each.category is HostWarning]


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def differences(found, expected):
    base = BASE.state_dict()
    shares = {}
    for name, each in expected.items():
        change = float((each - base[name]).norm())
        off = float((found[name] - each).norm())
        shares[name] = off / change if change else off
    return shares


def compared(path, fields):
    name = path.rpartition(".")[2]
    arguments = (False, 2) if "Slerp" in name else ()
    theirs, _ = run(made(f"fusion_bench.method.{path}", fields), pool(*arguments))
    algorithm = made(f"pymerge.integrations.fusion_bench.{name}", fields)
    found, told = run(algorithm, pool(*arguments))
    config = OmegaConf.to_container(algorithm.config)
    return {
        "differences": differences(found.state_dict(), theirs.state_dict()),
        "warnings": told,
        "is_algorithm": isinstance(algorithm, BaseAlgorithm),
        "config": get_class(config["_target_"]) is type(algorithm),
    }


def grams_of(model, inputs, linear):
    found = {}
    for name, module in model.encoder.named_children():
        if isinstance(module, nn.Linear):
            found[f"encoder.{name}"] = inputs.T @ inputs / len(inputs)
        inputs = module(inputs)
    return {name: found[name] for name in linear}


def statistics():
    """RegMean and Fisher on what a task's own subclass collects."""
    from fusion_bench.method.fisher_merging.fisher_merging import FisherMergingAlgorithm
    from fusion_bench.method.regmean.regmean import RegMeanAlgorithm

    def grams(self, model_name, model, train_dataset, linear_modules_to_merge):
        return grams_of(model, train_dataset, linear_modules_to_merge)

    def diagonals(self, model_name, model, train_dataset, param_names_to_merge):
        model.zero_grad()
        model(train_dataset).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if n in param_names_to_merge}
        return {
            n: torch.rand(BASE.state_dict()[n].shape) if g is None else g**2
            for n, g in found.items()
        }

    regmean = {
        "num_regmean_examples": 40,
        "exclude_param_names_regex": [],
        "reduce_non_diagonal_ratio": 0.6,
        "weight_transpose": True,
    }
    fisher = {
        "exclude_param_names_regex": ["embed.*"],
        "normalize_fisher_weight": True,
        "minimal_fisher_weight": 1e-6,
        "num_fisher_examples": 40,
    }
    found = {}
    for name, theirs, mine, method, fields in (
        ("regmean", RegMeanAlgorithm, ours.RegMeanAlgorithm, "get_regmean_weights", regmean),
        (
            "fisher",
            FisherMergingAlgorithm,
            ours.FisherMergingAlgorithm,
            "get_fisher_weights",
            fisher,
        ),
    ):
        collect = grams if name == "regmean" else diagonals
        results = []
        for kind in (theirs, mine):
            own = type(kind.__name__, (kind,), {method: collect})
            results.append(run(own(**fields), pool()))
        (expected, _), (merged, told) = results
        found[name] = {
            "differences": differences(merged.state_dict(), expected.state_dict()),
            "warnings": told,
        }
    return found


def emr():
    theirs, _ = run(made("fusion_bench.method.emr_merging.EMRMerging", {}), pool())
    found, told = run(made("pymerge.integrations.fusion_bench.EMRMerging", {}), pool())
    shares = {}
    for index in range(3):
        models = []
        for each in (theirs, found):
            modulator = each.modulators[f"task{index}"]
            vector = each.unified_task_vector
            models.append(
                {
                    n: (vector[n] * modulator.mask[n] * modulator.rescaler).detach()
                    for n in BASE.state_dict()
                }
            )
        shares |= {
            f"{index} {n}": float((models[1][n] - each).norm() / each.norm())
            for n, each in models[0].items()
        }
    return {"differences": shares, "warnings": told}


def drawn(**fields):
    torch.manual_seed(7)
    fields = {"scaling_factor": 1.0, "rescale": True, **fields}
    algorithm = made("pymerge.integrations.fusion_bench.DareTaskArithmetic", fields)
    return run(algorithm, pool(count=1))[0].state_dict()


def dropping():
    base, task = BASE.state_dict(), TASKS[0].state_dict()
    everywhere = drawn(sparsity_ratio=0.5, only_on_linear_weights=False)
    linear = drawn(sparsity_ratio=0.5, only_on_linear_weights=True)
    name = "encoder.0.weight"
    kept = everywhere[name] != base[name]
    twice = base[name] + 2 * (task[name] - base[name])
    return {
        "share": float(kept.float().mean()),
        "rescaled": float((everywhere[name] - twice)[kept].abs().max()),
        "same seed": float((everywhere[name] - linear[name]).abs().max()),
        "embedding": float((linear["embed.weight"] - task["embed.weight"]).abs().max()),
    }


def lazily(folder):
    """A pool of files: one tensor of each model at a time."""
    files = {"_pretrained_": BASE, **{f"task{i}": task for i, task in enumerate(TASKS)}}
    paths = {}
    for name, model in files.items():
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors", {"format": "pt"})
        paths[name] = str(folder / name)
    reads = []

    class Counting(LazyStateDict):
        def __getitem__(self, key):
            reads.append(key)
            return super().__getitem__(key)

    class Pool(LazyStateDictPool):
        meta = None

        def load_model(self, name, *args, **kwargs):
            return Counting(self._models[name], meta_module=self.meta)

    found = {}
    for case, path in (("ties", CASES["ties"]), ("iso_c", CASES["iso_c"])):
        name = path[0].rpartition(".")[2]
        expected, _ = run(made(f"pymerge.integrations.fusion_bench.{name}", path[1]), pool())
        as_dict, told = run(made(f"pymerge.integrations.fusion_bench.{name}", path[1]), Pool(paths))
        with torch.device("meta"):
            meta = Model()
        given = type("Given", (Pool,), {"meta": meta})(paths)
        module, _ = run(made(f"pymerge.integrations.fusion_bench.{name}", path[1]), given)
        found[case] = {
            "dict": differences(as_dict, expected.state_dict()),
            "module": differences(module.state_dict(), expected.state_dict()),
            "kind": [type(as_dict).__name__, type(module).__name__],
            "warnings": told,
            "reads": len(reads),
        }
    return found


def general():
    """Any method by name, with base and without."""
    found = {}
    states = [task.state_dict() for task in TASKS]
    for method, parameters in (
        ("pcb", {"ratio": 0.2}),
        ("linear", {"weight": [0.2, 0.3, 0.5]}),
        ("dare_ties", {"weight": 0.4, "density": 0.5, "seed": 3}),
    ):
        fields = {"method": method, **parameters}
        algorithm = made("pymerge.integrations.fusion_bench.PymergeAlgorithm", fields)
        merged, _ = run(algorithm, pool())
        base = None if method == "linear" else BASE.state_dict()
        expected = pymerge.merge_state_dicts(base, states, method=method, **parameters)
        found[method] = {
            "differences": differences(merged.state_dict(), expected),
            "config": OmegaConf.to_container(algorithm.config),
        }
    return found


def left():
    """What is handed to FusionBench."""
    found = {}
    given = {
        "threshold rule": (CASES["ties"][0], {**TIES, "merge_func": "median"}),
        "alphas": (CASES["tsv_m"][0], {"alpha": [0.5, 0.6, 0.7]}),
        "slerp": (CASES["slerp"][0], {"t": 0.3, "DOT_THRESHOLD": 0.9}),
    }
    for name, (path, fields) in given.items():
        algorithm = made(f"pymerge.integrations.fusion_bench.{path.rpartition('.')[2]}", fields)
        arguments = (False, 2) if name == "slerp" else ()
        with warnings.catch_warnings(record=True) as caught, quiet():
            warnings.simplefilter("always")
            try:
                algorithm.run(pool(*arguments))
                outcome = "merged"
            except Exception as error:
                outcome = type(error).__name__
        told = [str(each.message) for each in caught if each.category is HostWarning]
        found[name] = [outcome, *told]
    return found


def in_place():
    models = pool()
    before = models.load_model("_pretrained_")
    fields = {"scaling_factor": 0.3, "inplace": False}
    target = "pymerge.integrations.fusion_bench.TaskArithmeticAlgorithm"
    copied, _ = run(made(target, fields), models)
    untouched = torch.equal(before.embed.weight, BASE.embed.weight)
    written, _ = run(made(target, {**fields, "inplace": True}), models)
    return [copied is not before, untouched, written is before]


def main(folder):
    torch.set_num_threads(1)
    report = {"cases": {name: compared(*case) for name, case in CASES.items()}}
    report["cases"] |= statistics()
    report["cases"]["emr"] = emr()
    report["dropping"] = dropping()
    report["lazily"] = lazily(folder)
    report["general"] = general()
    report["left"] = left()
    report["in_place"] = in_place()
    (folder / "report.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
