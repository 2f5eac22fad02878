"""The model card: front matter that the hub accepts, and nothing of the machine in it."""

from __future__ import annotations

import yaml

from pymerge.methods.spec import MethodSpec
from pymerge.report.card import CardModel, model_card

METHOD = MethodSpec(
    "ties", "Trim, elect signs, merge.", "https://arxiv.org/abs/2306.01708", "required", 1, None
)
BASE = CardModel("owner/base@v2", "owner/base@v2")
LOCAL = CardModel("/home/someone/secret/tuned", None)
RECIPE = "merge_method: ties\nmodels: []\n# ```\n"


def card(models, base=BASE, recipe=RECIPE):
    return model_card(
        title="Merged",
        method=METHOD,
        models=models,
        base=base,
        recipe=recipe,
        dtype="bfloat16",
        num_tensors=7,
    )


def front_matter(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_front_matter_names_hub_models_only():
    fields, _ = front_matter(
        card([LOCAL, CardModel("o/a", "o/a"), BASE, CardModel("o/a@x", "o/a@x")])
    )
    assert fields == {
        "library_name": "transformers",
        "tags": ["merge", "pymerge"],
        "base_model": ["owner/base", "o/a"],
    }
    fields, _ = front_matter(card([LOCAL], base=None))
    assert "base_model" not in fields


def test_body():
    text = card([LOCAL, BASE])
    _, body = front_matter(text)
    assert "/home" not in text
    assert "- `tuned` (a local folder)" in body
    assert "- [owner/base@v2](https://huggingface.co/owner/base) (base)" in body
    assert body.count("owner/base@v2") == 1
    assert "**ties**: Trim, elect signs, merge." in body
    assert "<https://arxiv.org/abs/2306.01708>" in body
    assert "2 models" in body
    assert "7 tensors" in body


def test_the_recipe_stands_in_a_fence_it_cannot_close():
    _, body = front_matter(card([BASE]))
    assert f"````yaml\n{RECIPE.rstrip()}\n````" in body
