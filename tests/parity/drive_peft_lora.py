"""What PEFT makes of adapters. Executed by the Python of an environment that has PEFT.

``drive_peft_lora.py make FOLDER``: small bases (llama, gpt2), a tuned model of each
(llama-tuned, gpt2-tuned), adapters of llama (one, two: rank 4; three: rank 2), and for each
combination of COMBINATIONS the updates of the combined adapter as FOLDER/NAME.safetensors.

``drive_peft_lora.py load BASE ADAPTER OUT``: the adapter merged into the base, as safetensors.
Fails where PEFT warns of keys that it misses or does not know.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from safetensors.torch import save_file

COMBINATIONS = {
    "svd": {"adapters": ["one", "two", "three"], "weights": [1.0, -0.5, 2.0], "svd_rank": 3},
    "cat": {"adapters": ["one", "two", "three"], "weights": [1.0, -0.5, 2.0]},
    "linear": {"adapters": ["one", "two"], "weights": [1.0, -0.5]},
    "ties": {"adapters": ["one", "two"], "weights": [1.0, 0.5], "density": 0.4},
    "magnitude_prune": {"adapters": ["one", "two"], "weights": [1.0, 0.5], "density": 0.4},
    "ties_svd": {
        "adapters": ["one", "three"],
        "weights": [1.0, 0.5],
        "density": 0.4,
        "svd_rank": 5,
    },
    "magnitude_prune_svd": {
        "adapters": ["one", "three"],
        "weights": [1.0, 0.5],
        "density": 0.4,
        "svd_rank": 5,
    },
}
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )


def gpt2():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    )


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def make(folder):
    torch.manual_seed(0)
    for name, build in (("llama", llama), ("gpt2", gpt2)):
        model = build()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.05)
        model.save_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape)
        model.save_pretrained(folder / f"{name}-tuned")
    for name, rank, options in (
        ("one", 4, {}),
        ("two", 4, {"use_rslora": True}),
        ("three", 2, {"lora_alpha": 5}),
    ):
        options = {"lora_alpha": 12, **options}
        config = peft.LoraConfig(r=rank, target_modules=TARGETS, **options)
        model = peft.get_peft_model(load(folder / "llama"), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape) * 0.05
        model.save_pretrained(folder / name)
    for method, options in COMBINATIONS.items():
        names = options["adapters"]
        model = peft.PeftModel.from_pretrained(load(folder / "llama"), folder / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, name)
        model.add_weighted_adapter(**options, adapter_name="sum", combination_type=method)
        updates = {}
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                updates[name] = module.get_delta_weight("sum").detach().contiguous()
        save_file(updates, folder / f"{method}.safetensors")


def merge(base, adapter, out):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(load(base), adapter)
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "missing" in text or "unexpected" in text], texts
    merged = model.merge_and_unload().state_dict()
    save_file({key: value.detach().contiguous().clone() for key, value in merged.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        merge(*map(Path, sys.argv[2:5]))
