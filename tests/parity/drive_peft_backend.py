"""PEFT's add_weighted_adapter beside ours on one live model. Executed by the Python of an
environment that has PEFT and pymerge: ``python drive_peft_backend.py REPORT.json``.

For each of CASES the largest difference between the updates of both adapters, as a share of the
largest element of PEFT's, and what was warned of; beside it what the tests of single properties
need.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers

import pymerge
from pymerge.errors import PymergeError
from pymerge.integrations import peft as ours
from pymerge.integrations.hosts import HostWarning
from pymerge.integrations.peft_modules import MATRICES

LORA = peft.tuners.lora.LoraLayer
PAIR, TRIPLE = ["one", "two"], ["one", "two", "three"]
CASES = {
    "svd": (TRIPLE, {"svd_rank": 3}),
    "svd_clamp": (TRIPLE, {"svd_rank": 3, "svd_clamp": 0.97}),
    "linear": (PAIR, {}),
    "cat": (TRIPLE, {}),
    "ties": (PAIR, {"density": 0.4}),
    "ties_frequency": (PAIR, {"density": 0.4, "majority_sign_method": "frequency"}),
    "magnitude_prune": (PAIR, {"density": 0.4}),
    "ties_svd": (TRIPLE, {"density": 0.4, "svd_rank": 5}),
    "ties_frequency_svd": (TRIPLE, {"density": 0.4, "majority_sign_method": "frequency"}),
    "magnitude_prune_svd": (TRIPLE, {"density": 0.4}),
    # without a draw: what is left of DARE is its way to combine
    "dare_linear": (PAIR, {"density": 1.0}),
    "dare_ties": (PAIR, {"density": 1.0}),
    "dare_linear_svd": (TRIPLE, {"density": 1.0}),
    "dare_ties_svd": (TRIPLE, {"density": 1.0}),
}
WEIGHTS = [1.0, -0.5, 2.0]


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return with_adapters(
        transformers.LlamaForCausalLM(config).to(dtype), ["q_proj", "down_proj", "embed_tokens"]
    )


def gpt2():
    torch.manual_seed(0)
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    )
    return with_adapters(model, ["c_attn", "c_proj"])


def convolutions():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.Conv2d(8, 5, 1))
    return with_adapters(model, ["0", "1"])


def with_adapters(model, targets):
    def config(rank, alpha, **more):
        return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)

    model = peft.get_peft_model(model, config(4, 12), "one")
    model.add_adapter("two", config(4, 8, use_rslora=True))
    model.add_adapter("three", config(2, 5))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(parameter.dtype)
    return model


def updates(model, adapter):
    return {
        name: module.get_delta_weight(adapter).detach().double()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LORA)
    }


def difference(found, expected):
    return max(
        float((found[name] - each).abs().max() / each.abs().max())
        for name, each in expected.items()
    )


def compared(model, name):
    adapters, options = CASES[name]
    kind = name.replace("_frequency", "").replace("_clamp", "")
    weights = WEIGHTS[: len(adapters)]
    model.add_weighted_adapter(adapters, weights, "theirs", kind, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.add_weighted_adapter(model, adapters, weights, "ours", kind, **options)
    found = {
        "difference": difference(updates(model, "ours"), updates(model, "theirs")),
        "warnings": [str(each.message) for each in caught if each.category is HostWarning],
        "dtypes": sorted({str(p.dtype) for n, p in model.named_parameters() if ".ours" in n}),
        "config": model.peft_config["ours"].to_dict() | {"target_modules": None}
        == model.peft_config["theirs"].to_dict() | {"target_modules": None},
    }
    model.delete_adapter("theirs")
    model.delete_adapter("ours")
    return found


def matrix_methods(model):
    """Each method on the factors against the same method on the products, in full rank."""
    found = {}
    adapters, weights = ["one", "three"], [1.0, 0.5]
    for method in MATRICES:
        options = {"density": 1.0} if method == "knots" else {}
        ours.add_weighted_adapter(model, adapters, weights, "ours", method, svd_rank=32, **options)
        has_weight = "weight" in pymerge.methods.METHODS[method].spec.parameters
        expected = {}
        each = [updates(model, adapter) for adapter in adapters]
        for name in each[0]:
            # PEFT gives the update of an embedding as [tokens, dimensions], its factors' transpose
            turned = [x[name].T if "embed" in name else x[name] for x in each]
            if not has_weight:
                turned = [x * w for x, w in zip(turned, weights, strict=True)]
            more = {"weight": weights} if has_weight else {}
            if "scope" in pymerge.methods.METHODS[method].spec.parameters:
                more["scope"] = "tensor"
            deltas = [x.float().contiguous() for x in turned]
            zeros = torch.zeros_like(deltas[0])
            merged = pymerge.merge_tensor(method, zeros, deltas, exclude="", **more, **options)
            expected[name] = (merged.T if "embed" in name else merged).double()
        found[method] = difference(updates(model, "ours"), expected)
        model.delete_adapter("ours")
    return found


def robust_merge(model):
    """Its formula for one module, with both adapters the same: twice trimmed A, mean B."""
    ours.add_weighted_adapter(model, ["one", "one"], [1.0, 1.0], "ours", "robust_merge")
    found = updates(model, "ours")
    model.delete_adapter("ours")
    return all(torch.isfinite(each).all() for each in found.values()) and len(found)


def seeds(model):
    def drawn(adapter, **options):
        ours.add_weighted_adapter(
            model, PAIR, [1.0, 1.0], adapter, "dare_linear", density=0.5, **options
        )
        found = updates(model, adapter)
        factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A[adapter].weight
        kept = float((factor != 0).float().mean())
        model.delete_adapter(adapter)
        return found, kept

    one, kept = drawn("a", seed=1)
    again, other = drawn("b", seed=1)[0], drawn("c", seed=2)[0]
    torch.manual_seed(5)
    first = drawn("d")[0]
    second = drawn("e")[0]
    torch.manual_seed(5)
    third = drawn("f")[0]
    return {
        "same seed": difference(one, again),
        "other seed": difference(one, other),
        "next draw": difference(first, second),
        "torch's seed": difference(first, third),
        "kept by one or both": kept,
    }


def installed(model):
    """PEFT's own method, before, while and after ours is installed: calls of the kernels."""
    calls = []
    import pymerge.integrations.peft_modules as modules

    plain = modules.merged
    modules.merged = lambda *args, **kwargs: calls.append(args[0]) or plain(*args, **kwargs)
    counts = []
    for step in (lambda: None, ours.install, ours.install, ours.uninstall):
        step()
        calls.clear()
        model.add_weighted_adapter(PAIR, [1.0, 0.5], "sum", "ties", density=0.4)
        model.delete_adapter("sum")
        counts.append(len(calls))
    modules.merged = plain
    return counts


def refusals(model):
    given = {
        "unknown type": {"combination_type": "tsv"},
        "no density": {"combination_type": "ties"},
        "parameter": {"combination_type": "linear", "lamda": 1.0},
        "model-wide": {"combination_type": "knots", "scope": "model"},
        "election": {
            "combination_type": "ties",
            "density": 0.5,
            "majority_sign_method": "plurality",
        },
        "weights": {"combination_type": "robust_merge"},
        "fewer weights": {"combination_type": "linear", "weights": [1.0]},
    }
    found = {}
    for name, options in given.items():
        try:
            weights = options.pop("weights", [1.0, 0.5])
            ours.add_weighted_adapter(model, ["one", "one"], weights, "sum", **options)
        except PymergeError as error:
            found[name] = str(error)
            if "sum" in model.peft_config:
                found[name] = "the adapter is there"
    try:
        ours.add_weighted_adapter(torch.nn.Linear(2, 2), ["one"], [1.0], "sum")
    except PymergeError as error:
        found["no adapters"] = str(error)
    return found


def main():
    torch.set_num_threads(1)
    models = {
        "llama": llama(),
        "bfloat16": llama(torch.bfloat16),
        "gpt2": gpt2(),
        "convolutions": convolutions(),
    }
    report = {
        name: {case: compared(model, case) for case in CASES} for name, model in models.items()
    }
    model = models["llama"]
    ours.add_weighted_adapter(model, ["two", "one"], [1.0, 1.0], "rslora", "linear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.add_weighted_adapter(model, ["two", "one"], [1.0, 1.0], "rs", "linear")
    report["rslora"] = [str(each.message) for each in caught if each.category is HostWarning]
    for name in ("rslora", "rs"):
        model.delete_adapter(name)
    report["matrices"] = matrix_methods(model)
    report["robust_merge"] = robust_merge(model)
    report["seeds"] = seeds(model)
    report["installed"] = installed(model)
    report["refusals"] = refusals(model)
    Path(sys.argv[1]).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
