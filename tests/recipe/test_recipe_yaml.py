"""The YAML reader against yaml.safe_load, and the mistakes that safe_load lets through."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pymerge.errors import RecipeError
from pymerge.recipe.yaml_tree import parse_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=12)
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(DOCUMENTS, st.sampled_from([None, True, False]))
def test_agrees_with_safe_load(document, flow):
    text = yaml.safe_dump(document, sort_keys=False, default_flow_style=flow)
    assert parse_yaml(text).data() == yaml.safe_load(text) == document


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: *x\nd: [*x, *x]",
        "base: &b {p: 1, q: 2}\nc:\n  <<: *b\n  q: 3",
        "x: &x {p: 1}\ny: &y {p: 2, q: 2}\nz: {<<: [*x, *y], r: 0}",
        "a: |\n  two\n  lines\nb: >\n  folded\n  text",
        "a: !!str 5\nb: !!float 3\nc: '5'\nd: 0x1F\ne: 1_000\nf: ~",
        "%YAML 1.1\n---\na: 1\n...\n",
    ],
)
def test_features_agree_with_safe_load(text):
    assert parse_yaml(text).data() == yaml.safe_load(text)


def test_keys_and_dates_stay_text():
    assert parse_yaml("on: 1\n5: 2\nd: 2024-01-02").data() == {"on": 1, "5": 2, "d": "2024-01-02"}


def test_lines():
    root = parse_yaml("a: 1\nb:\n  - c: 2\n  - d:\n\n      e: 3\n")
    assert root.line_of(("a",)) == 1
    assert root.line_of(("b",)) == 2
    assert root.line_of(("b", 1, "d")) == 4
    assert root.line_of(("b", 1, "d", "e")) == 6
    assert root.line_of(("b", 0, "missing", 3)) == 3
    assert root.prefix_of(("b", 0, "missing", 3)) == ("b", 0)


def bomb() -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    return "\n".join(lines)


def test_alias_bomb_is_read_in_linear_time():
    assert len(parse_yaml(bomb()).data()) == 40


def test_chained_aliases_do_not_get_round_the_depth():
    nest = "[" * 40 + "{}" + "]" * 40
    with pytest.raises(RecipeError, match="nested more than 64 levels"):
        parse_yaml(f"a: &a {nest.format('x')}\nb: {nest.format('*a')}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("a: 1\nb: {a: 1,\n  a: 2}", r"line 3: the key 'a' stands twice .* \(first on line 2\)"),
        ("a: 1\n---\nb: 1", "line 2: a second YAML document begins here"),
        ("a: b: c", "not valid YAML at line 1, column 5: mapping values are not allowed"),
        ("a:\n  - b\n c: 1", "not valid YAML at line 3, column 2"),
        ("ok: 1\na: \x01", "not valid YAML at line 2, column 4: special characters"),
        ('a: "\\U99999999"', "not valid YAML"),
        ("a: *b", r"line 1: found undefined alias|line 1: the alias \*b has no anchor"),
        ("a: &a [*a]", r"line 1: the alias \*a stands inside its own anchor"),
        ("[" * 100, "line 1: nested more than 64 levels deep"),
        ("? [a]\n: 1", "line 1: a key must be plain text"),
        ("a: &a x\n? *a\n: 1", "line 2: an alias cannot be a key"),
        ("a: !!python/object:os.system x", "line 1: the YAML tag .* is not supported"),
        ("a: !!set {x}", "line 1: the YAML tag .* is not supported"),
        ("a: !!binary aGk=", "line 1: the YAML tag .* is not supported"),
        ("a: !!int twelve", "line 1: 'twelve' reads as a YAML int but is not a usable one"),
        ("a: 0x" + "F" * 5000, "reads as a YAML int but is not a usable one"),
        ("a: " + "9" * 5000, "reads as a YAML int but is not a usable one"),
        ("a: " + ":".join(["59"] * 400), "reads as a YAML int but is not a usable one"),
        ("<<: 5", "line 1: << takes a mapping or a list of mappings"),
    ],
    ids=range(21),
)
def test_refused(text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse_yaml(text)
