"""The console blocks of the pages for users of other tools: each command runs.

A line that begins with ``$`` is a command and must succeed; other lines must be found in what the
commands before them print, up to a ``…`` at the end. The blocks of a page run in order, in one
folder with small models. A ``yaml`` block is a file there: its first line, ``# NAME``, names it.
Programs of other tools are looked for in their environments.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("from-mergekit.md", "backends.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
#: Environments that hold programs of other tools, by the variable that names another place.
HOSTS = {"PYMERGE_PEERS": ".venv-peers", "PYMERGE_FUSIONBENCH": ".venv-fusionbench"}
HOST_PROGRAMS = ("mergekit-", "fusion_bench", "fusionbench")
HIDDEN, VOCABULARY, LAYERS = 8, 16, 3

Tensors = dict[str, np.ndarray]


def llama_shapes(prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        name = f"{prefix}layers.{layer}."
        shapes |= {f"{name}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{name}mlp.{x}_proj.weight": (2 * HIDDEN, HIDDEN) for x in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        shapes[f"{name}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{name}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {f"{prefix}norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def vlm_shapes() -> dict[str, tuple[int, ...]]:
    shapes = llama_shapes("model.language_model.")
    for layer in range(2):
        shapes[f"model.vision_tower.encoder.layers.{layer}.mlp.fc1.weight"] = (HIDDEN, HIDDEN)
    names = ("linear_1.weight", "linear_2.weight")
    return shapes | {f"model.multi_modal_projector.{name}": (HIDDEN, HIDDEN) for name in names}


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
VLM = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": LLAMA,
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2},
    "dtype": "float32",
}


def write_models(folder: Path, names: tuple[str, ...], config: dict, shapes: dict) -> None:
    """Random float32 models, each near the first."""
    random = np.random.default_rng(5)
    base = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for number, model in enumerate(names):
        tensors = {
            name: value + np.float32(0.1 * number) * random.standard_normal(value.shape, np.float32)
            for name, value in base.items()
        }
        (folder / model).mkdir()
        save_file(tensors, folder / model / "model.safetensors", {"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path) -> None:
    random = np.random.default_rng(6)
    tensors: Tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = random.standard_normal((2, HIDDEN), np.float32)
        tensors[f"{name}.lora_B.weight"] = random.standard_normal((HIDDEN, 2), np.float32)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "./llama",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The models that the pages speak of."""
    write_models(tmp_path, ("llama", "llama-finance", "llama-medicine"), LLAMA, llama_shapes())
    write_models(tmp_path, ("vlm", "vlm-tuned"), VLM, vlm_shapes())
    write_adapter(tmp_path / "finance-adapter")
    return tmp_path


def search_path() -> str:
    """Where programs are looked for: ours first, then the hosts'."""
    hosts = [Path(os.environ.get(name, ROOT / place)) for name, place in HOSTS.items()]
    return os.pathsep.join(map(str, [Path(sys.executable).parent, *(h / "bin" for h in hosts)]))


def missing_programs(commands: list[str]) -> set[str]:
    """Programs of other tools that the commands name and that are not installed."""
    words = {word for command in commands for word in shlex.split(command)}
    return {
        word
        for word in words
        if word.startswith(HOST_PROGRAMS) and shutil.which(word, path=search_path()) is None
    }


def run_block(body: str, folder: Path) -> None:
    path = f"{search_path()}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    printed = ""
    for line in body.splitlines():
        if not line.startswith("$ "):
            assert line.removesuffix("…").strip() in printed, f"{line!r} is not in\n{printed}"
            continue
        done = subprocess.run(
            line.removeprefix("$ "),
            shell=True,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        printed = done.stdout + done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run(page: Path, folder: Path) -> None:
    skipped: set[str] = set()
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        named = re.match(r"# ([\w.-]+)\n", body)
        if language == "yaml":
            (folder / (named[1] if named else "recipe.yml")).write_text(body)
        elif language == "console":
            commands = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
            assert commands, body
            missing = missing_programs(commands)
            if missing:
                skipped |= missing
            else:
                run_block(body, folder)
    if skipped:
        pytest.skip(
            f"{', '.join(sorted(skipped))} not installed, so that the blocks that run them were "
            "left out: run `make bench-peers`"
        )
