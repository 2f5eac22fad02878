from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pymerge import _C, doctor
from pymerge.ops.dispatch import backend_module


def finding(report: doctor.Report, name: str) -> doctor.Finding:
    return next(f for section in report.sections for f in section.findings if f.name == name)


def test_what_is_told_agrees_with_the_parts(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path)
    assert report.problems == ()
    assert finding(report, "extension").value == "loaded"
    assert finding(report, "numpy").value == version("numpy")
    assert finding(report, "cpu").value == _C.isa()
    for name in ("avx512", "avx2", "scalar"):
        if name != _C.isa():
            told = finding(report, f"cpu {name}")
            assert told.value == ("available" if name in _C.available_isas() else "not available")
            assert told.note
    for name in ("cuda", "triton"):
        reason = backend_module(name).why_not()
        if reason is None:
            assert finding(report, f"{name} 0").note.endswith("free")
        else:
            assert finding(report, name).value == "not available"
            assert finding(report, name).note == reason
    assert finding(report, "filesystem").value == _C.filesystem(tmp_path)
    assert finding(report, "read method").value in ("dontcache", "direct", "buffered", "plain")
    assert list(tmp_path.iterdir()) == []


def test_lines_hold_every_finding(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path)
    lines = report.lines()
    assert all("\n" not in line for line in lines)
    assert len(lines) == sum(1 + len(section.findings) for section in report.sections)
    assert f"  folder: {tmp_path}" in lines


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path / "none")
    assert len(report.problems) == 1
    assert str(tmp_path / "none") in report.problems[0]
    assert report.lines()[-1].strip() == report.problems[0]


def test_a_missing_extension_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymerge._C", None)
    report = doctor.examine(tmp_path)
    assert finding(report, "extension").value == "not loaded"
    assert "pymerge._C" in finding(report, "extension").note
    assert finding(report, "cpu").value == "not available"
    assert "make native" in report.problems[0]


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package-here",))
    assert finding(doctor.examine(tmp_path), "no-such-package-here").value == "not installed"


def examine_elsewhere(tmp_path: Path, isa: str) -> str:
    script = "from pymerge.doctor import examine; print('\\n'.join(examine().lines()))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYMERGE_ISA": isa, "PATH": "", "PYTHONPATH": str(Path(_C.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_an_instruction_set_that_was_asked_for(tmp_path: Path) -> None:
    assert "cpu: scalar (PYMERGE_ISA asks for 'scalar')" in examine_elsewhere(tmp_path, "scalar")
    told = examine_elsewhere(tmp_path, "sse9")
    assert "PYMERGE_ISA asks for 'sse9', this machine and build have" in told


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, pymerge.doctor as d; d.examine(); "
        "print([m for m in ('torch', 'rich', 'typer', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
