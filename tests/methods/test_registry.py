"""The table of the methods says what the files register, and asking for little loads little."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pymerge.methods
from pymerge.errors import RecipeError
from pymerge.methods import METHODS, get_method, registry, specs
from pymerge.methods.protocol import Apply
from pymerge.methods.spec import MethodSpec
from pymerge.methods.table import MODULES

FOLDER = Path(pymerge.methods.__file__).parent


def registers(path: Path) -> bool:
    """Whether a file calls ``method``, as a decorator or otherwise."""
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "method" for call in calls)


def test_the_table_is_what_the_files_register():
    files = sorted(path.stem for path in FOLDER.glob("*.py") if registers(path))
    assert set(MODULES.values()) == set(files)
    for file in files:
        import_module(f"pymerge.methods.{file}")
    homes = {name: entry.merge.__module__ for name, entry in registry._METHODS.items()}
    ours = {name: home for name, home in homes.items() if home.startswith("pymerge.")}
    assert ours == {name: f"pymerge.methods.{file}" for name, file in MODULES.items()}
    assert list(MODULES) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_row_leads_to_its_method(name):
    found = METHODS[name]
    assert found.spec.name == name
    assert found.merge.__module__ == f"pymerge.methods.{MODULES[name]}"
    assert get_method(name) is found
    assert specs()[name] is found.spec


def test_the_mappings_hold_the_table_and_nothing_else():
    for mapping in (METHODS, specs()):
        assert list(mapping) == list(MODULES)
        assert len(mapping) == len(MODULES)
        assert "linear" in mapping
        assert "lineer" not in mapping
        assert mapping.get("lineer") is None
        with pytest.raises(KeyError):
            mapping["lineer"]


def ours_after(program: str) -> set[str]:
    """The modules of methods that are loaded after a program."""
    program += "\nimport sys\nprint()\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = "pymerge.methods."
    names = done.stdout.splitlines()[-1].split()
    return {name.removeprefix(start) for name in names if name.startswith(start)}


def test_a_name_imports_its_module_alone():
    program = (
        "from pymerge.methods import METHODS, get_method, specs\nlist(METHODS), len(specs())\n"
    )
    assert not ours_after(program) & set(MODULES.values())
    assert ours_after(program + "get_method('linear')") & set(MODULES.values()) == {"linear"}
    assert ours_after(program + "specs()['ramplus_tl']") & set(MODULES.values()) == {"ram"}


def test_the_nearest_name_is_found_without_a_module():
    program = (
        "from pymerge import RecipeError\nfrom pymerge.methods import get_method\n"
        "try:\n    get_method('lineer')\n"
        "except RecipeError as error:\n    assert \"did you mean 'linear'?\" in str(error)\n"
        "else:\n    raise SystemExit('no error')"
    )
    assert not ours_after(program) & set(MODULES.values())
    with pytest.raises(RecipeError, match=f"methods: {', '.join(sorted(MODULES))}"):
        get_method("lineer")


def spec_named(name: str) -> MethodSpec:
    return MethodSpec(name, "", "", "optional", 1, None)


def merge_nothing(tensor) -> Apply:
    return Apply(lambda tile, out: 0)


def test_a_name_of_the_table_cannot_be_taken():
    with pytest.raises(ValueError, match="'nearswap' is registered already"):
        registry.method(spec_named("nearswap"), ops=())(merge_nothing)
    assert METHODS["nearswap"].merge is import_module("pymerge.methods.nearswap").nearswap


def test_a_method_from_elsewhere_joins_the_table(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.method(spec_named("mine"), ops=())(merge_nothing)
    assert get_method("mine").merge is merge_nothing
    assert set(METHODS) == {*MODULES, "mine"}
    assert len(METHODS) == len(MODULES) + 1
    with pytest.raises(ValueError, match="'mine' is registered already"):
        registry.method(spec_named("mine"), ops=())(merge_nothing)
