"""Runs one host's merges and ours in turns, for backends.py, by the Python of the host's
environment: ``backends_driver.py HOST REPORT REPEAT THREADS``."""

import contextlib
import copy
import importlib.metadata
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch

from pymerge.integrations.hosts import HostWarning

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 256, 704, 6, 2048


def shapes():
    found = {"embed.weight": (VOCABULARY, HIDDEN), "norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        start = f"layers.{layer}."
        found |= {f"{start}attn.{n}.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        found |= {f"{start}mlp.{n}.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        found[f"{start}mlp.down.weight"] = (HIDDEN, INTERMEDIATE)
    return found


def checkpoints(count):
    generator = torch.Generator().manual_seed(0)

    def made(size, base=None):
        return {
            name: torch.randn(shape, generator=generator) * size
            + (0 if base is None else base[name])
            for name, shape in shapes().items()
        }

    base = made(0.02)
    return [base, *(made(0.002, base) for _ in range(count))]


def timed(call):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def in_turns(cases, repeat):
    """Medians of both of each case: (prepare, run) of the host and of ours."""
    rows = []
    for case, both in cases.items():
        seconds = ([], [])
        for _ in range(repeat + 1):
            for place, (prepare, run) in enumerate(both):
                prepared = prepare()
                seconds[place].append(timed(lambda run=run, given=prepared: run(given)))
        host, ours = (statistics.median(each[1:]) for each in seconds)
        rows.append(
            {
                "case": case,
                "host_seconds": host,
                "pymerge_seconds": ours,
                "ratio": host / ours,
                "runs": [each[1:] for each in seconds],
            }
        )
    return rows


def fusion_bench(repeat):
    import lightning
    from fusion_bench import BaseModelPool
    from fusion_bench.mixins import LightningFabricMixin
    from hydra.utils import instantiate
    from torch import nn

    class Model(nn.Module):
        def __init__(self, tensors):
            super().__init__()
            for name, value in tensors.items():
                parent, *steps = self, *name.split(".")[:-1]
                for step in steps:
                    if step not in parent._modules:
                        parent.add_module(step, nn.Module())
                    parent = parent._modules[step]
                parent.register_parameter("weight", nn.Parameter(value.clone()))

    models = [Model(tensors) for tensors in checkpoints(3)]
    ties = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    drop = {"scaling_factor": 0.3, "sparsity_ratio": 0.9, "only_on_linear_weights": False}
    given = {
        "ties": ("ties_merging.TiesMergingAlgorithm", ties),
        "task_arithmetic": ("task_arithmetic.TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
        "dare": ("dare.DareTaskArithmetic", drop),
        "tsv_m": ("task_singular_vector.TaskSingularVectorMerging", {"alpha": 1.0}),
        "iso_c": ("isotropic_merging.ISO_C_Merge", {"scaling_factor": 1.0}),
        "wudi": ("wudi.WUDIMerging", {"iter_num": 100}),
    }

    def both(path, fields):
        name = path.rpartition(".")[2]
        for target in (
            f"fusion_bench.method.{path}",
            f"pymerge.integrations.fusion_bench.{name}",
        ):
            algorithm = instantiate({"_target_": target, **fields})
            if isinstance(algorithm, LightningFabricMixin):
                algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1)
            yield pool, algorithm.run

    def pool():
        base, *tasks = (copy.deepcopy(model) for model in models)
        named = {f"task{i}": task for i, task in enumerate(tasks)}
        return BaseModelPool({"_pretrained_": base, **named})

    return in_turns({case: list(both(*each)) for case, each in given.items()}, repeat)


def sd_mecha(repeat):
    import sd_mecha
    from safetensors.torch import save_file
    from sd_mecha.extensions.builtin.merge_methods import linear

    from pymerge.integrations import sd_mecha as ours

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(4)]
        for file, tensors in zip(files, checkpoints(3), strict=True):
            save_file(tensors, file)
        base, *models = (sd_mecha.model(file) for file in files)

        def ties(**options):
            deltas = [linear.subtract(model, base) for model in models]
            return linear.add_difference(base, sd_mecha.ties_sum(*deltas, **options), alpha=1.0)

        recipes = {
            "weighted_sum": lambda: sd_mecha.weighted_sum(base, models[0], alpha=0.3),
            "n_average": lambda: sd_mecha.n_average(*models),
            "slerp": lambda: sd_mecha.slerp(base, models[0], alpha=0.3),
            "ties": lambda: ties(k=0.2),
            "ties_vote_sgn": lambda: ties(k=0.2, vote_sgn=True),
        }

        def own(recipe):
            ours.uninstall()
            return recipe()

        def swapped(recipe):
            ours.install()
            return recipe()

        def cases(recipe):
            for prepare in (own, swapped):
                yield lambda prepare=prepare: prepare(recipe), sd_mecha.merge

        found = in_turns({case: list(cases(each)) for case, each in recipes.items()}, repeat)
        ours.uninstall()
        return found


def peft(repeat):
    import peft
    from torch import nn

    from pymerge.integrations import peft as ours

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    names = ["one", "two", "three"]
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["0", "1", "2", "3"])
    model = peft.get_peft_model(model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05
    given = {
        "linear": {},
        "ties": {"density": 0.2},
        "dare_ties": {"density": 0.2},
        "svd": {},
        "ties_svd": {"density": 0.2},
        "magnitude_prune_svd": {"density": 0.2},
    }

    def fresh():
        if "sum" in model.peft_config:
            model.delete_adapter("sum")

    def cases(kind, options):
        settings = {"combination_type": kind, **options}
        weights = [1.0, 0.5, 0.25]
        yield fresh, lambda _: model.add_weighted_adapter(names, weights, "sum", **settings)
        yield fresh, lambda _: ours.add_weighted_adapter(model, names, weights, "sum", **settings)

    return in_turns({kind: list(cases(kind, each)) for kind, each in given.items()}, repeat)


def main():
    host, out, repeat, threads = sys.argv[1:]
    # As many CPUs as threads, by which ours are counted.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    # What is left to the host would be timed as ours.
    warnings.simplefilter("error", HostWarning)
    rows = {"fusion_bench": fusion_bench, "sd_mecha": sd_mecha, "peft": peft}[host](int(repeat))
    version = importlib.metadata.version(host.replace("_", "-"))
    Path(out).write_text(json.dumps({"version": version, "rows": rows}))


if __name__ == "__main__":
    main()
