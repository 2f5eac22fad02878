"""Documents that load, and what is said of those that do not."""

from pathlib import Path

import numpy as np
import pytest

import pymerge
from pymerge.errors import RecipeError
from pymerge.formats import BF16, F32
from pymerge.recipe import ModelRef

TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: left
    parameters:
      weight: 0.5
      density: [0.2, 0.8]
  - model: right@main
    parameters:
      weight: 1e-5
parameters:
  normalize: false
  int8_mask: true
dtype: torch.float32
out_dtype: bfloat16
"""


def test_a_whole_recipe(load):
    recipe = load(TIES)
    assert recipe.method == "ties"
    assert recipe.whole_models
    assert recipe.models == (ModelRef("base"), ModelRef("left"), ModelRef("right", "main"))
    assert recipe.donor == recipe.tokenizer_donor == ModelRef("base")
    assert (recipe.dtype, recipe.out_dtype) == (F32, BF16)
    assert recipe.text == TIES
    assert recipe.warnings == ()
    assert str(recipe.models[2]) == "right@main"


def test_sources_of_a_recipe_agree(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text("\ufeff" + TIES, encoding="utf-8")
    texts = {load("recipe.yml").text, load(Path("recipe.yml")).text, load(TIES).text}
    assert texts == {TIES}
    mapping = {
        "merge_method": "linear",
        "models": ({"model": Path("a"), "parameters": {"weight": np.float32(0.5)}},),
    }
    recipe = load(mapping)
    assert recipe.models == (ModelRef("a"),)
    assert load(recipe.text).models == recipe.models


def test_text_of_one_line_is_text(load):
    text = "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}"
    assert load(text).models == (ModelRef("a"),)


def test_model_references(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a+b@c").mkdir()
    recipe = load(
        {
            "merge_method": "linear",
            "models": [
                {"model": "a+b@c"},
                {"model": "hub/name@v1"},
                {"model": {"model": "hub/name@v2", "override_architecture": "Llama"}},
                {"model": {"model": {"path": "odd@path", "revision": "r"}}},
            ],
            "tokenizer_source": "hub/name@v1",
        }
    )
    assert recipe.models == (
        ModelRef("a+b@c"),
        ModelRef("hub/name", "v1"),
        ModelRef("hub/name", "v2", "Llama"),
        ModelRef("odd@path", "r"),
    )
    assert recipe.donor == ModelRef("a+b@c")
    assert recipe.tokenizer_donor == ModelRef("hub/name", "v1")


@pytest.mark.parametrize(
    ("line", "donor"),
    [
        ("tokenizer_source: base", ModelRef("base")),
        ("tokenizer: {source: base}", ModelRef("base")),
        ("tokenizer: {source: base, tokens: , pad_to_multiple_of: null}", ModelRef("base")),
        ("tokenizer_source: left", ModelRef("left")),
        ("tokenizer: {source: left}", ModelRef("left")),
        ("tokenizer: {source: other@v1}", ModelRef("other", "v1")),
        ("tokenizer: {source: {model: {path: other, revision: v1}}}", ModelRef("other", "v1")),
    ],
)
def test_whose_tokenizer(load, line, donor):
    assert load(f"{TIES}{line}\n").tokenizer_donor == donor


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        (
            "weight: 1e-5",
            "weigth: 1",
            [
                "models[2].parameters.weigth (line 11): unknown parameter 'weigth'",
                "did you mean 'weight'?",
                "density, int8_mask, lambda, normalize, trim_scope, weight",
            ],
        ),
        ("out_dtype", "outdtype", ["outdtype (line 16)", "did you mean 'out_dtype'?"]),
        ("base_model:", "base:", ["base (line 2)", "did you mean 'base_model'?"]),
        ("merge_method: ties", "merge-method: ties", ["merge-method (line 1)", "'merge_method'"]),
        ("merge_method: ties", "merge_method: teis", ["(line 1)", "'teis'", "'ties'", "linear"]),
        ("merge_method: ties\n", "", ["the top level (line 1)", "'merge_method' is required"]),
        ("  - model: base\n", "  - modle: base\n", ["models[0].modle (line 4)", "'model'"]),
        (
            "    parameters:\n      weight: 1e-5",
            "    weight: 1e-5",
            ["models[2].weight (line 10)", "belongs under 'parameters'"],
        ),
        (
            "  - model: base\n",
            "  - model: base\n    layer_range: [0, 2]\n",
            ["models[0].layer_range (line 5)", "belongs to slices[*].sources[*]"],
        ),
        (
            "dtype: torch",
            "desnity: 1\ndtype: torch",
            ["desnity (line 15)", "the parameter 'density', which belongs under"],
        ),
        ("normalize: false", "normalise: false", ["parameters.normalise", "'normalize'"]),
        ("normalize: false", "dtype: float32", ["parameters.dtype", "belongs to the top level"]),
        ("normalize: false", "normalize: maybe", ["(line 13)", "true or false, found 'maybe'"]),
        ("[0.2, 0.8]", "[0.2, 8]", ["models[1].parameters.density[1] (line 8)", "at most 1"]),
        ("out_dtype: bfloat16", "out_dtype: bloat16", ["'bloat16'; did you mean 'bfloat16'?"]),
        ("out_dtype: bfloat16", "out_dtype: int8", ["bfloat16, float16, float32, float64"]),
        ("model: left", "model: left+a+b", ["models[1].model", "several '+'"]),
        ("model: left", "model: left+", ["models[1].model", "one side of the '+' is empty"]),
        ("model: left", "model: left@a@b", ["models[1].model", "path@revision"]),
        ("model: left", "model: ''", ["models[1].model", "empty text"]),
        ("model: left", "model: 5", ["models[1].model (line 5)", "path or name", "found 5"]),
        ("model: left", "model: {model: left, lora: a@b@c}", ["model.lora", "path@revision"]),
        ("model: left", "model: {model: left, loar: x}", ["model.loar", "did you mean 'lora'"]),
        ("model: left", "model: {model: {path: a, revison: b}}", ["model.revison", "'revision'"]),
        ("model: left", "model: base", ["models[1] (line 5)", "already stands at models[0]"]),
        ("base_model: base\n", "", ["ties needs a base_model"]),
        ("parameters:\n  normal", "parameters: 5\nx:\n  normal", ["a mapping, found 5"]),
        ("models:\n", "models: 5\nx:\n", ["models (line 3): expected a list, found 5"]),
        (
            "models:\n",
            "slices: []\nx:\n",
            ["exactly one of models, modules, slices, found none of them"],
        ),
        (
            "models:\n",
            "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nmodels:\n",
            ["exactly one of models, modules, slices, found models and slices"],
        ),
    ],
    ids=lambda value: value[:20].strip() if isinstance(value, str) else "",
)
def test_mistakes(load, old, new, sentences):
    assert TIES.count(old) >= 1
    with pytest.raises(RecipeError) as caught:
        load(TIES.replace(old, new, 1))
    for sentence in sentences:
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("modules: {text: {}}", r"modules\.text .*: expected exactly one of models, slices"),
        ("modules: {text: {modells: []}}", r"modules\.text\.modells .* did you mean 'models'"),
        ("modules: [text]", "modules .*: expected a mapping, found"),
        ("tokenizer: base", r"tokenizer .*: expected a mapping, found 'base'"),
        ("tokenizer: {source: 7}", r"tokenizer\.source .*: expected base, union, or .* found 7"),
        (
            "tokenizer: {source: left}\ntokenizer_source: base",
            "at most one of tokenizer and tokenizer_source, found both",
        ),
        ("tokenizer: {sourse: base}", r"tokenizer\.sourse .* did you mean 'source'"),
        ("chat_template: left", "chat_template .*'left' is no chat template; expected auto"),
    ],
)
def test_refused_features(load, line, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load(TIES + line)
    key = line.partition(":")[0]
    assert load(f"{TIES}{key}:\n").method == "ties"


def test_all_mistakes_are_reported_at_once(load):
    text = TIES.replace("weight: 0.5", "wieght: 0.5").replace("normalize: f", "normalise: f")
    with pytest.raises(RecipeError, match="2 errors in the recipe") as caught:
        load(text)
    assert "wieght (line 7)" in str(caught.value)
    assert "normalise (line 13)" in str(caught.value)


def test_a_misspelt_key_is_not_also_missing(load):
    with pytest.raises(RecipeError) as caught:
        load(TIES.replace("merge_method", "merge_metod"))
    assert "required" not in str(caught.value)


def test_a_file_is_named(load, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text("merge_method: ties\nmodels: [")
    with pytest.raises(RecipeError, match=r"bad\.yml: not valid YAML at line 2, column 10"):
        load(path)
    path.write_text(TIES.replace("models", "modells"))
    with pytest.raises(RecipeError, match=r"bad\.yml: modells \(line 3\): .* 'models'"):
        load(str(path))
    path.write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match=r"bad\.yml: not a text file in UTF-8 \(byte 3 is 0xff\)"):
        load(path)


def test_missing_files(load, tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe file at 'nowhere/recipe\.yml'"):
        load("nowhere/recipe.yml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "dtype: torch",
            "comment: hello\ndtype: torch",
            "comment (line 15): unknown key 'comment'",
        ),
        ("lize: false", "lize: false\n  zzz: 1", "parameters.zzz (line 14): unknown parameter"),
        ("lize: false", "lize: false\n  gamma: 1", "parameters.gamma (line 14): gamma has no effe"),
        ("lize: false", "lize: false\n  scale: 1", "parameters.scale (line 14): scale has no effe"),
        ("weight: 0.5", "weight: 0.5\n      lambda: 2", "lambda has no effect under one model"),
        (
            "- model: base\n",
            "- model: base\n    parameters: {weight: 1}\n",
            "models[0].parameters.weight (line 5): weight has no effect on the base model of ties",
        ),
    ],
)
def test_warnings_are_errors_when_strict(load, old, new, sentence):
    text = TIES.replace(old, new)
    (warning,) = load(text).warnings
    assert sentence in warning
    with pytest.raises(RecipeError, match="an error in strict mode") as caught:
        load(text, strict=True)
    assert sentence in str(caught.value)


def test_a_known_recipe_is_clean_when_strict(load):
    assert load(TIES, strict=True).warnings == ()


def test_an_unknown_key_shared_by_alias_warns_twice(load):
    text = (
        "merge_method: linear\nshared: &s {zzz: 1}\n"
        "models:\n  - {model: a, <<: *s}\n  - {model: b, <<: *s}\nparameters: {weight: 1}"
    )
    warnings = load(text).warnings
    places = {warning.split(" ")[0] for warning in warnings}
    assert places == {"shared", "models[0].zzz", "models[1].zzz"}


def test_a_mapping_has_no_lines(load):
    with pytest.raises(RecipeError) as caught:
        load({"merge_method": "linear", "models": [{"model": "a", "wieght": 1}]})
    assert str(caught.value).startswith("models[0].wieght: the key 'wieght' has no meaning")


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"a": object()}, "a: expected text, .* found an object of type object"),
        ({1: "a"}, "the top level: the key 1 is not text"),
        ({"a": [{"b": 2**70}]}, r"a\[0\]\.b: the number is beyond"),
    ],
)
def test_mappings_that_yaml_cannot_hold(load, mapping, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load(mapping)


def test_a_mapping_within_itself(load):
    mapping = {}
    mapping["models"] = mapping
    with pytest.raises(RecipeError, match="nested more than 64 levels"):
        load(mapping)


SLICES = """\
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: left, layer_range: [2, 6]}
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "[2, 6]",
            "[2, 5]",
            r"slices\[0\] \(line 4\): .* equally many layers, found base 4, left 3",
        ),
        ("[2, 6]", "[6, 2]", r"layer_range \(line 6\): expected \[start, end\) .* found \[6, 2\]"),
        ("[2, 6]", "[-1, 3]", r"expected \[start, end\)"),
        ("[2, 6]", "[2, 4, 6]", "at most 2 elements, found 3"),
        ("[2, 6]", "[2, '6']", r"layer_range\[1\] \(line 6\): expected a whole number, found '6'"),
        (
            ", layer_range: [2, 6]",
            "",
            r"sources\[1\] \(line 6\): the key 'layer_range' is required",
        ),
        (
            "model: left",
            "model: base",
            r"sources\[1\] \(line 6\): the model base already stands at",
        ),
        ("{model: base", "{model: right", "the base model base is not among the sources"),
        ("base_model: base\n", "", r"slices\[0\] \(line 3\): ties needs a base_model"),
        ("      - {model: left, layer_range: [2, 6]}\n", "", "1 or more models besides the base"),
        ("slices:", "slices: [{sources: []}]\nx:", "expected at least 1 element, found 0"),
    ],
    ids=range(11),
)
def test_mistakes_in_slices(load, old, new, sentence):
    assert old in SLICES
    with pytest.raises(RecipeError, match=sentence):
        load(SLICES.replace(old, new))


def test_residual_weight_is_a_warning(load):
    (warning,) = load(SLICES + "    residual_weight: 0.5\n").warnings
    assert warning == (
        "slices[0].residual_weight (line 7): residual_weight has no effect, as in mergekit"
    )


def test_a_slice_has_its_own_base(load):
    recipe = load(SLICES.replace("{model: base", "{model: other") + "    base_model: other\n")
    assert recipe.slices[0].base == ModelRef("other")
    assert recipe.models == (ModelRef("base"), ModelRef("other"), ModelRef("left"))


def test_numbers_of_models(load):
    def blend(*models, **rest):
        return load(
            {
                "merge_method": "blend",
                "models": [{"model": model} for model in models],
                "parameters": {"weight": 1},
                **rest,
            }
        )

    assert blend("a", "b").slices[0].base is None
    assert blend("a", "b", base_model="c").slices[0].base == ModelRef("c")
    assert blend("a", "b", "c", base_model="c").slices[0].base == ModelRef("c")
    with pytest.raises(RecipeError, match="models: blend takes exactly 2 models, found 3"):
        blend("a", "b", "c")
    with pytest.raises(RecipeError, match="exactly 2 models besides the base, found 1"):
        blend("a", "b", base_model="b")
    with pytest.raises(RecipeError, match=r"exactly 1 model, found 2; base_model is an ordinary"):
        load({"merge_method": "passthrough", "models": [{"model": "a"}], "base_model": "b"})


def test_a_method_that_only_mergekit_has_is_called_so(load):
    with pytest.raises(RecipeError, match="'dare_ties' is a method of mergekit that this version"):
        load({"merge_method": "dare_ties", "models": [{"model": "a"}]})


def test_a_misspelling_that_another_method_has_for_a_name():
    """``lamda`` is a parameter of doge_ta."""
    recipe = {
        "merge_method": "iso_c",
        "base_model": "base",
        "models": [{"model": "tuned"}],
        "parameters": {"lamda": 0.5},
    }
    with pytest.raises(RecipeError, match="'lamda'; did you mean 'lambda'"):
        pymerge.load_recipe(recipe)
