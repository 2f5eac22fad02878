"""Runs many mergekit merges in one process, because mergekit takes seconds to start.

Executed by the Python of mergekit's own environment: ``python drive_mergekit.py JOBS.json``, where
JOBS is a list of {"recipe": YAML file, "out": folder}, and "options", fields of mergekit's
MergeOptions, where a job has some. Writes OUT/error.txt where a merge failed and goes on. With
``num_threads`` among the options torch computes on so many threads, as with ``mergekit-yaml -j``.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    defaults = {"quiet": True, "copy_tokenizer": False, "write_model_card": False}
    threads = torch.get_num_threads()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True)
        text = Path(job["recipe"]).read_text()
        options = MergeOptions(**defaults | job.get("options", {}))
        torch.set_num_threads(options.num_threads or threads)
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, str(out), options=options)
        except Exception:
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
