"""What of pymerge works on this machine, and why the rest does not.

Nothing heavy is imported: installed packages are asked for their version only.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from pymerge._version import __version__
from pymerge.machine import available_cpus, available_memory, cgroup_memory, total_memory
from pymerge.ops.device import devices_for
from pymerge.ops.dispatch import backend_module
from pymerge.sizes import format_size

_PACKAGES = ("numpy", "torch", "safetensors", "transformers", "huggingface_hub")

# What each instruction set of the kernels needs, in the words of /proc/cpuinfo.
_ISA_FLAGS = {
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma", "f16c"),
    "scalar": (),
}

# Long enough for a trial read, short enough for any disk.
_TRIAL_BYTES = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``note`` says why it is as it is, or nothing."""

    name: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Section:
    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Report:
    """Everything that was found. ``problems`` are what keeps pymerge from merging here."""

    sections: tuple[Section, ...]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """Plain text, one line per finding."""
        text: list[str] = []
        for section in self.sections:
            text.append(section.title)
            text.extend(f"  {finding}" for finding in section.findings)
        if self.problems:
            text.append("problems")
            text.extend(f"  {problem}" for problem in self.problems)
        return text


def examine(folder: Path | None = None) -> Report:
    """Look at the machine and at ``folder`` (default: the current directory); nothing is changed.

    One small temporary file is made in the folder and removed again; a folder where that fails is a
    problem in the report.
    """
    problems: list[str] = []
    extension, reason = _load_extension()
    if extension is None:
        problems.append(
            f"the extension pymerge._C cannot be imported: {reason}; build it with `make native`, "
            "or install pymerge again"
        )
    sections = (
        _software(extension, reason),
        _backends(extension, problems),
        _resources(),
        _storage(Path.cwd() if folder is None else folder, extension, problems),
    )
    return Report(sections, tuple(problems))


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("pymerge._C"), ""
    except ImportError as error:
        return None, str(error)


def _software(extension: ModuleType | None, reason: str) -> Section:
    findings = [
        Finding("pymerge", __version__),
        Finding("Python", platform.python_version(), sys.executable),
        Finding("platform", platform.platform()),
        Finding("extension", "not loaded", reason)
        if extension is None
        else Finding("extension", "loaded", str(extension.__file__)),
    ]
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, "not installed"))
    return Section("software", tuple(findings))


def _backends(extension: ModuleType | None, problems: list[str]) -> Section:
    findings: list[Finding] = []
    if extension is None:
        findings.append(Finding("cpu", "not available", "the extension is not loaded"))
    else:
        findings.extend(_instruction_sets(extension))
        if not extension.isa():
            problems.append(
                f"PYMERGE_ISA asks for {os.environ.get('PYMERGE_ISA')!r}, this machine and build "
                f"have {', '.join(extension.available_isas())}; name one of these or unset it"
            )
        findings.append(Finding("checksums", extension.crc32c_implementation()))
    findings.append(Finding("reference", "available", "plain numpy, the truth in tests; slow"))
    findings += _gpu_backends()
    return Section("backends", tuple(findings))


def _gpu_backends() -> list[Finding]:
    """Whether the backends for GPUs can run, on which devices, and why they cannot."""
    findings = []
    for name in ("cuda", "triton"):
        problem = backend_module(name).why_not()
        if problem is not None:
            findings.append(Finding(name, "not available", problem))
            continue
        for number, device in enumerate(devices_for(name)):
            memory = f"{format_size(device.free_memory)} of {format_size(device.total_memory)} free"
            findings.append(Finding(f"{name} {number}", device.name, memory))
    return findings


def _instruction_sets(extension: ModuleType) -> list[Finding]:
    chosen: str = extension.isa()
    available: tuple[str, ...] = tuple(extension.available_isas())
    asked = os.environ.get("PYMERGE_ISA")
    findings = [
        Finding(
            "cpu",
            chosen or "not available",
            f"PYMERGE_ISA asks for {asked!r}" if asked else "the best of this CPU and build",
        )
    ]
    flags = _cpu_flags()
    for name, needed in _ISA_FLAGS.items():
        if name == chosen:
            continue
        missing = [flag for flag in needed if flag not in flags]
        if name in available:
            note = "not chosen: " + (
                f"PYMERGE_ISA asks for {asked!r}" if asked else f"{chosen} is faster"
            )
            findings.append(Finding(f"cpu {name}", "available", note))
        elif missing:
            note = f"this CPU lacks {', '.join(missing)}"
            findings.append(Finding(f"cpu {name}", "not available", note))
        else:
            findings.append(Finding(f"cpu {name}", "not available", "not in this build"))
    return findings


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _resources() -> Section:
    limit = cgroup_memory()
    return Section(
        "resources",
        (
            Finding("threads", str(available_cpus()), f"the machine has {os.cpu_count()} CPUs"),
            Finding("memory", format_size(total_memory())),
            Finding("memory available", format_size(available_memory())),
            Finding("memory limit", "none")
            if limit is None
            else Finding("memory limit", format_size(limit.limit), f"cgroup {limit.folder}"),
        ),
    )


def _storage(folder: Path, extension: ModuleType | None, problems: list[str]) -> Section:
    findings = [Finding("folder", str(folder))]
    if extension is not None:
        try:
            findings += _look_at_folder(folder, extension)
        except OSError as error:
            problems.append(
                f"folder {folder}: a trial file cannot be written and read there: {error}; "
                "name a folder that exists and is writable"
            )
    return Section("storage", tuple(findings))


def _look_at_folder(folder: Path, extension: ModuleType) -> list[Finding]:
    """What the filesystem offers, tried on a temporary file in the folder."""
    findings = [
        Finding("filesystem", extension.filesystem(folder)),
        Finding("free", format_size(extension.free_bytes(folder))),
    ]
    with tempfile.TemporaryDirectory(prefix=".pymerge-doctor-", dir=folder) as scratch:
        trial = Path(scratch) / "trial"
        shard = extension.ShardFile(trial, _TRIAL_BYTES)
        try:
            shard.sync()
        finally:
            shard.close()
        if shard.preallocated:
            findings.append(Finding("fallocate", "works"))
        else:
            note = "blocks are not reserved, so a full disk shows only while writing"
            findings.append(Finding("fallocate", "not supported", note))
        method, reason = extension.probe_read_method(trial)
        findings.append(Finding("read method", method, reason))
        findings.append(_direct_reads(extension.direct_alignment(trial)))
    return findings


def _direct_reads(alignment: tuple[int, int] | None) -> Finding:
    if alignment is None:
        return Finding("O_DIRECT alignment", "not known", "the kernel or filesystem does not say")
    memory, offset = alignment
    if offset == 0:
        return Finding("O_DIRECT alignment", "none", "direct reads are not supported")
    return Finding("O_DIRECT alignment", f"{offset} bytes in the file, {memory} in memory")
