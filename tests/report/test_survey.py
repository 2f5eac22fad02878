"""The figures of a survey against float64 sums over whole tensors in numpy."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import pymerge
from pymerge.errors import CheckpointError, InterruptedMerge, PymergeError, RecipeError
from pymerge.report.tables import survey_data
from pymerge.surveys import survey


def floats(tensor):
    return tensor.float().numpy().ravel()


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def truth(out, base, experts):
    """The figures of docs/report.md of vectors, in float64 from float32 deltas."""
    written = floats(out)
    delta = (written - floats(base)).astype(np.float64)
    deltas = {k: (floats(e) - floats(base)).astype(np.float64) for k, e in experts.items()}
    whole, whole_base = written.astype(np.float64), floats(base).astype(np.float64)
    norms = {k: np.linalg.norm(d) for k, d in deltas.items()}
    signs = np.sign(list(deltas.values()))
    return {
        "norm": np.linalg.norm(whole),
        "norm_ratio": np.linalg.norm(whole) / np.linalg.norm(whole_base),
        "base_cosine": cosine(whole, whole_base),
        "delta_norm": np.linalg.norm(delta),
        "delta_ratio": np.linalg.norm(delta) / np.mean(list(norms.values())),
        "conflict_rate": np.mean((signs == 1).any(0) & (signs == -1).any(0)),
        "kept_share": np.mean(written != floats(base.to(out.dtype))),
        "cosines": {k: cosine(delta, d) for k, d in deltas.items()},
        "norms": norms,
    }


def close(figures, wanted, names):
    """Sums of a few thousand products of doubles: 1e-12 is generous."""
    for key, value in wanted.items():
        if key == "cosines":
            found = {k: figures.cosine(names[k]) for k in value}
        elif key == "norms":
            found = {k: figures.expert_norm(names[k]) for k in value}
        else:
            found = getattr(figures, key)
        assert found == pytest.approx(value, rel=1e-12, abs=1e-12), key


@pytest.fixture
def figures(merged):
    return survey(merged.out)


def names_of(merged):
    return {name: str(merged.folder / name) for name in ("code", "math")}


def test_every_tensor(merged, figures):
    out, base = merged.tensors("out"), merged.tensors("base")
    code, math = merged.tensors("code"), merged.tensors("math")
    assert {t.name for t in figures.tensors} == out.keys()
    for tensor in figures.tensors:
        name = tensor.name
        wanted = truth(out[name], base[name], {"code": code[name], "math": math[name]})
        close(tensor.figures, wanted, names_of(merged))
        assert tensor.figures.nonfinite == tensor.figures.inputs_nonfinite == 0
        assert 0.05 < tensor.figures.conflict_rate < 0.5


def joined(tensors, names):
    # Each keeps its own type: only the output's base is rounded, and all are of one type there.
    return torch.cat([tensors[name].ravel() for name in names])


@pytest.mark.parametrize("part", ["all", "model.layers.1", "mlp.up_proj.weight"])
def test_sums_are_those_of_the_joined_vectors(merged, figures, part):
    models = {name: merged.tensors(name) for name in ("out", "base", "code", "math")}
    if part == "all":
        found, names = figures.overall, list(models["out"])
    elif part.endswith("weight"):
        found, names = figures.modules[part], [n for n in models["out"] if n.endswith(part)]
    else:
        found, names = figures.layers[part], [n for n in models["out"] if f"{part}." in n]
    whole = {name: joined(tensors, names) for name, tensors in models.items()}
    experts = {name: whole[name] for name in ("code", "math")}
    close(found, truth(whole["out"], whole["base"], experts), names_of(merged))
    assert found.num_tensors == len(names)
    assert found.elements == whole["out"].numel()


def test_experts_among_themselves(merged, figures):
    base, code, math = (merged.tensors(name) for name in ("base", "code", "math"))
    a, b = (
        np.concatenate([floats(tuned[n]) - floats(base[n]) for n in base]).astype(np.float64)
        for tuned in (code, math)
    )
    found = figures.overall.products[figures.experts[0], figures.experts[1]].cosine
    assert found == pytest.approx(cosine(a, b), abs=1e-12)


def test_the_figures_do_not_depend_on_threads_or_memory(tmp_path, write):
    torch.manual_seed(1)
    shape = (700, 1501)  # several tiles of the smallest blocks, and no multiple of a span
    base = {"w": torch.randn(shape)}
    write(tmp_path / "base", base)
    for name in ("a", "b", "out"):
        write(tmp_path / name, {"w": base["w"] + 0.1 * torch.randn(shape)})
    given = {"base": str(tmp_path / "base"), "models": [str(tmp_path / n) for n in "ab"]}
    few = survey(tmp_path / "out", **given, threads=1, memory="136MiB")
    many = survey(tmp_path / "out", **given, threads=5, memory="2GiB")
    assert few == many
    experts = {n: _load(tmp_path / n) for n in "ab"}
    wanted = truth(_load(tmp_path / "out"), _load(tmp_path / "base"), experts)
    close(few.tensors[0].figures, wanted, {n: str(tmp_path / n) for n in "ab"})


def _load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["w"]


def test_three_experts_conflict_once(tmp_path, write):
    """Element by element, worked out by hand."""
    write(tmp_path / "base", {"w": torch.zeros(6)})
    steps = {
        "a": [1.0, 1.0, 0.0, -1.0, 0.0, float("nan")],
        "b": [-1.0, 2.0, 0.0, 0.0, 3.0, 1.0],
        "c": [1.0, 3.0, -0.0, 1.0, 0.0, -1.0],
    }
    for name, values in steps.items():
        write(tmp_path / name, {"w": torch.tensor(values)})
    write(tmp_path / "out", {"w": torch.tensor([0.0, 2.0, 0.0, -0.0, 1.0, float("inf")])})
    models = [str(tmp_path / name) for name in steps]
    found = survey(tmp_path / "out", base=str(tmp_path / "base"), models=models).overall
    assert found.conflict_rate == 3 / 6  # elements 0, 3 and 5; equal signs and zeros are none
    assert found.kept_share == 3 / 6  # -0.0 is 0.0
    assert (found.nonfinite, found.inputs_nonfinite) == (1, 1)
    assert found.norm is None  # no number measures an infinite vector
    assert found.cosine(models[0]) is None
    assert found.expert_norm(models[1]) == pytest.approx(np.sqrt(1 + 4 + 9 + 1))


def test_without_a_base_weights_are_compared(merged, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(merged.folder / name), "parameters": {"weight": 0.5}}
            for name in ("code", "math")
        ],
        "dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out")
    found = survey(tmp_path / "out")
    assert found.base is None
    code = merged.tensors("code")
    out = {t.name: t.figures for t in found.tensors}
    from safetensors.torch import load_file

    for name, written in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = cosine(floats(written).astype(float), floats(code[name]).astype(float))
        assert out[name].cosine(found.experts[0]) == pytest.approx(wanted, abs=1e-12)
    assert found.overall.conflict_rate is None
    # A base can be given: then the figures are those of a merge that had it.
    against = survey(tmp_path / "out", base=str(merged.folder / "base"))
    assert against.base is not None
    assert against.overall.conflict_rate == survey(merged.out).overall.conflict_rate


def test_two_folders_of_any_origin(merged):
    """The reduced form finds what belongs together by names: here the same as the recipe."""
    models = [str(merged.folder / name) for name in ("code", "math")]
    base = str(merged.folder / "base")
    reduced = survey(merged.out, base=base, models=models, use_recipe=False)
    assert reduced.overall == survey(merged.out).overall
    assert reduced.method is None
    alone = survey(merged.folder / "code", base=base)
    assert alone.overall.delta_norm == reduced.overall.expert_norm(models[0])
    with pytest.raises(PymergeError, match="--base and --models"):
        survey(merged.folder / "code")


def test_an_adapter_is_put_on_as_in_the_merge(merged, tmp_path, write):
    """An expert that is base+adapter measures as the model that the adapter makes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    module = "model.layers.1.mlp.up_proj"
    left, right = torch.randn(190, 4), torch.randn(4, 24)
    save_file(
        {
            f"base_model.model.{module}.lora_A.weight": right,
            f"base_model.model.{module}.lora_B.weight": left,
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = str(merged.folder / "base")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": f"{base}+{folder}", "parameters": {"weight": 0.5}},
            {"model": str(merged.folder / "code"), "parameters": {"weight": 0.5}},
        ],
        "dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out")
    found = {t.name: t.figures for t in survey(tmp_path / "out").tensors}[f"{module}.weight"]
    expert = merged.tensors("base")[f"{module}.weight"].float() + 0.5 * (left @ right)
    out = load_file(tmp_path / "out" / "model.safetensors")[f"{module}.weight"]
    code = merged.tensors("code")[f"{module}.weight"]
    wanted = truth(out, merged.tensors("base")[f"{module}.weight"], {"lora": expert, "code": code})
    names = {"lora": f"{base}+{folder}", "code": str(merged.folder / "code")}
    for key in ("delta_norm", "conflict_rate"):
        assert getattr(found, key) == pytest.approx(wanted[key], rel=1e-6)
    for key, name in names.items():
        assert found.cosine(name) == pytest.approx(wanted["cosines"][key], abs=1e-6)


def test_inputs_that_moved_or_changed(merged, tmp_path):
    for name in ("base", "code", "math", "out"):
        shutil.copytree(merged.folder / name, tmp_path / name)
    text = (tmp_path / "out" / "pymerge_manifest.json").read_text()
    text = text.replace(f"{merged.folder}/", "/gone/")
    (tmp_path / "out" / "pymerge_manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="--base and --models"):
        survey(tmp_path / "out")
    where = {
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / n) for n in ("code", "math")],
    }
    found = survey(tmp_path / "out", **where)
    assert found.warnings == ()
    before = survey(merged.out)
    assert [t.figures.conflicts for t in found.tensors] == [
        t.figures.conflicts for t in before.tensors
    ]
    assert found.overall.base_cosine == before.overall.base_cosine
    with pytest.raises(PymergeError, match="expected one for each of the recipe's 2 models"):
        survey(tmp_path / "out", base=where["base"], models=where["models"][:1])
    shutil.copytree(merged.folder / "out", tmp_path / "strange")
    strange = survey(tmp_path / "out", base=where["base"], models=[str(tmp_path / "strange")] * 2)
    assert any("is not what was merged" in sentence for sentence in strange.warnings)


def test_a_recipe_of_another_model_is_refused(merged, tmp_path, write):
    tensors = merged.tensors("out")
    del tensors["model.norm.weight"]
    write(tmp_path / "other", tensors)
    with pytest.raises(CheckpointError, match=r"expected tensor 'model\.norm\.weight'"):
        survey(tmp_path / "other", recipe=merged.recipe)


def test_numbers_that_are_no_floats_are_listed_without_figures(tmp_path, write):
    for name in ("base", "out"):
        write(tmp_path / name, {"w": torch.ones(4), "positions": torch.arange(4)})
    found = survey(tmp_path / "out", base=str(tmp_path / "base"))
    figures = {t.name: t.figures for t in found.tensors}
    assert figures["positions"] is None
    assert figures["w"].kept_share == 0.0
    assert figures["w"].delta_norm == 0.0
    assert found.overall.num_tensors == 1


def test_packed_experts_that_are_merged_one_by_one_are_measured_one_by_one(tmp_path, write):
    torch.manual_seed(3)
    name = "model.layers.0.mlp.experts.down_proj"
    base = {name: torch.randn(4, 30, 20), "model.norm.weight": torch.randn(20)}
    write(tmp_path / "base", base)
    for expert in ("a", "b"):
        write(tmp_path / expert, {k: v + torch.randn(v.shape) for k, v in base.items()})
    models = [
        {"model": str(tmp_path / n), "parameters": {"weight": 0.5, "density": 0.4}} for n in "ab"
    ]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    pymerge.merge(recipe, tmp_path / "out")
    found = {t.name: t.figures for t in survey(tmp_path / "out").tensors if "experts" in t.name}
    from safetensors.torch import load_file

    whole = {
        n: load_file(tmp_path / n / "model.safetensors")[name] for n in ("out", "base", "a", "b")
    }
    assert len(found) == 4
    for number, figures in enumerate(found.values()):
        part = {key: tensor[number] for key, tensor in whole.items()}
        wanted = truth(part["out"], part["base"], {n: part[n] for n in "ab"})
        close(figures, wanted, {n: str(tmp_path / n) for n in "ab"})


def test_codes_with_scales_are_measured_as_the_weights_that_they_mean(tmp_path, write):
    torch.manual_seed(4)
    shape = (70, 50)
    weight = torch.randn(shape)
    scale = (weight.abs().amax(1, keepdim=True) / 448).float()
    codes = (weight / scale).to(torch.float8_e4m3fn)
    write(tmp_path / "base", {"a.weight": codes, "a.weight_scale": scale})
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    meant = codes.float() * scale
    write(tmp_path / "tuned", {"a.weight": (meant + 0.1 * torch.randn(shape)).bfloat16()})
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "tuned"), "parameters": {"weight": 0.5}}],
        "dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out")
    from safetensors.torch import load_file

    out = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")["a.weight"]
    (found,) = survey(tmp_path / "out").measured
    wanted = truth(out, meant, {"tuned": tuned})
    del wanted["conflict_rate"]
    close(found.figures, wanted, {"tuned": str(tmp_path / "tuned")})
    assert found.figures.conflict_rate is None  # one expert has nobody to disagree with
    explained = pymerge.explain(recipe)["a.weight"].inputs[0]
    assert explained.made == "codes times scales, of F8_E4M3 and F32"


def test_an_interruption_ends_it(merged):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(InterruptedMerge):
        survey(merged.out, progress=interrupt)


def test_the_command(merged, tmp_path, run_pymerge):
    files = ["--json", "figures.json", "--html", "page.html"]
    done = run_pymerge("report", str(merged.out), *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "figures.json").read_text())
    found = survey(merged.out)
    names = [tensor["name"] for tensor in data["tensors"]]
    assert names == [tensor.name for tensor in found.tensors]
    assert data["overall"]["conflict_rate"] == found.overall.conflict_rate
    layer = data["layers"]["model.layers.2"]
    assert layer["cosines"] == {e: found.layers["model.layers.2"].cosine(e) for e in found.experts}
    assert "model.layers.2" in done.stdout
    assert f"{100 * found.overall.conflict_rate:.3g} %" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    printed = run_pymerge("report", str(merged.out), "--json", "-", cwd=tmp_path)
    assert json.loads(printed.stdout) == data
    wrong = run_pymerge("report", str(merged.out), "--html", "no/such.html", cwd=tmp_path)
    assert wrong.returncode == 3
    assert "there is no folder" in wrong.stderr


def test_what_is_not_finite_is_null_in_json(tmp_path, write):
    for name in ("base", "out"):
        write(tmp_path / name, {"w": torch.tensor([1.0, float("inf")])})
    found = survey(tmp_path / "out", base=str(tmp_path / "base"))
    text = json.dumps(survey_data(found), allow_nan=False)
    (tensor,) = json.loads(text)["tensors"]
    assert tensor["norm"] is None
    assert tensor["nonfinite"] == tensor["inputs_nonfinite"] == 1


def documents(merged, method):
    base, code, math = (merged.folder / name for name in ("base", "code", "math"))
    density = ", density: 0.5" if method == "ties" else ""
    return f"""\
name: first
merge_method: {method}
base_model: {base}
models:
  - model: {code}
    parameters: {{weight: 0.5{density}}}
dtype: float32
---
merge_method: task_arithmetic
base_model: {base}
models:
  - model: first
    parameters: {{weight: 0.5}}
  - model: {math}
    parameters: {{weight: 0.5}}
dtype: float32
"""


def test_documents_that_build_on_one_another(merged, tmp_path):
    """The inner merge is made as it is read: it measures as the folder that it would be."""
    recipe = tmp_path / "documents.yml"
    recipe.write_text(documents(merged, "task_arithmetic"))
    pymerge.merge_documents(recipe, tmp_path / "out", intermediates=tmp_path / "kept")
    found = survey(tmp_path / "out", recipe=recipe)
    folders = [str(tmp_path / "kept" / "first"), str(merged.folder / "math")]
    apart = survey(
        tmp_path / "out", base=str(merged.folder / "base"), models=folders, use_recipe=False
    )
    for here, there in zip(found.experts, apart.experts, strict=True):
        assert found.overall.cosine(here) == apart.overall.cosine(there)
    assert found.overall.conflict_rate == apart.overall.conflict_rate
    tensor = pymerge.explain(recipe)["model.norm.weight"]
    assert tensor.inputs[1].made.startswith("merged by an earlier document")
    assert tensor.inputs[1].parameters[0].origin == "models[0].parameters.weight (line 13)"
    recipe.write_text(documents(merged, "ties"))
    with pytest.raises(RecipeError, match="keep its output"):
        survey(tmp_path / "out", recipe=recipe)
    recipe.write_text("a: [\n---\nb: 1\n")
    with pytest.raises(RecipeError, match=r"documents\.yml: not valid YAML"):
        pymerge.explain(recipe)


def test_a_merge_of_truncated_embeddings(tmp_path):
    """The recipe does not say that they were: the shapes do."""
    from safetensors.torch import save_file

    tensors = {}
    for name, rows in (("base", 40), ("expert", 43)):
        (tmp_path / name).mkdir()
        tensors[name] = torch.randn(rows, 8)
        save_file({"model.embed_tokens.weight": tensors[name]}, tmp_path / name / "m.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert"), "parameters": {"weight": 1.0}}],
    }
    plan = pymerge.plan(recipe, truncate_embeddings=True)
    pymerge.merge(plan, tmp_path / "out")
    found = survey(tmp_path / "out").overall
    assert found.elements == 40 * 8
    wanted = torch.linalg.vector_norm((tensors["expert"][:40] - tensors["base"]).double())
    assert found.delta_norm == pytest.approx(float(wanted), rel=1e-6)
