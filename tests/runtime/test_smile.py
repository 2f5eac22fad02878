"""Models upscaled by smile, from files to outputs: against the experts themselves and a transcript
of the layer's formula in float64."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge import api
from pymerge.engine.journal import Journal, Record
from pymerge.errors import CheckpointError, PymergeError

transformers = pytest.importorskip("transformers")

HIDDEN, INTERMEDIATE, VOCABULARY = 32, 48, 61
CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
TOKENS = torch.arange(40).reshape(4, 10) * 7 % VOCABULARY


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, **changes})).eval()


def tuned(model: Any, folder: Path, seed: int, spread: float = 0.05) -> Path:
    """Save the model with its linear layers, biases and norms changed."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if "layers" in name and "down_proj" not in name:
            tensor += spread * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return folder


class Models:
    def __init__(self, folder: Path, num: int, dtype: torch.dtype) -> None:
        self.model = llama().to(dtype)
        self.base = folder / "base"
        self.model.save_pretrained(self.base)
        self.tuned = [tuned(self.model, folder / f"tuned-{i}", i + 1) for i in range(num)]

    def recipe(self, **parameters: Any) -> dict[str, Any]:
        return {
            "merge_method": "smile",
            "base_model": str(self.base),
            "models": [{"model": str(path)} for path in self.tuned],
            "parameters": parameters,
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base and three fine-tunes in float32, whose down projections are the base's."""
    return Models(tmp_path_factory.mktemp("smile"), 3, torch.float32)


def merge(recipe: dict[str, Any], out: Path, **options: Any) -> Path:
    pymerge.merge(recipe, out, **options)
    assert pymerge.verify(out).ok
    return out


def beside(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("tasks*.safetensors")):
        found |= load_file(path)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_one_expert_of_full_rank_is_the_model_itself(models: Models, tmp_path: Path) -> None:
    """But for the norms, which are the base's: they are put back first."""
    recipe = models.recipe(k=HIDDEN, svd="exact")
    recipe["models"] = recipe["models"][:1]
    out = merge(recipe, tmp_path / "out")
    upscaled = pymerge.load_smile(out)
    assert not upscaled.training
    expert = transformers.LlamaForCausalLM.from_pretrained(models.tuned[0]).eval()
    for module, wanted in zip(upscaled.modules(), llama().modules(), strict=False):
        assert module is not wanted
    for name, parameter in expert.named_parameters():
        if "norm" in name:
            parameter.data.copy_(upscaled.get_parameter(name))
    found, expected = logits(upscaled), logits(expert)
    base = logits(transformers.LlamaForCausalLM.from_pretrained(out))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (base - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("top_k", [1, 2])
def test_two_models_that_are_alike(models: Models, tmp_path: Path, top_k: int) -> None:
    """Wherever a token goes, the outputs are those of one."""
    recipe = models.recipe(k=8, top_k=top_k)
    once = {**recipe, "models": recipe["models"][:1]}
    shutil.copytree(models.tuned[0], tmp_path / "copy")
    twice = {**recipe, "models": [*once["models"], {"model": str(tmp_path / "copy")}]}
    expected = logits(pymerge.load_smile(merge(once, tmp_path / "once")))
    upscaled = pymerge.load_smile(merge(twice, tmp_path / "twice"))
    layer = upscaled.get_submodule("model.layers.0.mlp.up_proj")
    assert (layer.num_experts, layer.top_k) == (2, top_k)
    assert torch.equal(layer.up[0], layer.up[1])
    assert (logits(upscaled) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("k", [4, 64, 0])
def test_layers_are_their_formula(models: Models, tmp_path: Path, k: int, top_k: int) -> None:
    """Every upscaled layer of the loaded model, in float64 from the models' weights alone."""
    out = merge(models.recipe(k=k, gate_k=3, top_k=top_k, svd="exact"), tmp_path / "out")
    upscaled = pymerge.load_smile(out).double()
    base = load_file(models.base / "model.safetensors")
    tuned = [load_file(path / "model.safetensors") for path in models.tuned]
    described = json.loads((out / "smile.json").read_text())
    assert described["experts"] == [str(path) for path in models.tuned]
    assert len(described["modules"]) == 12
    assert described["unchanged"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    generator = np.random.default_rng(0)
    for name in described["modules"]:
        layer = upscaled.get_submodule(name)
        weight = base[f"{name}.weight"].double().numpy()
        bias = base.get(f"{name}.bias", torch.zeros(len(weight))).double().numpy()
        x = generator.normal(size=(2, 5, weight.shape[1]))
        deltas = [each[f"{name}.weight"].double().numpy() - weight for each in tuned]
        biases = [
            each[f"{name}.bias"].double().numpy() - bias if f"{name}.bias" in each else 0 * bias
            for each in tuned
        ]
        expected = formula(x.reshape(10, -1), weight, bias, deltas, biases, k, 3, top_k)
        with torch.no_grad():
            found = layer(torch.from_numpy(x)).numpy()
        assert found.shape == (2, 5, len(weight))
        # The base was subtracted, and the factors stored, in float32.
        assert np.abs(found.reshape(10, -1) - expected).max() < 1e-5, name
    for layer in range(2):
        kind = type(upscaled.get_submodule(f"model.layers.{layer}.mlp.down_proj"))
        assert kind is torch.nn.Linear


def formula(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    deltas: list[np.ndarray],
    biases: list[np.ndarray],
    k: int,
    gate_k: int,
    top_k: int,
) -> np.ndarray:
    decompositions = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    top = [right[:gate_k] for _, _, right in decompositions]
    router = np.stack([np.linalg.norm(x @ each.T, axis=1) for each in top], axis=1)
    shares = np.exp(router) / np.exp(router).sum(axis=1, keepdims=True)
    for row in shares:
        row[np.argsort(-row)[top_k:]] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    y = x @ weight.T + bias
    for i, (left, values, right) in enumerate(decompositions):
        kept = (left[:, :k] * values[:k]) @ right[:k] if k > 0 else deltas[i]
        y += shares[:, i : i + 1] * (x @ kept.T + biases[i])
    return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """The parts are rounded once, and the model runs in the folder's format."""
    models = Models(tmp_path, 2, dtype)
    out = merge(models.recipe(k=8, gate_k=2), tmp_path / "out")
    described = json.loads((out / "smile.json").read_text())["modules"]
    name = "model.layers.0.mlp.up_proj"
    assert described[name]["k"] == 8
    parts = beside(out)
    base = load_file(models.base / "model.safetensors")
    ulp = torch.finfo(dtype).eps
    for i, path in enumerate(models.tuned):
        delta = load_file(path / "model.safetensors")[f"{name}.weight"].double()
        delta -= base[f"{name}.weight"].double()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = (left[:, :8] * values[:8]) @ right[:8]
        up, down = (parts[f"{name}.weight.smile.{part}"][i] for part in ("up", "down"))
        assert up.dtype == down.dtype == dtype
        product = up.double() @ down.double()
        # Half a unit of rounding in each factor of a sum of 8 products.
        bound = ulp * (up.double().abs() @ down.double().abs()) + 1e-5 * values[0]
        assert torch.all((product - best).abs() <= bound)
    upscaled = pymerge.load_smile(out)
    found = logits(upscaled)
    assert found.dtype == dtype
    assert found.isfinite().all()
    layer = upscaled.get_submodule(name)
    assert layer.up.dtype == dtype
    assert layer(torch.zeros(0, 3, HIDDEN, dtype=dtype)).shape == (0, 3, INTERMEDIATE)


def test_a_module_that_is_given(models: Models, tmp_path: Path) -> None:
    """Its weights become the folder's, in its own dtype."""
    out = merge(models.recipe(k=8, others="mean"), tmp_path / "out")
    made = llama(initializer_range=1.0).double().train()
    assert pymerge.load_smile(out, made) is made
    assert made.training
    assert made.get_submodule("model.layers.0.mlp.up_proj").training
    found, expected = logits(made.eval()), logits(pymerge.load_smile(out))
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    state = pymerge.load_smile(out, device="cpu").state_dict()
    assert state["model.layers.1.self_attn.q_proj.up"].shape == (3, HIDDEN, 8)
    averaged = [load_file(p / "model.safetensors")["model.norm.weight"] for p in models.tuned]
    assert torch.allclose(state["model.norm.weight"], sum(averaged) / 3, atol=1e-6)
    norm = "model.layers.0.input_layernorm.weight"
    averaged = [load_file(p / "model.safetensors")[norm] for p in models.tuned]
    assert torch.allclose(state[norm], sum(averaged) / 3, atol=1e-6)
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(state[bias], load_file(models.base / "model.safetensors")[bias])


def test_training_reaches_every_part(models: Models, tmp_path: Path) -> None:
    out = merge(models.recipe(k=8, gate_k=2, top_k=2), tmp_path / "out")
    upscaled = pymerge.load_smile(out).train()
    upscaled(input_ids=TOKENS, labels=TOKENS).loss.backward()
    layer = upscaled.get_submodule("model.layers.0.self_attn.q_proj")
    for part in ("weight", "bias", "up", "down", "router", "bias_delta"):
        gradient = getattr(layer, part).grad
        assert gradient.isfinite().all(), part
        assert gradient.abs().sum() > 0, part


def test_the_layer_can_be_pickled(models: Models, tmp_path: Path) -> None:
    out = merge(models.recipe(k=4), tmp_path / "out")
    layer = pymerge.load_smile(out).get_submodule("model.layers.0.mlp.gate_proj")
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, HIDDEN)
    assert torch.equal(layer(x), again(x))
    assert "experts=3, top_k=1, k=4, gate_k=1" in repr(layer)


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    """Layers stored as [inputs, outputs]: one expert of full rank is the model itself."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=50, n_positions=16)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    expert = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    for name, parameter in expert.named_parameters():
        if ".h." in name and "ln_" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expert.save_pretrained(tmp_path / "expert")
    tokens = torch.arange(12).reshape(1, 12)
    for k in (24, 0):
        recipe = {
            "merge_method": "smile",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / "expert")}],
            "parameters": {"k": k, "svd": "exact"},
        }
        upscaled = pymerge.load_smile(merge(recipe, tmp_path / f"out-{k}"))
        with torch.no_grad():
            found, expected = upscaled(tokens).logits, expert(tokens).logits
            far = (base(tokens).logits - expected).abs().max()
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        assert far > 0.01 * expected.abs().max()


@contextmanager
def stopping_after(num_tensors: int) -> Iterator[None]:
    """Let the merge inside fail once so many tensors are in the journal."""
    add, left = Journal.add, [num_tensors]

    def counted(self: Journal, name: str, record: Record) -> None:
        if left[0] == 0:
            raise RuntimeError("unplugged")
        left[0] -= 1
        add(self, name, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(RuntimeError, match="unplugged"):
            yield


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_merge_that_was_stopped(models: Models, tmp_path: Path) -> None:
    """It never loads, and continues to the same bytes."""
    plan = api.plan(models.recipe(k=8), shard_size="20KB")
    whole = tmp_path / "whole"
    api.merge(plan, whole)
    assert len(list(whole.glob("tasks-*.safetensors"))) > 1
    out = tmp_path / "out"
    with stopping_after(9):
        api.merge(plan, out)
    for load in (pymerge.load_smile, lambda folder: pymerge.load_smile(folder, llama())):
        with pytest.raises(CheckpointError):
            load(out)
    assert api.merge(plan, out).num_resumed == 9
    assert contents(out) == contents(whole)
    assert api.merge(plan, out).done_before


def test_same_bytes_whatever_the_means(models: Models, tmp_path: Path) -> None:
    found = []
    for threads, memory in ((1, "1GiB"), (2, "500MiB"), (5, "1GiB")):
        out = tmp_path / f"{threads}"
        api.merge(api.plan(models.recipe(k=8), memory=memory, threads=threads), out)
        found.append({k: v for k, v in contents(out).items() if k != "pymerge_manifest.json"})
    assert found[0] == found[1] == found[2]


def test_the_folder_is_the_base(models: Models, tmp_path: Path, run_pymerge: Any) -> None:
    out = merge(models.recipe(k=8), tmp_path / "out")
    base = load_file(models.base / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    assert set(beside(out)) == {
        f"model.layers.{layer}.{name}.smile.{part}"
        for layer in range(2)
        for name, parts in {
            **{f"self_attn.{p}_proj.weight": ("up", "down", "router") for p in "qkvo"},
            **{f"self_attn.{p}_proj.bias": ("dense",) for p in "qkvo"},
            **{f"mlp.{p}_proj.weight": ("up", "down", "router") for p in ("gate", "up", "down")},
        }.items()
        for part in parts
    }
    card = (out / "README.md").read_text()
    assert "## Experts" in card
    assert "load_smile" in card
    assert "materialize" not in card
    done = run_pymerge("inspect", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experts beside 12 layers by smile" in done.stdout
    done = run_pymerge("materialize", str(out), "0", "dest", cwd=tmp_path)
    assert done.returncode == 2
    assert "load_smile" in done.stderr


def test_other_loaders_name_the_right_one(models: Models, tmp_path: Path) -> None:
    out = merge(models.recipe(k=8), tmp_path / "out")
    with pytest.raises(CheckpointError, match="load_smile"):
        pymerge.load_task(out, 0)
    recipe = {key: value for key, value in models.recipe().items() if key != "parameters"}
    tasks = merge({**recipe, "merge_method": "emr"}, tmp_path / "tasks")
    with pytest.raises(CheckpointError, match="load_task"):
        pymerge.load_smile(tasks)
    with pytest.raises(CheckpointError, match="one model, which loads as it is"):
        pymerge.load_smile(models.base)
    for folder, name in ((out, "smile.json"), (tasks, "tasks.json")):
        again = {"merge_method": "linear", "models": [{"model": str(folder)}]}
        plan = api.plan({**again, "parameters": {"weight": 1.0}})
        assert any("takes part as the base alone" in w and name in w for w in plan.warnings)


def test_models_that_do_not_fit(models: Models, tmp_path: Path) -> None:
    out = merge(models.recipe(k=8), tmp_path / "out")
    with pytest.raises(PymergeError, match=r"expected the model's .* to be a Linear"):
        pymerge.load_smile(out, torch.nn.Linear(2, 2))
    with pytest.raises(PymergeError, match=r"expected tensor 'lm_head\.weight'"):
        pymerge.load_smile(out, llama(vocab_size=VOCABULARY + 1))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(PymergeError, match="meta device"):
        pymerge.load_smile(out, empty)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["Nobody"]}))
    with pytest.raises(PymergeError, match="found \\['Nobody'\\]; give a torch module"):
        pymerge.load_smile(out)


def first(text: dict[str, Any]) -> dict[str, Any]:
    return next(iter(text["modules"].values()))


DAMAGES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "format": lambda out, text: text.update(format=2),
    "no experts": lambda out, text: text.update(experts=None),
    "a file outside": lambda out, text: text.update(files=["../tasks.safetensors"]),
    "no file": lambda out, text: (out / "tasks.safetensors").unlink(),
    "no such layer": lambda out, text: text["modules"].update(nobody=first(text)),
    "modules": lambda out, text: text.update(modules=[]),
    "an expert too many": lambda out, text: first(text).update(experts=[0, 1, 3]),
    "an expert twice": lambda out, text: first(text).update(experts=[0, 1, 1]),
    "fewer experts": lambda out, text: first(text).update(experts=[0, 1]),
    "k": lambda out, text: first(text).update(k=7),
    "gate_k": lambda out, text: first(text).update(gate_k=0),
    "top_k": lambda out, text: first(text).update(top_k=4),
    "transposed": lambda out, text: first(text).update(transposed=None),
    "biases": lambda out, text: first(text).update(biases=[0, 1]),
    "biases of nobody": lambda out, text: first(text).update(biases=[0, 1, 3]),
    "a layer": lambda out, text: text["modules"].update({next(iter(text["modules"])): 3}),
}


@pytest.fixture(scope="module")
def whole(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(models.recipe(k=8), tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_descriptions(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    text = json.loads((folder / "smile.json").read_text())
    DAMAGES[damage](folder, text)
    (folder / "smile.json").write_text(json.dumps(text))
    assert not pymerge.verify(folder).ok
    with pytest.raises(CheckpointError) as error:
        pymerge.load_smile(folder)
    assert str(folder) in str(error.value)


def test_a_model_without_a_tensor(models: Models, tmp_path: Path) -> None:
    """A layer has experts of those models that have it; of a bias, zeros for the others."""
    copy = tmp_path / "tuned-1"
    shutil.copytree(models.tuned[1], copy)
    weight, bias = (f"model.layers.0.self_attn.{x}" for x in ("k_proj.weight", "q_proj.bias"))
    tensors = load_file(copy / "model.safetensors")
    del tensors[weight], tensors[bias]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    recipe = models.recipe(k=0)
    recipe["models"][1]["model"] = str(copy)
    out = merge(recipe, tmp_path / "out", allow_missing=True)
    upscaled = pymerge.load_smile(out)
    layer = upscaled.get_submodule("model.layers.0.self_attn.k_proj")
    assert layer.num_experts == 2
    layer = upscaled.get_submodule("model.layers.0.self_attn.q_proj")
    base = load_file(models.base / "model.safetensors")[bias]
    expected = [load_file(path / "model.safetensors")[bias] - base for path in models.tuned]
    expected[1] = torch.zeros_like(base)
    assert torch.equal(layer.bias_delta, torch.stack(expected))
    layer = upscaled.get_submodule("model.layers.0.self_attn.k_proj")
    bias = "model.layers.0.self_attn.k_proj.bias"
    base = load_file(models.base / "model.safetensors")[bias]
    expected = [load_file(models.tuned[i] / "model.safetensors")[bias] - base for i in (0, 2)]
    assert torch.equal(layer.bias_delta, torch.stack(expected))
