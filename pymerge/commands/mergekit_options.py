"""The options of mergekit-yaml under their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge.errors import PymergeError
from pymerge.sizes import MAX_BYTES, parse_size

_DANGER, _STORAGE, _OTHER = "Dangerous options", "Storage", "Miscellaneous"
_SPEED, _OUTPUT, _OURS = "Performance", "Output settings", "Beyond mergekit-yaml"


def _flag(name: str, panel: str, text: str) -> Any:
    return typer.Option(f"--{name}/--no-{name}", rich_help_panel=panel, help=text)


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG_FILE", help="Recipe in YAML.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT_PATH", help="Output model folder.")]
AllowCrimes = Annotated[
    bool, _flag("allow-crimes", _DANGER, "Merge models of different architectures by tensor names.")
]
TruncateEmbeddings = Annotated[
    bool,
    _flag(
        "unsafe-truncate-embeddings",
        _DANGER,
        "Cut embeddings to the smallest vocabulary, whatever the rows stand for.",
    ),
]
TrustRemoteCode = Annotated[
    bool, _flag("trust-remote-code", _DANGER, "Without effect: no model's code is run.")
]
TransformersCache = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_STORAGE, metavar="DIR", help="Where models of the hub are kept."),
]
LoraMergeCache = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_STORAGE,
        metavar="DIR",
        help="Without effect: adapters are put on while they are read.",
    ),
]
LoraMergeDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OTHER, metavar="DTYPE", help="Without effect: it is always float32."
    ),
]
RandomSeed = Annotated[
    int | None,
    typer.Option(rich_help_panel=_OTHER, metavar="N", help="Seed of the random methods."),
]
Verbosity = Annotated[
    int,
    typer.Option("-v", count=True, rich_help_panel=_OTHER, help="Show the traceback of an error."),
]
Quiet = Annotated[bool, _flag("quiet", _OTHER, "Print errors only.")]
Cuda = Annotated[bool, _flag("cuda", _SPEED, "Demand that a GPU computes.")]
Device = Annotated[
    str | None,
    typer.Option(rich_help_panel=_SPEED, metavar="NAME", help="Where to compute: cpu, cuda, auto."),
]
LowCpuMemory = Annotated[
    bool, _flag("low-cpu-memory", _SPEED, "Without effect: --memory is the budget.")
]
LazyUnpickle = Annotated[bool, _flag("lazy-unpickle", _SPEED, "Accept .bin files as inputs.")]
ReadToGpu = Annotated[bool, _flag("read-to-gpu", _SPEED, "Without effect: tiles are streamed.")]
MultiGpu = Annotated[bool, _flag("multi-gpu", _SPEED, "Without effect: all GPUs are used.")]
NumThreads = Annotated[
    int | None,
    typer.Option(
        "--num-threads",
        "-j",
        min=1,
        rich_help_panel=_SPEED,
        metavar="N",
        help="Compute threads. Default: all CPUs.",
    ),
]
GpuRich = Annotated[
    bool, typer.Option("--gpu-rich", rich_help_panel=_SPEED, help="The same as --cuda.")
]
AsyncWrite = Annotated[
    bool, _flag("async-write", _SPEED, "Without effect: writing never waits for the rest.")
]
WriteThreads = Annotated[
    int | None, typer.Option(rich_help_panel=_SPEED, metavar="N", help="Without effect.")
]
OutShardSize = Annotated[
    str,
    typer.Option(
        rich_help_panel=_OUTPUT,
        metavar="SIZE",
        help="Bytes of an output file; K, M and B are thousands, millions, billions; 0: one file.",
    ),
]
CopyTokenizer = Annotated[bool, _flag("copy-tokenizer", _OUTPUT, "Copy a tokenizer.")]
CloneTensors = Annotated[
    bool, _flag("clone-tensors", _OUTPUT, "Without effect: every tensor is written on its own.")
]
WriteModelCard = Annotated[
    bool, _flag("write-model-card", _OUTPUT, "Write README.md and mergekit_config.yml.")
]
SafeSerialization = Annotated[
    bool, _flag("safe-serialization", _OUTPUT, "Save safetensors; pickles are never written.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OURS,
        metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB. Default: half of what is available.",
    ),
]
Numerics = Annotated[
    str,
    typer.Option(
        rich_help_panel=_OURS,
        metavar="accurate|mergekit",
        help="Compute in float32 and round once, or round every step as mergekit does.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=_OURS, help="Replace a model that OUT_PATH holds."),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", rich_help_panel=_OURS, help="As --lazy-unpickle.")
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing",
        rich_help_panel=_OURS,
        help="Merge a tensor without the models that lack it.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OURS,
        metavar="NAME",
        help="Demand a backend: cuda, triton, cpu, reference.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", rich_help_panel=_OURS, help="Treat warnings about the recipe as errors."
    ),
]


def shard_bytes(text: str) -> int:
    """Bytes of ``--out-shard-size``: mergekit's suffixes K, M and B, or ours; 0 is no bound.

    :raises PymergeError: it does not read as a size.
    """
    number, unit = text[:-1], text[-1:].lower()
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(unit)
    if factor is not None and number.replace(".", "", 1).isdecimal():
        size = parse_size(round(float(number) * factor), "--out-shard-size")
    else:
        try:
            size = parse_size(text, "--out-shard-size")
        except PymergeError:
            raise PymergeError(
                "--out-shard-size: expected bytes as a number with K, M or B (thousands, millions, "
                f"billions) or with MB, GB, MiB, GiB and the like, as in 5B or 2GiB, found {text!r}"
            ) from None
    return size or MAX_BYTES
