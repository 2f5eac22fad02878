"""`mergekit-yaml` against `pymerge run -- mergekit-yaml`: the same command, start-up included.

    python bench/run_mergekit.py                        ties, base and 3 models of 1 GB in bfloat16
    python bench/run_mergekit.py --gb 0.05 --repeat 1   a smoke test

Makes checkpoints (bench/models.py); then each round runs our command and, in the first one or with
--repeat-host in every one, plain mergekit, each in a fresh process of one environment
(.venv-peers): wall seconds, CPU seconds and peak resident memory as the kernel accounts them. The
gate is the first round: where the outputs do not agree (bench/agreement.py) no figure is printed.
Ends with the ratio of the medians and a JSON file in bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from end2end import (
    BENCH,
    PEER_ENVIRONMENT,
    RESULTS,
    Failed,
    Usage,
    agree,
    ask,
    peer_versions,
    run,
    say,
    write_recipe,
)
from machine import ROOT, describe, filesystem, machine_line

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of one checkpoint in 1e9 bytes")
    parser.add_argument("--models", type=int, default=3, help="fine-tuned models beside the base")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--numerics", choices=("accurate", "mergekit"), default="accurate")
    parser.add_argument("--memory", default="1GiB", help="budget of our command")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--repeat-host", action="store_true", help="mergekit in every round")
    parser.add_argument("--dir", type=Path, default=BENCH / "work", help="where the data goes")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    say(f"writing {arguments.models + 1} checkpoints to {work}")
    size = ("--gb", str(arguments.gb), "--models", str(arguments.models))
    run([sys.executable, BENCH / "models.py", work, *size])
    recipe = write_recipe(arguments.method, work, arguments.models, arguments.dtype).recipe
    programs = PEER_ENVIRONMENT / "bin"
    host = [programs / "mergekit-yaml"]
    settings = ["--numerics", arguments.numerics, "--memory", arguments.memory]
    ours = [programs / "pymerge", "run", *settings, "--", "mergekit-yaml"]
    folders = {"pymerge run": work / "out-ours", "mergekit": work / "out-theirs"}
    runs: dict[str, list[Usage]] = {name: [] for name in folders}
    agreement: dict[str, Any] = {}
    for number in range(arguments.repeat):
        for name, command in (("pymerge run", ours), ("mergekit", host)):
            if number and name == "mergekit" and not arguments.repeat_host:
                continue
            say(f"round {number + 1}, {name}")
            out = folders[name]
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            options = ["--no-copy-tokenizer", "--quiet"]
            runs[name].append(run([*command, recipe, out, *options], ENVIRONMENT))
        if number == 0:
            agreement = ask("agreement.py", *folders.values(), work / "base")
            if not agree(arguments.method, agreement):
                raise Failed(f"the outputs do not agree: {agreement}")
    return {
        "agreement": agreement,
        "runs": {name: [asdict(usage) for usage in each] for name, each in runs.items()},
        "wall_s": {name: statistics.median(u.wall for u in each) for name, each in runs.items()},
    }


def main() -> None:
    arguments = parse()
    if not (PEER_ENVIRONMENT / "bin" / "pymerge").exists():
        sys.exit(f"{PEER_ENVIRONMENT.name} has no mergekit or no pymerge: run `make bench-peers`")
    work = (arguments.dir / f"run-mergekit-{os.getpid()}").resolve()
    work.mkdir(parents=True)
    machine = machine_line() | {"filesystem": filesystem(work), "peers": peer_versions()}
    try:
        found = measure(arguments, work)
    except Failed as failure:
        sys.exit(f"no figures: {failure}")
    finally:
        shutil.rmtree(work)
    settings = {key: value for key, value in vars(arguments).items() if key != "dir"}
    wall = found["wall_s"]
    document = {
        "machine": machine,
        "settings": settings,
        **found,
        "times_faster": wall["mergekit"] / wall["pymerge run"],
    }
    print(describe(machine) + f", {machine['filesystem']}")
    print(f"{arguments.method}, {arguments.models} models of {arguments.gb:g} GB beside the base")
    for name, seconds in wall.items():
        peak = max(usage["peak_mib"] for usage in found["runs"][name])
        print(f"{name:12} {seconds:8.2f} s  {peak:6.0f} MiB at most  ({len(found['runs'][name])}x)")
    print(f"{document['times_faster']:.1f} times faster")
    RESULTS.mkdir(exist_ok=True)
    stamp = machine["date"].replace(":", "").replace("-", "")[:15]
    path = RESULTS / f"run-mergekit-{arguments.method}-{arguments.gb:g}gb-{stamp}.json"
    path.write_text(json.dumps(document, indent=1).replace(str(work), "DIR") + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
