"""The model card: front matter that the hub accepts, and nothing of the machine in it."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.license import license_of
from pymerge.methods.spec import MethodSpec
from pymerge.report.card import CardModel, CardParameters, model_card

METHOD = MethodSpec(
    "ties", "Trim, elect signs, merge.", "https://arxiv.org/abs/2306.01708", "required", 1, None
)
BASE = CardModel("owner/base@v2", "owner/base@v2")
LOCAL = CardModel("/home/someone/secret/tuned", None)
RECIPE = "merge_method: ties\nmodels: []\n# ```\n"


def card(models, base=BASE, recipe=RECIPE, parameters=()):
    return model_card(
        title="Merged",
        method=METHOD,
        models=models,
        base=base,
        recipe=recipe,
        dtype="bfloat16",
        num_tensors=7,
        parameters=parameters,
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
        "base_model_relation": "merge",
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


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "apache-2.0"), None),
        (("mit", None), None),
        ((None, None), None),
    ],
)
def test_a_license_stands_where_all_agree(licenses, expected):
    base, other = (CardModel(f"o/{i}", f"o/{i}", each) for i, each in enumerate(licenses))
    fields, _ = front_matter(card([other], base=base))
    assert fields.get("license") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Hello", "apache-2.0"),
        ("---\r\ntags: [a]\r\nlicense: mit\r\n---", "mit"),
        ("---\nlicense: other\nlicense_name: mine\n---\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: |\n  mit\n  tags: bad\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None),
        ("---\n: : [\n---\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_the_license_of_a_model_is_that_of_its_card(tmp_path, text, expected):
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert license_of(open_checkpoint(str(tmp_path))) == expected


HOSTILE = [
    "a`b](javascript:alert(1))<script>x</script>",
    "x|y``z",
    "two\nlines\n# heading",
    "[a](b) ![c](d) **e** &lt;",
]


def rendered(body):
    """The tokens that a Markdown parser makes of the card, those in lines among them."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(body)
    return [*tokens, *(child for token in tokens for child in token.children or ())]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_names(name):
    """Whatever a folder or a value is called, a reader sees the name and nothing else."""
    parameters = [
        CardParameters(None, {"preset": name}),
        CardParameters(name, {"weight": "0.5", "mode": name}),
    ]
    plain = card([CardModel("tuned", None)], parameters=[])
    text = card([CardModel(name, None)], base=BASE, parameters=parameters)
    _, body = front_matter(text)
    tokens = rendered(body)
    assert not any(token.type in ("html_block", "html_inline", "image") for token in tokens)
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert sorted(links) == [
        "https://arxiv.org/abs/2306.01708",
        "https://huggingface.co/owner/base",
    ]
    headings = [token for token in tokens if token.type == "heading_open"]
    assert len(headings) == 1 + plain.count("\n## ") + 1  # one more: the parameters'
    shown = "".join(each if each.isprintable() else " " for each in name)
    last = shown.rpartition("/")[2] if "/" in shown else shown
    codes = [token.content for token in tokens if token.type == "code_inline"]
    assert codes.count(last) == 2  # in the list and in the table
    cells = [token.content for token in tokens if token.type == "inline"]
    assert sum("weight" in cell for cell in cells) >= 1
    texts = [
        "".join(child.content for child in token.children or ())
        for token in tokens
        if token.type == "inline"
    ]
    assert texts.count(shown) == 2 + (last == shown)  # as the value of both parameters


def test_a_revision_is_no_markup():
    model = CardModel("o/a@x](javascript:1)", "o/a@x](javascript:1)")
    fields, body = front_matter(card([model], base=None))
    links = [t.attrs["href"] for t in rendered(body) if t.type == "link_open"]
    assert links[-1] == "https://huggingface.co/o/a"
    assert fields["base_model"] == ["o/a"]


def test_the_card_of_a_merge(tmp_path):
    """Licenses, values over the tensors and formats are those of the inputs and the recipe."""
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{i}.w": np.zeros(3, np.float32) for i in range(3)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": [0.25, 0.75]}}],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    pymerge.merge(recipe, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    fields, body = front_matter(text)
    assert fields["license"] == "mit"
    assert "| model | weight |\n| --- | --- |\n| `a` | 0.25 to 0.75 |\n" in body
    assert "| normalize | false |" in body
    assert "most of the bytes in BF16" in body
    assert str(tmp_path) not in text.partition("## Recipe")[0]
