"""Makes small random models, LoRA adapters of them, and what PEFT merges of both.

Executed by the Python of an environment that has PEFT: ``python drive_peft.py FOLDER CASES.json``,
where CASES maps a name to {"base": kind of base, "config": arguments of LoraConfig}. Writes
FOLDER/KIND, FOLDER/NAME and FOLDER/NAME-merged/model.safetensors.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from safetensors.torch import save_file

STANDARD_DEVIATION = 0.05


def llama(tied):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )


def gpt2():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    )


BASES = {
    "float32": lambda: llama(False),
    "bfloat16": lambda: llama(False).to(torch.bfloat16),
    "tied": lambda: llama(True),
    "gpt2": gpt2,
}


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind in dict.fromkeys(case["base"] for case in cases.values()):
        model = BASES[kind]()
        for parameter in model.parameters():
            parameter.data.normal_(0, STANDARD_DEVIATION)
        model.save_pretrained(folder / kind)
    for name, case in cases.items():
        base = folder / case["base"]
        model = peft.get_peft_model(load(base), peft.LoraConfig(**case["config"]))
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
            elif parameter.requires_grad:
                noise = torch.randn(parameter.shape) * STANDARD_DEVIATION
                parameter.data = noise.to(parameter.dtype)
        model.save_pretrained(folder / name)
        merged = peft.PeftModel.from_pretrained(load(base), folder / name).merge_and_unload()
        tensors = {key: t.detach().contiguous().clone() for key, t in merged.state_dict().items()}
        (folder / f"{name}-merged").mkdir()
        save_file(tensors, folder / f"{name}-merged" / "model.safetensors")


if __name__ == "__main__":
    main()
