"""A delayed package behaves as the package, and is executed when something in it is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from pymerge.integrations.delayed_import import delay


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
