"""What a recipe may say of the tokenizer, and what is wrong with what it says."""

from __future__ import annotations

import jinja2
import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import ModelRef
from pymerge.recipe.chat_templates import TEMPLATES
from pymerge.recipe.tokenizer import TokenizerChoice, TokenSource

TWO = """
merge_method: linear
base_model: left
models:
  - {model: left, parameters: {weight: 1}}
  - {model: right, parameters: {weight: 1}}
"""
LEFT, RIGHT = ModelRef("left"), ModelRef("right")


def choice(load, text: str) -> TokenizerChoice:
    found = load(TWO + text).tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "source", "pad"),
    [
        ("tokenizer_source: base", "base", None),
        ("tokenizer_source: union", "union", None),
        ("tokenizer_source: right", RIGHT, None),
        ("tokenizer: {}", "union", None),
        ("tokenizer: {source: union, pad_to_multiple_of: 64}", "union", 64),
        ("tokenizer: {source: base, pad_to_multiple_of: 0}", "base", None),
        ("tokenizer: {source: {model: {path: right}}}", RIGHT, None),
    ],
)
def test_choices(load, text, source, pad):
    found = choice(load, text)
    assert (found.source, found.pad_to_multiple_of, found.tokens) == (source, pad, ())


def test_without_the_key_vocabularies_are_not_looked_at(load):
    assert load(TWO).tokenizer is None
    assert load(f"{TWO}tokenizer_source: null").tokenizer is None


def test_sources_of_tokens(load):
    rules = choice(
        load,
        """
tokenizer:
  tokens:
    <a>: {source: right, force: true}
    <b>: {source: {kind: model_token, model: left, token: hello}}
    <c>: {source: {kind: model_token, model: {model: {path: right}}, token_id: 7}}
    <d>: {source: {kind: zero}}
    <e>:
    <f>: {source: {model: left}}
""",
    ).tokens
    assert [(rule.token, rule.source, rule.force) for rule in rules] == [
        ("<a>", TokenSource(RIGHT), True),
        ("<b>", TokenSource(LEFT, token="hello"), False),
        ("<c>", TokenSource(RIGHT, token_id=7), False),
        ("<d>", TokenSource(None), False),
        ("<e>", None, False),
        ("<f>", TokenSource(LEFT), False),
    ]
    assert rules[0].place.startswith("tokenizer.tokens.<a> (line ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tokens: {<x>: {source: {kind: zeros}}}", r"unknown kind 'zeros'; did you mean 'zero'"),
        ("tokens: {<x>: {source: {kind: zero, token: a}}}", r"'token' has no meaning with kind"),
        ("tokens: {<x>: {source: {kind: model_token, token: a}}}", "needs a model"),
        ("tokens: {<x>: {source: {kind: model_token, model: left}}}", "token_id, found neither"),
        (
            "tokens: {<x>: {source: {kind: model_token, model: left, token: a, token_id: 1}}}",
            "token_id, found both",
        ),
        (
            "tokens: {<x>: {source: {kind: model_token, model: left, token_id: -1}}}",
            "from 0 on, found -1",
        ),
        ("tokens: {<x>: {source: {kind: model_token, model: left, token: 3}}}", "found 3"),
        ("tokens: {<x>: {source: [left]}}", r"expected a model, .* found \['left'\]"),
        ("tokens: {<x>: {source: {model: left, lorra: b}}}", "'lorra' has no meaning"),
        ("tokens: {<x>: {force: true}}", r"tokens\.<x> .*force needs a source"),
        ("tokens: {<x>: {force: 1}}", r"tokens\.<x>\.force"),
        ("tokens: {<x>: {sorce: left}}", r"tokens\.<x>\.sorce .* did you mean 'source'"),
        ("tokens: {<x>: {source: other}}", r"<x>\.source .* other is none of .*left, right"),
        ("tokens: [a]", r"tokens .*expected a mapping"),
        ("pad_to_multiple_of: -8", "from 1 on, found -8"),
        ("pad_to_multiple_of: 2.5", r"pad_to_multiple_of .*expected a whole number"),
        ("source: ", "expected base, union or a model, found nothing"),
        ("soure: base", "did you mean 'source'"),
    ],
)
def test_what_is_wrong(load, text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load(f"{TWO}tokenizer: {{{text}}}")


def test_a_template_is_a_name_or_a_text(load):
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert load(f"{TWO}chat_template: auto").chat_template == "auto"
    assert load(f"{TWO}chat_template: chatml").chat_template == TEMPLATES["chatml"]
    assert load({**_mapping(), "chat_template": text}).chat_template == text
    assert load(TWO).chat_template is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("a text without any braces at all", "no chat template"),
        ("{{ x }}", "at least 20 characters"),
        (7, "found 7"),
    ],
)
def test_what_is_no_template(load, value, sentence):
    with pytest.raises(RecipeError, match=f"chat_template.*{sentence}"):
        load({**_mapping(), "chat_template": value})


def _mapping() -> dict[str, object]:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("left", "right")]
    return {"merge_method": "linear", "models": models}


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
#: The published formats, written out.
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_give_their_format(name):
    # As transformers sets it up.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATES[name])
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert template.render(messages=CHAT, **values) == EXPECTED[name]
    without = template.render(messages=CHAT[:3], **{**values, "add_generation_prompt": False})
    assert EXPECTED[name].startswith(without.rstrip("\n"))
