"""Every recipe shown in the documentation loads without a warning."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_loads(load, text):
    assert load(text, strict=True).text == text


def test_the_shown_error_is_the_real_one(load):
    text = "merge_method: linear\n\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
    text += "  - model: b\n    parameters:\n      weigth: 1\n"
    shown = re.search(r"^recipe\.yml: (.*weigth.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    with pytest.raises(Exception, match="weigth") as caught:
        load(text)
    assert str(caught.value) == shown.group(1)
