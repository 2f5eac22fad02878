"""sd-mecha's merges beside ours. Executed by the Python of an environment that has sd-mecha and
pymerge: ``python drive_sd_mecha.py FOLDER``, which holds base, a, b, c.safetensors.

Writes FOLDER/theirs/CASE.safetensors and FOLDER/installed/CASE.safetensors for its own methods,
before and after ``install``; FOLDER/ours/METHOD.safetensors for those that ``register`` adds; and
FOLDER/report.json. add_difference_ties of sd-mecha 1.1.5 to 1.1.8 fails where its base is a model,
so it is put together of its parts here.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import sd_mecha
import torch
from safetensors.torch import load_file, save_file
from sd_mecha.extensions.builtin.merge_methods import linear

import pymerge
from pymerge.errors import PymergeError
from pymerge.integrations import sd_mecha as ours
from pymerge.integrations.hosts import HostWarning

SHAPED = ("a.weight", "b.weight", "a.bias", "scale")


def add(method, models, alpha=1.0, **options):
    base, *others = models
    deltas = [linear.subtract(model, base) for model in others]
    return linear.add_difference(base, method(*deltas, **options), alpha=alpha)


def cases(models):
    base, a = models[:2]
    extended, dropped = sd_mecha.ties_sum_extended, sd_mecha.ties_sum_with_dropout
    stock = {"k": 0.3, "apply_stock": True}
    return {
        "weighted_sum": sd_mecha.weighted_sum(base, a, alpha=0.3),
        "weighted_sum_more": sd_mecha.weighted_sum(base, a, alpha=0.8),
        "n_average": sd_mecha.n_average(*models),
        "slerp": sd_mecha.slerp(base, a, alpha=0.3),
        "slerp_of_one": sd_mecha.slerp(a, a, alpha=0.3),
        "ties": add(sd_mecha.ties_sum, models, 0.7, k=0.3),
        "ties_of_sums": add(sd_mecha.ties_sum, models, k=0.3, vote_sgn=True),
        "ties_all": add(sd_mecha.ties_sum, models, k=1.0),
        "ties_few": add(sd_mecha.ties_sum, models, k=0.001),
        "ties_extended": add(extended, models, vote_sgn=True, **stock),
        "ties_stock": add(extended, models, k=0.3, apply_stock=False),
        "ties_median": add(extended, models, k=0.3, apply_median=True),
        "dare": add(dropped, models, probability=0.5, seed=3, vote_sgn=True, **stock),
        "dare_count": add(dropped, models, probability=0.5, seed=3, **stock),
    }


def run(recipe):
    return sd_mecha.merge(recipe, output_dtype=torch.float32, tqdm=Quiet)


class Quiet:
    """A progress bar that shows nothing."""

    def __init__(self, *args, **kwargs):
        self.iterable = args[0] if args else ()

    def __iter__(self):
        return iter(self.iterable)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def save(folder, name, merged):
    folder.mkdir(exist_ok=True)
    tensors = {key: value.contiguous().clone() for key, value in merged.items() if key in SHAPED}
    save_file(tensors, folder / f"{name}.safetensors")


def main(folder):
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of recipes that hold tensors, which have no text
    files = [folder / f"{name}.safetensors" for name in ("base", *"abc")]
    models = [sd_mecha.model(load_file(file)) for file in files]
    recipes, report = cases(models), {"warnings": {}}
    for name, recipe in recipes.items():
        save(folder / "theirs", name, run(recipe))
    ours.install()
    ours.install()
    for name, recipe in recipes.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save(folder / "installed", name, run(recipe))
        report["warnings"][name] = [str(w.message) for w in caught if w.category is HostWarning]
    ours.uninstall()
    original = sd_mecha.ties_sum.__wrapped__.__module__
    report["uninstalled"] = original.startswith("sd_mecha")

    registered = ours.register()
    report["registered"] = sorted(registered)
    assert ours.register().keys() == registered.keys()
    for name, method in registered.items():
        spec = pymerge.methods.METHODS[name].spec
        given = models if spec.base == "required" else models[1:]
        if spec.max_models is not None:
            given = given[: spec.max_models + int(spec.base == "required")]
        options = {"t": 0.3} if "t" in spec.parameters else {}
        if "weight" in spec.parameters:
            options["weight"] = (
                "0.3, 0.4, 0.3" if len(given) > 2 + (spec.base == "required") else "0.4"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(folder / "ours", name, run(method(*given, **options)))

    paths = [sd_mecha.model(file) for file in files]
    text = sd_mecha.serialize(registered["wudi"](*paths, lambda_=0.5))
    report["text"] = text
    # sd-mecha writes this for models of no architecture that it knows, and does not read it back
    text = text.replace(' model_config="structural"', "")
    save(folder / "ours", "from_text", run(sd_mecha.deserialize(text)))
    report["refusals"] = {}
    for name, options in {
        "ties": {"trim_scope": "model", "weight": "1"},
        "linear": {"weight": "1, 2"},
    }.items():
        given = models if name == "ties" else models[1:]
        try:
            run(registered[name](*given, **options))
        except Exception as error:
            while error is not None and not isinstance(error, PymergeError):
                error = error.__cause__ or error.__context__
            report["refusals"][name] = str(error)
    (folder / "report.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
