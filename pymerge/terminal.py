"""What the commands print: a live progress bar on a terminal, plain lines into a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape

from pymerge.checkpoint import Checkpoint, ScaledTensor, TensorEntry, stored_entries
from pymerge.engine.events import Snapshot
from pymerge.engine.matrix_rates import MatrixRates, matrix_seconds
from pymerge.engine.rates import Rates, floor_seconds
from pymerge.engine.run import MergeReport
from pymerge.methods.spec import MethodSpec, ParameterSpec, value_text
from pymerge.plan import Plan
from pymerge.sizes import counted, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: A piped run prints a line this often.
LINE_SECONDS = 5.0

#: A smaller merge is over before its time says anything about the storage.
SMALL_BYTES = 100_000_000
#: Into a pipe a table is as wide as it needs to be, so that names can be searched for.
PIPE_WIDTH = 400


#: A longer default stands below the table of a method's parameters.
LONGEST_DEFAULT = 40


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=True)


_out = _console(sys.stdout)
_err = _console(sys.stderr)


def output_console() -> Console:
    """Where results are printed."""
    return _out


class Display:
    """Progress of a merge: percent, bytes a second, busiest stage, time left."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        if self._live:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[detail]}"),
                TimeElapsedColumn(),
                console=_err,
                transient=True,
            )
            self._task = self._bar.add_task("merging", total=1, detail="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, now: Snapshot) -> None:
        """Show one snapshot."""
        done, total = (
            now.bytes_read + now.bytes_written,
            now.bytes_read_total + now.bytes_written_total,
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=done,
                total=max(total, 1),
                description=now.phase,
                detail=_detail(now),
            )
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            percent = 100 * done / max(total, 1)
            print(f"{now.phase}: {percent:.0f} %, {_detail(now)}", file=sys.stderr, flush=True)


def _detail(now: Snapshot) -> str:
    done, total = now.bytes_read + now.bytes_written, now.bytes_read_total + now.bytes_written_total
    rate = done / now.seconds if now.seconds > 0 else 0.0
    left = f", {max(0.0, (total - done) / rate):.0f} s left" if rate > 0 else ""
    tensors = f"{now.tensors_done}/{now.tensors_total} tensors"
    return f"{tensors}, {format_size(rate)}/s, busiest: {now.busiest}{left}"


def print_warnings(warnings: Sequence[str]) -> None:
    """Warnings of a plan, to standard error."""
    for warning in warnings:
        _err.print(f"[yellow]warning:[/] {escape(warning)}")


def print_report(report: MergeReport) -> None:
    """The summary of a finished merge."""
    if report.done_before:
        _print_nonfinite(report)
        _out.print(
            f"[bold]{escape(str(report.out))}[/]: this merge was finished before, nothing to do; "
            "pymerge verify compares it with its checksums, --overwrite makes it anew"
        )
        return
    resumed = f" ({report.num_resumed} were done before)" if report.num_resumed else ""
    rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
    _out.print(
        f"[bold]{escape(str(report.out))}[/]: {counted(report.num_tensors, 'tensor')} merged by "
        f"{report.method}{resumed} in {report.seconds:.2f} s"
    )
    stages = ", ".join(
        f"{stage} {seconds:.2f} s" for stage, seconds in report.stage_seconds.items() if seconds
    )
    _out.print(
        f"  read {format_size(report.bytes_read)}, wrote "
        f"{format_size(report.bytes_written)}, together "
        f"{format_size(rate)}/s; thread time: {stages}"
    )
    _out.print(f"  peak memory {format_size(report.peak_memory)}{_floor_share(report)}")
    _print_nonfinite(report)


def _print_nonfinite(report: MergeReport) -> None:
    for name, count in report.nonfinite.items():
        text = counted(count, "non-finite element")
        _err.print(f"[yellow]warning:[/] {escape(name)}: {text}")


def _floor_share(report: MergeReport) -> str:
    if report.bytes_written < SMALL_BYTES:
        return ""
    if report.floor_fraction is None:
        return "; storage floor not measured (pymerge doctor --measure)"
    return f"; {report.floor_fraction:.2f} of the storage floor"


def matrix_summary(plan: Plan, rates: MatrixRates | None) -> dict[str, Any] | None:
    """What the matrices of a plan take, as plain data; None for a plan without."""
    jobs = [job for job in plan.jobs if job.cost.num_bytes]
    if not jobs:
        return None
    largest = max(jobs, key=lambda job: job.cost.num_bytes)
    return {
        "tensors": len(jobs),
        "largest": largest.name,
        "largest_bytes": largest.cost.num_bytes,
        "flops_float32": sum(job.cost.flops32 for job in jobs),
        "flops_float64": sum(job.cost.flops64 for job in jobs),
        "flops_eigen_float64": sum(job.cost.eigen64 for job in jobs),
        "seconds": None if rates is None else matrix_seconds(plan, rates),
        "rates": None if rates is None else dict(rates.__dict__),
    }


def plan_summary(
    plan: Plan, rates: Rates | None, matrix_rates: MatrixRates | None = None
) -> dict[str, Any]:
    """The plan as plain data; the floor is None where the storage could not be measured."""
    return {
        "method": plan.method.spec.name,
        "inputs": {
            name: {"files": len(ckpt.headers), "bytes": ckpt.total_bytes}
            for name, ckpt in plan.checkpoints.items()
        },
        "donor": plan.donor.reference,
        "tensors": {
            "merged": sum(jobs[0].kind == "merge" for jobs in plan.jobs_of_tensors.values()),
            "copied": sum(jobs[0].kind == "copy" for jobs in plan.jobs_of_tensors.values()),
            "matrices_of_experts": sum(job.piece is not None for job in plan.jobs),
            "streamed": [job.name for job in plan.streamed],
        },
        "shards": {shard.file_name: shard.num_bytes for shard in plan.shards},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": {
            "budget": plan.tiling.memory,
            "peak_estimate": plan.peak_memory,
            "block_bytes": plan.tiling.block_bytes,
            "num_blocks": plan.tiling.num_blocks,
        },
        "threads": plan.tiling.threads,
        "matrices": matrix_summary(plan, matrix_rates),
        "backends": {
            op: {"backend": backend, "passed_over": plan.ops.reasons[op]}
            for op, backend in plan.ops.backends.items()
        },
        "floor_seconds": None if rates is None else floor_seconds(plan, rates),
        "rates": None if rates is None else dict(rates.__dict__),
        "plan_hash": plan.hash,
        "warnings": list(plan.warnings),
        "dropped": list(plan.dropped),
    }


def print_plan(
    plan: Plan,
    rates: Rates | None,
    matrix_rates: MatrixRates | None = None,
    *,
    as_json: bool,
    tensors: bool,
) -> None:
    """A plan for people, or as JSON."""
    summary = plan_summary(plan, rates, matrix_rates)
    rows: list[dict[str, Any]] = [
        {
            "name": job.name,
            "tensor": job.tensor_name,
            "kind": job.kind,
            "shape": list(job.shape),
            "format": job.format.name,
            "file": plan.shards[job.shard].file_name,
            "offset": job.offset,
            "bytes": job.num_bytes,
            "reads": plan.looks[job.name],
            "matrix_bytes": job.cost.num_bytes,
            "parameters": {**job.parameters},
            "models": dict(zip(job.model_names, map(dict, job.model_parameters), strict=False)),
        }
        for job in plan.jobs
    ]
    if as_json:
        print(json.dumps({**summary, "jobs": rows} if tensors else summary, indent=2))
        return
    from rich.table import Table

    print_warnings(plan.warnings)
    table = Table.grid(padding=(0, 2))
    for key, value in _plan_lines(plan, summary):
        table.add_row(f"[bold]{key}[/]", escape(value))
    _out.print(table)
    if tensors:
        listing = Table("tensor", "kind", "shape", "format", "bytes", "reads", "file", box=None)
        for row in rows:
            listing.add_row(
                escape(row["name"]),
                row["kind"],
                escape(str(row["shape"])),
                row["format"],
                f"{row['bytes']:,}",
                f"{row['reads']:.3g}",
                row["file"],
            )
        _out.print(listing)


def _matrix_lines(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    kinds = {"float32": "products", "float64": "products", "eigen_float64": "eigenproblems"}
    work = ", ".join(
        f"{found[f'flops_{key}']:.2g} flops of {what} in {key.rpartition('_')[2]}"
        for key, what in kinds.items()
        if found[f"flops_{key}"]
    )
    seconds = found["seconds"]
    time = "" if seconds is None else f"; about {seconds:.3g} s at the rates of this machine"
    lines = [
        (
            "matrices",
            f"{counted(found['tensors'], 'tensor')}, at most {format_size(found['largest_bytes'])} "
            f"at once for one ({found['largest']})",
        )
    ]
    return [*lines, ("", f"{work}{time}")] if work else lines


def _plan_lines(plan: Plan, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, memory = summary["tensors"], summary["memory"]
    streamed = counts["streamed"]
    pieces = counts["matrices_of_experts"]
    experts = f", {pieces} matrices of packed experts each by itself" if pieces else ""
    backends: dict[str, list[str]] = {}
    passed_over: dict[str, str] = {}
    for op, choice in summary["backends"].items():
        backends.setdefault(choice["backend"], []).append(op)
        passed_over |= choice["passed_over"]
    lines = [
        ("method", summary["method"]),
        *(
            ("input", f"{name}: {counted(each['files'], 'file')}, {format_size(each['bytes'])}")
            for name, each in summary["inputs"].items()
        ),
        ("donor", f"{summary['donor']} (names, order, configuration)"),
        ("tensors", f"{counts['merged']} merged, {counts['copied']} copied{experts}"),
        (
            "output",
            f"{counted(len(plan.shards), 'file')}, {format_size(plan.bytes_written)}",
        ),
        ("reads", format_size(plan.bytes_read)),
        (
            "memory",
            f"budget {format_size(memory['budget'])}, peak about "
            f"{format_size(memory['peak_estimate'])}, "
            f"{memory['num_blocks']} blocks of {format_size(memory['block_bytes'])}",
        ),
        ("threads", str(plan.tiling.threads)),
        *_matrix_lines(summary["matrices"]),
        *(("backend", f"{name} ({', '.join(ops)})") for name, ops in backends.items()),
        *(("", f"not {name}: {reason}") for name, reason in passed_over.items()),
        ("floor", _floor_text(summary)),
    ]
    if streamed:
        first = ", ".join(streamed[:3]) + (", …" if len(streamed) > 3 else "")
        text = f"{counted(len(streamed), 'tensor')}: {first}; "
        cause = "the model is measured as a whole" if plan.model_wide else "more memory avoids it"
        lines.append(("read again", text + cause))
    return lines


def _floor_text(summary: Mapping[str, Any]) -> str:
    rates = summary["rates"]
    if rates is None:
        return "not measured: the folder cannot be written (choose one with --folder)"
    return (
        f"about {summary['floor_seconds']:.1f} s for the storage alone (device read "
        f"{format_size(rates['read'])}/s, cached {format_size(rates['cached_read'])}/s, write "
        f"{format_size(rates['write'])}/s)"
    )


def print_checkpoint(
    checkpoint: Checkpoint, nonfinite: Mapping[str, int] | None, *, as_json: bool
) -> None:
    """The tensors of a checkpoint."""
    if as_json:
        print(
            json.dumps(
                {
                    name: {
                        "dtype": entry.format.name,
                        "shape": list(entry.shape),
                        "file": entry.file.name,
                        "offset": entry.offset,
                        "bytes": entry.read_bytes,
                        **(
                            {"storage": entry.storage, "counts_as": entry.nominal.name}
                            if isinstance(entry, ScaledTensor)
                            else {}
                        ),
                        **({} if nonfinite is None else {"nonfinite": nonfinite[name]}),
                    }
                    for name, entry in checkpoint.tensors.items()
                },
                indent=2,
            )
        )
        return
    for name, entry in checkpoint.tensors.items():
        bad = "" if nonfinite is None else f"  non-finite: {nonfinite[name]}"
        _out.print(
            f"{escape(name)}  {_storage(entry)}  {escape(str(list(entry.shape)))}  "
            f"{format_size(entry.read_bytes)}  {entry.file.name}{bad}"
        )
    stored = (each for entry in checkpoint.tensors.values() for each in stored_entries(entry))
    formats = sorted({entry.format.name for entry in stored})
    _out.print(
        f"[bold]{counted(len(checkpoint.tensors), 'tensor')}[/], "
        f"{counted(len(checkpoint.headers), 'file')}, "
        f"{format_size(checkpoint.total_bytes)}, {', '.join(formats)}"
    )


def _storage(entry: TensorEntry) -> str:
    """How a tensor is stored."""
    return entry.storage if isinstance(entry, ScaledTensor) else entry.format.name


def print_methods(found: Sequence[MethodSpec]) -> None:
    """One line a method."""
    from rich.table import Table

    table = Table("method", "base model", "models", "what it does", box=None)
    for spec in sorted(found, key=lambda each: each.name):
        base = "one of the models" if spec.base == "input" else spec.base
        table.add_row(spec.name, base, spec.model_count, escape(spec.summary))
    _out.print(table)
    _out.print("pymerge methods NAME shows the parameters of one.")


def print_method(spec: MethodSpec) -> None:
    """A method with its parameters."""
    from rich.table import Table

    _out.print(f"[bold]{spec.name}[/]: {escape(spec.summary)}")
    if spec.paper:
        _out.print(spec.paper)
    table = Table("parameter", "type", "given", "default", box=None)
    table.add_column("meaning", overflow="fold")
    below = {}
    for parameter in spec.parameters.values():
        default = "required" if parameter.required else value_text(parameter.default)
        if len(default) > LONGEST_DEFAULT:
            below[parameter.name] = default
        table.add_row(
            parameter.name,
            _kind(parameter),
            "per model" if parameter.scope == "model" else "once",
            "see below" if parameter.name in below else escape(default),
            escape(parameter.doc),
        )
    _out.print(table if spec.parameters else "no parameters")
    for name, default in below.items():
        _out.print(f"default of {name}: {escape(default)}", soft_wrap=True)
    for name, lines in spec.preset_lines().items():
        text = ", ".join(lines) or "the defaults above"
        _out.print(f"preset {name}: {escape(text)}", soft_wrap=True)


def _kind(parameter: ParameterSpec) -> str:
    if parameter.choices:
        return " | ".join(parameter.choices)
    return f"{parameter.kind} {parameter.bounds}".rstrip()
