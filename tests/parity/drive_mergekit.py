"""Runs many mergekit merges in one process, because mergekit takes seconds to start.

Executed by the Python of mergekit's own environment: ``python drive_mergekit.py JOBS.json``, where
JOBS is a list of {"recipe": YAML file, "out": folder}. Writes OUT/error.txt where a merge failed
and goes on.
"""

import json
import sys
import traceback
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True)
        text = Path(job["recipe"]).read_text()
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, str(out), options=options)
        except Exception:
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
