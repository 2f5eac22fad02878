"""Runs each merge twice in one process: by mergekit alone, then with its executor replaced.

Executed by the Python of mergekit's own environment: ``python drive_mergekit_backend.py JOBS.json
OUT``, where JOBS is a list of {"name", "recipe": text} with "options" (fields of mergekit's
MergeOptions) and "numerics" where a job has some. With "seam" "methods" the maths is replaced and
not the executor, with "whole" all of run_merge.
Writes OUT/plain/NAME and OUT/ours/NAME, with error.txt where a merge failed, and OUT/NAME.json with
what our engine did. With "in_memory" the tensors are returned instead, and saved here.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, ReturnTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors.torch import save_file

from pymerge.integrations import mergekit


def run(job: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True)
    options = MergeOptions(quiet=True, **job.get("options", {}))
    config = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
    try:
        if job.get("in_memory"):
            save_file(returned(config, options), out / "model.safetensors")
        else:
            merge.run_merge(config, str(out), options=options, config_source=job["recipe"])
    except Exception:
        (out / "error.txt").write_text(traceback.format_exc())


def returned(config: MergeConfiguration, options: MergeOptions) -> dict[str, Any]:
    """The tensors of a merge in memory, by mergekit's own steps."""
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    written = merge._model_out_config(config, architecture)
    planner = MergePlanner(config, architecture, options=options, out_model_config=written)
    planner._plan()
    # mergekit 0.1.5 cannot plan in memory: pydantic refuses the tasks that it gives ReturnTensor.
    tasks = [
        ReturnTensor.model_construct(weight_info=weight, tensor_task=task, dtype=config.out_dtype)
        for weight, task in planner._tensors
    ]
    executor = merge.Executor(tasks)
    return {task.weight_info.name: value for task, value in executor.run(quiet=True)}


def main() -> None:
    out = Path(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job, out / "plain" / job["name"])
        before = mergekit.TALLY.as_dict()
        by_method = job.get("seam") == "methods"
        use, leave = (
            (mergekit.install, mergekit.uninstall)
            if by_method
            else (mergekit.redirect, mergekit.restore)
        )
        whole = {"whole": True} if job.get("seam") == "whole" else {}
        use(numerics=job.get("numerics", "accurate"), **whole)
        run(job, out / "ours" / job["name"])
        leave()
        after = mergekit.TALLY.as_dict()
        done = {key: after[key] - before[key] for key in ("merges", "planned", "tensors")}
        for kind in ("left", "whole"):
            changes = {key: n - before[kind].get(key, 0) for key, n in after[kind].items()}
            done[kind] = {key: n for key, n in changes.items() if n}
        (out / f"{job['name']}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
