"""The demo from end to end: train, merge with the engine a user has, evaluate, show.

Everything lies in one folder:

- ``models/``    the base and the experts (kept between runs, see experts.py)
- ``recipes/``   a YAML file per merge, to be read, changed and run again
- ``merged/``    a model folder per merge
- ``tuning/``    the merges of the rows marked with a star, one per lambda tried
- ``results.json``, ``accuracy.png``
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

import pymerge
from pymerge.demo import checkpoint, recipes, statistics
from pymerge.demo.data import Task, make_tasks
from pymerge.demo.experts import trained_models
from pymerge.demo.model import accuracy, one_thread
from pymerge.demo.optional import optional
from pymerge.demo.recipes import CONFIGURATIONS, Configuration
from pymerge.demo.show import Row, plot, table
from pymerge.demo.train import Settings, tensors


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    ``rows`` are the merges, ``experts`` each expert on its own task, ``lambdas`` the values chosen
    on the selection parts, ``seconds`` the wall time of each stage.
    """

    folder: Path
    rows: list[Row]
    experts: Row
    lambdas: dict[str, float]
    seconds: dict[str, float]
    cached: bool

    def mean(self, name: str) -> float:
        """Mean test accuracy of the configuration ``name``."""
        return next(row.mean for row in self.rows if row.name == name)


@one_thread()
def evaluate(folder: Path, tasks: Sequence[Task], part: str) -> dict[str, float]:
    """Accuracy of the checkpoint in ``folder`` on every task's ``part``: selection or test."""
    model = checkpoint.load(folder)
    if (folder / "smile.json").exists():
        model = pymerge.load_smile(folder, model)
    return {task.name: accuracy(model, task.name, *tensors(getattr(task, part))) for task in tasks}


@dataclass
class Bench:
    """The folders and tasks of one run, and where its time goes."""

    out: Path
    tasks: Sequence[Task]
    models: dict[str, Path]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def merge(self, configuration: Configuration, room: str, name: str) -> Path:
        """Write the recipe, merge it into ``room``/``name`` and return that folder."""
        base = self.models["base"]
        experts = [self.models[task.name] for task in self.tasks]
        target = self.out / room / name
        recipe = self.out / "recipes" / f"{name}.yaml"
        recipes.write(
            recipes.recipe(configuration, base, experts),
            recipe,
            f"run from the same folder as the demo: pymerge merge {recipe} {target} --overwrite",
        )
        with self.timed("merging"):
            pymerge.merge(recipe, target, overwrite=True)
        return target

    def prepare(self, configuration: Configuration) -> None:
        """Collect what the merge reads beside the experts."""
        if configuration.reads is not None:
            with self.timed("statistics"):
                statistics.collect(configuration.reads, self.tasks, self.models)

    def score(self, folder: Path, part: str) -> dict[str, float]:
        with self.timed("evaluation"):
            return evaluate(folder, self.tasks, part)

    def score_tasks(self, folder: Path) -> dict[str, float]:
        """Each task's model, rebuilt from the task outputs in ``folder``, on its own task."""
        scores = {}
        for task in self.tasks:
            target = folder.with_name(f"{folder.name}-{task.name}")
            with self.timed("merging"):
                pymerge.materialize(folder, str(self.models[task.name]), target, overwrite=True)
            scores[task.name] = self.score(target, "test")[task.name]
        return scores

    def tune(self, configuration: Configuration) -> float:
        """The lambda with the best mean accuracy on the selection parts; the smaller of equals."""
        best_lambda, best = 0.0, -1.0
        for value in configuration.lambdas:
            name = f"{configuration.name}-{value:g}"
            folder = self.merge(configuration.with_lambda(value), "tuning", name)
            scores = self.score(folder, "selection")
            mean = sum(scores.values()) / len(scores)
            if mean > best:
                best_lambda, best = value, mean
        return best_lambda


def run_demo(out: Path, console: Console, settings: Settings | None = None) -> DemoResult:
    """Train (or find) the models, merge them in every way, evaluate and print; files go to ``out``.

    Raises `PymergeError` naming the package where one that only the demo needs is missing.
    """
    settings = settings or Settings()
    for module in ("sklearn.datasets", "skimage.data", "matplotlib"):
        optional(module)
    start = time.perf_counter()
    tasks = make_tasks(settings.seed)
    seconds = {"data": time.perf_counter() - start}

    start = time.perf_counter()
    with console.status("training") as status:
        models, cached = trained_models(
            out / "models", tasks, settings, lambda name: status.update(f"training {name}")
        )
    seconds["training"] = time.perf_counter() - start
    found = "found trained" if cached else f"trained in {seconds['training']:.1f} s"
    console.print(f"{len(models) - 1} experts and their base: {found}, in {out / 'models'}")

    bench = Bench(out, tasks, models, seconds)
    rows, lambdas = [], {}
    for configuration in CONFIGURATIONS:
        chosen = configuration
        bench.prepare(configuration)
        if configuration.tuned:
            lambdas[configuration.name] = bench.tune(configuration)
            chosen = configuration.with_lambda(lambdas[configuration.name])
        folder = bench.merge(chosen, "merged", chosen.name)
        scores = bench.score_tasks(folder) if chosen.per_task else bench.score(folder, "test")
        rows.append(Row(chosen.name, chosen.title, scores))
    experts = Row(
        "experts",
        "experts, own task",
        {task.name: bench.score(models[task.name], "test")[task.name] for task in tasks},
    )
    result = DemoResult(out, rows, experts, lambdas, seconds, cached)
    with bench.timed("plot"):
        plot(rows, experts, out / "accuracy.png")
    write_results(result, settings)
    report(result, console)
    return result


ABOUT = (
    "\nOne small network, fine-tuned for eight image tasks, then merged back into one. The tasks: "
    "scikit-learn's digits as they are, turned, inverted, flipped both ways and with their pixels "
    "jumbled; docs and mix: which of four scikit-image pictures a patch is from.\n"
)
NOTES = (
    "λ is the recipe's lambda. TIES keeps the largest 20 % of each tensor; model-wide: of the "
    "whole model.\n* λ was chosen on images that neither training nor the test saw.\n"
    "'experts, own task' is each fine-tuned model on its own task: what a merge can hope for.\n"
)


def write_results(result: DemoResult, settings: Settings) -> None:
    """results.json: settings, accuracies as fractions, chosen lambdas, seconds."""
    document = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "accuracy": {
            row.name: {"title": row.title, "mean": row.mean, "tasks": row.accuracies}
            for row in [*result.rows, result.experts]
        },
        "lambda_chosen_on_selection": result.lambdas,
        "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        "trained_in_this_run": not result.cached,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (result.folder / "results.json").write_text(text + "\n", encoding="utf-8")


def report(result: DemoResult, console: Console) -> None:
    """Print the table, where the files are, and how long each stage took."""
    console.print(ABOUT)
    console.print(table(result.rows, result.experts))
    console.print(NOTES)
    for path, what in (
        ("merged", "merged models"),
        ("recipes", "their recipes"),
        ("accuracy.png", "plot"),
        ("results.json", "the figures"),
    ):
        console.print(f"{what}: {result.folder / path}", soft_wrap=True)
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in result.seconds.items())
    console.print(f"time: {stages}")
