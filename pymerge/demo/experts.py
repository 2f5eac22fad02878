"""The trained checkpoints of the demo, made once and found again.

``trained.json`` is written last and names what the folders were made from: the settings, the
source text of the modules that decide the bytes, and the versions of the packages that data and
training come from. Where it says the same as today, nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from pymerge.demo import checkpoint
from pymerge.demo.data import Task
from pymerge.demo.model import one_thread
from pymerge.demo.train import Settings, finetune, pretrain

SOURCES = ("data.py", "model.py", "train.py", "checkpoint.py")
PACKAGES = ("numpy", "torch", "scikit-learn", "scikit-image")


def training_key(settings: Settings) -> str:
    """SHA-256 over everything that decides the trained bytes."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    versions = {package: version(package) for package in PACKAGES}
    digest.update(json.dumps([asdict(settings), versions], sort_keys=True).encode())
    return digest.hexdigest()


@one_thread()
def trained_models(
    folder: Path, tasks: Sequence[Task], settings: Settings, tell: Callable[[str], None]
) -> tuple[dict[str, Path], bool]:
    """Folders of ``base`` and of an expert per task, in that order, and whether they were there.

    ``tell`` is called with the name of each model before it is trained.
    """
    mark = folder / "trained.json"
    paths = {name: folder / name for name in ("base", *(task.name for task in tasks))}
    key = {"key": training_key(settings)}
    complete = all((path / "config.json").exists() for path in paths.values())
    if complete and mark.exists() and json.loads(mark.read_text()) == key:
        return paths, True
    if folder.exists():
        shutil.rmtree(folder)
    tell("base")
    base = pretrain(tasks, settings)
    checkpoint.save(base, paths["base"])
    for task in tasks:
        tell(task.name)
        checkpoint.save(finetune(base, task, settings), paths[task.name])
    mark.write_text(json.dumps(key) + "\n")
    return paths, False
