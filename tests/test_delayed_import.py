"""A delayed package behaves as the package, and is executed when something in it is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from pymerge.integrations.delayed_import import deferred, delay, without


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that notes in ``ran`` that it was executed."""
    name = "delayed_sample"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import pathlib\n"
        "from delayed_sample.part import three\n"
        "(pathlib.Path(__file__).parent / 'ran').touch()\n"
        "__version__ = '1'\n"
        "four = three + 1\n"
    )
    (folder / "part.py").write_text("three = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[module]


def test_executed_when_used(package: str, tmp_path: Path) -> None:
    delay(package)
    sample = importlib.import_module(package)
    assert importlib.util.find_spec(package) is not None
    ran = tmp_path / package / "ran"
    assert not ran.exists()
    assert sample.four == 4
    assert ran.exists()
    assert (sample.__version__, sample.three) == ("1", 3)
    with pytest.raises(AttributeError):
        sample.five  # noqa: B018


def test_parts_can_be_imported_before(package: str) -> None:
    delay(package)
    assert importlib.import_module(f"{package}.part").three == 3
    assert importlib.import_module(package).four == 4


def test_a_package_that_fails_does_so_at_each_use(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "__init__.py").write_text("1 / 0\n")
    delay(package)
    sample = importlib.import_module(package)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            sample.four  # noqa: B018


def test_what_is_imported_or_missing_is_left_alone(package: str) -> None:
    before = importlib.import_module(package)
    delay(package)
    assert sys.modules[package] is before
    delay("no_such_package_anywhere")
    assert "no_such_package_anywhere" not in sys.modules


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a function and a class that notes in ``ran`` that it was executed."""
    name = "deferred_sample"
    (tmp_path / f"{name}.py").write_text(
        "import pathlib\n"
        "(pathlib.Path(__file__).parent / 'ran').touch()\n"
        "def double(number, *, plus=0):\n"
        "    return 2 * number + plus\n"
        "class Thing:\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_function_imports_its_module_when_it_is_called(module: str, tmp_path: Path) -> None:
    with deferred(module, "double"):
        double = importlib.import_module(module).double
    assert module not in sys.modules
    assert not (tmp_path / "ran").exists()
    assert double(4, plus=1) == 9
    assert (tmp_path / "ran").exists()
    assert double is not sys.modules[module].double


def test_other_names_import_the_module_at_once(module: str, tmp_path: Path) -> None:
    with deferred(module, "double"):
        thing = importlib.import_module(module).Thing
        assert (tmp_path / "ran").exists()
    assert isinstance(sys.modules[module].Thing(), thing)


def test_what_is_imported_already_stays(module: str) -> None:
    real = importlib.import_module(module)
    with deferred(module, "double"):
        assert sys.modules[module] is real


def test_a_class_in_annotations_is_not_asked_for(package: str) -> None:
    sample = importlib.import_module(package)
    with without(sample, "Missing"):
        assert sample.Missing.__name__ == "Missing"
    assert not hasattr(sample, "Missing")
    with without(sample, "four"):
        assert sample.four == 4
    assert sample.four == 4
