"""``pymerge-yaml``: mergekit-yaml's command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import pymerge

Finished = subprocess.CompletedProcess[str]


def run(*arguments: str, folder: Path, **environment: str) -> Finished:
    command = [sys.executable, "-m", "pymerge.commands.mergekit_yaml", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_output_is_that_of_merge_and_the_recipe_as_it_was(model_folder: Path) -> None:
    done = run("recipe.yml", "out", folder=model_folder)
    assert done.returncode == 0, done.stderr
    pymerge.merge(
        pymerge.load_recipe(
            (model_folder / "recipe.yml").read_text().replace("./", f"{model_folder}/")
        ),
        model_folder / "expected",
    )
    assert bytes_of(model_folder / "out") == bytes_of(model_folder / "expected")
    written = (model_folder / "out" / "mergekit_config.yml").read_bytes()
    assert written == (model_folder / "recipe.yml").read_bytes()
    assert pymerge.verify(model_folder / "out").ok
    again = run("recipe.yml", "out", folder=model_folder)
    assert again.returncode == 0
    assert "finished before, nothing to do" in again.stdout


def test_nothing_heavy_is_imported(model_folder: Path) -> None:
    script = (
        "import sys\n"
        "from pymerge.commands.mergekit_yaml import app\n"
        "app(['recipe.yml', 'out', '--quiet'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'tokenizers', 'huggingface_hub', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=model_folder, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert (model_folder / "out" / "model.safetensors").exists()


def test_options_without_meaning_are_accepted_and_say_so(model_folder: Path) -> None:
    given = ["--trust-remote-code", "--lora-merge-cache", "x", "--lora-merge-dtype", "float16"]
    given += ["--low-cpu-memory", "--read-to-gpu", "--multi-gpu", "--async-write"]
    given += ["--write-threads", "2", "--clone-tensors"]
    done = run("recipe.yml", "out", *given, folder=model_folder)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    for option in given:
        if option.startswith("--"):
            assert sum(f"{option} has no effect" in note for note in notes) == 1, option
    none = ["--no-low-cpu-memory", "--no-clone-tensors", "--no-quiet", "--no-cuda", "-j", "1"]
    done = run("recipe.yml", "out2", *none, "-v", "--device", "cpu", folder=model_folder)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stderr


def test_every_option_of_mergekit_yaml_is_there() -> None:
    """As ``mergekit-yaml --help`` of 0.1.5 lists them, each with its ``--no-`` form."""
    switches = ["allow-crimes", "unsafe-truncate-embeddings", "trust-remote-code", "quiet", "cuda"]
    switches += ["low-cpu-memory", "lazy-unpickle", "read-to-gpu", "multi-gpu", "async-write"]
    switches += ["copy-tokenizer", "clone-tensors", "write-model-card", "safe-serialization"]
    values = ["--transformers-cache", "--lora-merge-cache", "--lora-merge-dtype", "--random-seed"]
    values += ["--device", "--num-threads", "--write-threads", "--out-shard-size", "-j"]
    import typer.main

    from pymerge.commands.mergekit_yaml import app

    command = typer.main.get_command(app)
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    wanted = {f"--{no}{name}" for name in switches for no in ("", "no-")}
    assert wanted | {*values, "--gpu-rich", "-v"} <= found


def test_files_beside_the_weights_are_left_out_when_asked(model_folder: Path) -> None:
    (model_folder / "llama" / "tokenizer_config.json").write_text("{}")
    (model_folder / "llama" / "generation_config.json").write_text("{}")
    done = run("recipe.yml", "out", folder=model_folder)
    assert done.returncode == 0, done.stderr
    everything = {path.name for path in (model_folder / "out").iterdir()}
    assert {"README.md", "mergekit_config.yml", "tokenizer_config.json"} <= everything
    options = ["--no-copy-tokenizer", "--no-write-model-card"]
    done = run("recipe.yml", "bare", *options, folder=model_folder)
    assert done.returncode == 0, done.stderr
    left = {path.name for path in (model_folder / "bare").iterdir()}
    assert everything - left == {"README.md", "mergekit_config.yml", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("size", "num_files"),
    [("1K", 3), ("2000", 2), ("0", 1), ("1b", 1), ("1.5KiB", 2), ("0.01m", 1), ("0.0000015B", 2)],
)
def test_shard_sizes_are_decimal_bytes(model_folder: Path, size: str, num_files: int) -> None:
    """The tensors have 1024, 512, 512 and 32 bytes; a shard ends before it would exceed SIZE."""
    done = run("recipe.yml", "out", "--out-shard-size", size, folder=model_folder)
    assert done.returncode == 0, done.stderr
    assert len(list((model_folder / "out").glob("*.safetensors"))) == num_files


def test_a_seed_is_that_of_the_random_methods(model_folder: Path) -> None:
    recipe = (model_folder / "recipe.yml").read_text().replace("ties", "dare_ties")
    (model_folder / "recipe.yml").write_text(recipe)
    (model_folder / "seeded.yml").write_text(f"{recipe}parameters: {{seed: 7}}\n")
    for name, *arguments in (
        ("a", "recipe.yml", "--random-seed", "7"),
        ("b", "seeded.yml"),
        ("c", "recipe.yml", "--random-seed", "8"),
    ):
        done = run(arguments[0], name, *arguments[1:], folder=model_folder)
        assert done.returncode == 0, done.stderr
    a, b, c = (bytes_of(model_folder / name) for name in "abc")
    assert a == b != c


def test_different_architectures_need_a_word(model_folder: Path) -> None:
    config = model_folder / "llama-finance" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "architectures": ["MistralForCausalLM"]}))
    other = model_folder / "llama" / "config.json"
    other.write_text(json.dumps({**settings, "architectures": ["LlamaForCausalLM"]}))
    done = run("recipe.yml", "out", folder=model_folder)
    assert done.returncode == 2
    assert "./llama: LlamaForCausalLM" in done.stderr
    assert "./llama-finance: MistralForCausalLM" in done.stderr
    assert "--allow-crimes" in done.stderr
    assert not (model_folder / "out").exists()
    assert run("recipe.yml", "out", "--allow-crimes", folder=model_folder).returncode == 0
    text = (model_folder / "recipe.yml").read_text()
    named = "{model: ./llama-finance, override_architecture: LlamaForCausalLM}"
    (model_folder / "recipe.yml").write_text(text.replace("./llama-finance", named))
    assert run("recipe.yml", "named", folder=model_folder).returncode == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--no-safe-serialization"], "pickles asked for, which are not written"),
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES=1"),
        (["--device", "mps"], "expected cpu, cuda or auto, found 'mps'"),
        (["--out-shard-size", "5Q"], "number with K, M or B"),
        (["--numerics", "mergkit"], "numerics"),
    ],
)
def test_what_cannot_be_done_is_said(model_folder: Path, options: list[str], sentence: str) -> None:
    done = run("recipe.yml", "out", *options, folder=model_folder)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (model_folder / "out").exists()


def test_a_tensor_that_a_model_lacks(model_folder: Path) -> None:
    file = model_folder / "llama-medicine" / "model.safetensors"
    tensors = load_file(file)
    name, _ = tensors.popitem()
    save_file(tensors, file)
    done = run("recipe.yml", "out", folder=model_folder)
    assert (done.returncode, "give --allow-missing" in done.stderr) == (2, True), done.stderr
    done = run("recipe.yml", "out", "--allow-missing", folder=model_folder)
    assert done.returncode == 0, done.stderr
    assert f"tensor '{name}' is not in ./llama-medicine: merged without" in done.stderr


def test_a_model_in_the_way_stays_unless_told(model_folder: Path) -> None:
    out = model_folder / "llama-medicine"
    before = bytes_of(out)
    (model_folder / "recipe.yml").write_text(
        "merge_method: passthrough\nmodels: [{model: ./llama-finance}]\n"
    )
    done = run("recipe.yml", "llama-medicine", folder=model_folder)
    assert done.returncode == 2
    assert "holds a model already" in done.stderr
    assert "--overwrite" in done.stderr
    assert bytes_of(out) == before
    done = run("recipe.yml", "llama-medicine", "--overwrite", folder=model_folder)
    assert done.returncode == 0, done.stderr
    assert load_file(out / "model.safetensors").keys()
    assert bytes_of(out) != before


def test_models_of_the_hub_come_from_the_named_cache(model_folder: Path) -> None:
    """``path@revision`` of a model that only the folder of --transformers-cache has."""
    repository = model_folder / "cache" / "models--org--finance"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("0123456789012345678901234567890123456789")
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.parent.mkdir()
    (model_folder / "llama-finance").rename(snapshot)
    text = (model_folder / "recipe.yml").read_text().replace("./llama-finance", "org/finance@v1")
    (model_folder / "recipe.yml").write_text(text)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(model_folder / "nothing")}
    cache = ["--transformers-cache", str(model_folder / "cache")]
    done = run("recipe.yml", "out", *cache, folder=model_folder, **offline)
    assert done.returncode == 0, done.stderr
    done = run("recipe.yml", "out2", folder=model_folder, **offline)
    assert done.returncode == 2
    assert "org/finance@v1" in done.stderr
