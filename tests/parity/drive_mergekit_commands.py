"""Runs many of mergekit's command lines in one process, because mergekit takes seconds to start.

Executed by the Python of mergekit's own environment: ``python drive_mergekit_commands.py JOBS``,
where JOBS is a JSON file with a list of {"command": a key of COMMANDS, "arguments": a list,
"error": file}. Writes the traceback into that file where a command failed, and goes on. Jobs with
"numerics" run on pymerge in these, as under ``pymerge run``.
"""

import json
import sys
import traceback
from pathlib import Path

from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.run_yaml import main as mergekit_yaml

COMMANDS = {"mergekit-yaml": mergekit_yaml, "mergekit-pytorch": mergekit_pytorch}


def redirect(numerics: str | None) -> None:
    """Let mergekit's executor be ours, or its own."""
    if numerics is None and "pymerge.integrations.mergekit" not in sys.modules:
        return
    from pymerge.integrations import mergekit

    mergekit.restore()
    if numerics is not None:
        mergekit.redirect(numerics=numerics, memory="1GiB")


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        redirect(job.get("numerics"))
        try:
            COMMANDS[job["command"]].main(args=job["arguments"], standalone_mode=False)
        except Exception:
            Path(job["error"]).write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
