"""The documentation is true: its commands and programs run, its lists are complete."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from pymerge import api, machine, terminal
from pymerge.cli import app
from pymerge.commands import mergekit_yaml
from pymerge.engine import rates, run
from pymerge.methods import METHODS, specs
from pymerge.methods.protocol import Tensor
from pymerge.plan import SHARD_BYTES, memory
from pymerge.recipe import load_recipe, split_documents

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

COMMANDS = typer.main.get_command(app).commands
MERGEKITS = ("differences.md", "from-mergekit.md", "CHANGELOG.md")
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (page, body)
        for page in PAGES
        for name, body in BLOCK.findall(page.read_text(encoding="utf-8"))
        if name == language
    ]


def options_of(command: str) -> set[str]:
    found = {"--help", "-h"}
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option":
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def test_every_block_names_its_language():
    assert {name for page in PAGES for name, _ in BLOCK.findall(page.read_text())} <= {
        "console",
        "sh",
        "yaml",
        "python",
        "text",
    }


@pytest.mark.parametrize(
    ("page", "text"), [block for block in blocks("yaml") if "_target_:" not in block[1]]
)
def test_recipes_load_without_a_warning(page, text):
    documents = split_documents(text)
    for each in [text] if len(documents) == 1 else [document.text for document in documents]:
        assert load_recipe(each, specs=specs(), strict=True).text == each


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if re.search(r"^```(python|sh)$", page.read_text(), re.M) and page.name != "backends.md"
    ],
    ids=page_id,
)
def test_commands_and_programs_of_a_page_run(page, model_folder, run_pymerge, monkeypatch):
    """In order, in one folder with the models that the pages speak of; make and git do not run.

    The programs of backends.md need other tools: tests/parity/test_parity_backends_docs.py.
    """
    monkeypatch.chdir(model_folder)
    recipes = [text for name, text in BLOCK.findall(page.read_text()) if name == "yaml"]
    if recipes:
        (model_folder / "recipe.yml").write_text(recipes[0])
    for language, body in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(body, page_id(page), "exec"), {"__name__": "__main__"})
        elif language == "sh":
            for line in body.splitlines():
                run_line(line, model_folder, run_pymerge)


def run_line(line, folder, run_pymerge):
    words = shlex.split(line)
    if words[0] == "pymerge":
        done = run_pymerge(*words[1:], cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    elif words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == ".venv/bin/python":
        script = ROOT / words[1]
        text = script.read_text()
        for option in [word for word in words[2:] if word.startswith("--")]:
            assert f'"{option}"' in text, f"{words[1]} has no {option}"
    else:
        assert words in ([".", ".venv/bin/activate"],), f"what is {line!r}?"


def test_quickstart_lists_the_options_of_merge():
    page = (ROOT / "docs" / "quickstart.md").read_text()
    rows = re.findall(r"^\| (`-.*?) \|", page, re.M)
    listed = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(rows)))
    assert listed == options_of("merge") - {"--help", "-h"}
    for parameter in COMMANDS["merge"].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            row = next(row for row in rows if re.search(rf"{parameter.opts[0]}\b", row))
            takes_value = " " in row.split("`")[1]
            assert takes_value is not parameter.is_flag, f"{parameter.opts[0]} takes a value or not"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in MERGEKITS], ids=page_id)
def test_options_that_are_named_exist(page):
    """Of any of our commands; differences.md and from-mergekit.md name mergekit's too."""
    known = set().union(*(options_of(command) for command in COMMANDS)) | {"--version"}
    for parameter in typer.main.get_command(mergekit_yaml.app).params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    text = BLOCK.sub("", page.read_text())
    named = set(re.findall(r"`(?:pymerge [a-z]+[^`]*?)?(--[a-z][a-z-]*)", text))
    assert named <= known


def test_differences_names_our_options_right():
    page = (ROOT / "docs" / "differences.md").read_text()
    rows = re.findall(r"^\| `--.*? \| (.*) \|$", page, re.M)
    assert rows
    assert set(re.findall(r"--[a-z-]+", " ".join(rows))) <= options_of("merge")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target


def numbers_of_scaling() -> dict[str, str]:
    """Sentences of the page with the numbers that the code has."""
    low, high = api.MEMORY_BOUNDS
    whole, slack = memory.LARGEST_BLOCK - memory.Tiling.SLACK, memory.Tiling.SLACK
    ties = METHODS["ties"]
    shared = {name: p.default for name, p in ties.spec.parameters.items() if p.scope == "shared"}
    tensor = Tensor("t", (9,), 1, True, shared, [{"density": 0.5}], {}, ("m",))
    return {
        "program": f"About {memory.OVERHEAD_BYTES >> 20} MiB of it are set aside for the program",
        "tables": f"and 1/{memory.SELECTION_SHARE} for the tables",
        "block": f"blocks of up to {whole >> 20} MiB + {slack >> 10} KiB,",
        "least": f"The least budget is {memory.OVERHEAD_BYTES + memory.SMALLEST_ARENA >> 20} MiB;",
        "default": f"between {low >> 20} MiB and {high >> 30} GiB.",
        "tensor": f"reads it again, {ties.looks(tensor) + 1} times in all as planned",
        "model": f"it reads every input {ties.model_looks + 1} times.",
        "threads": f"the most {machine.MAX_THREADS}.",
        "readers": f"{api.READERS} more tasks read and write meanwhile.",
        "lanes": f"Up to {run.NUM_LANES} tensors are in progress at once.",
        "shard": f"default {SHARD_BYTES / 1e9:g} GB;",
        "probe": f"a scratch file of {rates.PROBE_BYTES >> 20} MiB",
    }


@pytest.mark.parametrize("name", numbers_of_scaling())
def test_numbers_of_the_scaling_page_are_those_of_the_code(name):
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    assert numbers_of_scaling()[name] in page


def test_scaling_page_names_the_line_of_the_plan():
    page = (ROOT / "docs" / "scaling.md").read_text()
    label = re.search(r'lists these tensors under "([a-z ]+)"', page)
    assert label is not None
    assert f'("{label[1]}", ' in Path(terminal.__file__).read_text()
    assert api.MEMORY_SHARE == 0.5, "the page says half of the memory available"
    assert rates.KEEP_SECONDS == 7 * 24 * 3600, "the page says a week"


def generator(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_page_is_up_to_date():
    module = generator("make_methods")
    assert module.PAGE.read_text(encoding="utf-8") == module.render() + "\n", "run `make docs`"


def test_kernels_page_is_up_to_date():
    module = generator("make_kernels")
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.render(page), "run `make docs`"


def test_readme_lists_the_methods():
    page = (ROOT / "README.md").read_text()
    table = page.partition("## Methods")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == set(METHODS)


def test_readme_begins_with_the_two_commands():
    page = (ROOT / "README.md").read_text()
    first = BLOCK.search(page)
    assert first is not None
    assert first[2].splitlines() == ["make demo", "make test"]
    assert "## " not in page[: first.start()]


def test_ci_runs_what_the_readme_promises():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make check", "make test", "make demo"} <= set(lines)
    assert "set -euo pipefail" in lines
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


USES = (
    r"environ(?:\.get)?\s*[\[(]\s*\"(PYMERGE_[A-Z_]+)\"",
    r"getenv\(\"(PYMERGE_[A-Z_]+)\"",
    r"_flag\(\"(PYMERGE_[A-Z_]+)\"",
    r"envvar=\"(PYMERGE_[A-Z_]+)\"",
    r"^option\((PYMERGE_[A-Z_]+) ",
    r"^set\((PYMERGE_[A-Z_]+) .* CACHE ",
)


def test_environment_page_lists_every_variable_and_build_option():
    places = ["pymerge", "kernels", "csrc", "tests", "bench"]
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt", Path(ROOT / "Makefile")]
    for place in places:
        files += [p for p in (ROOT / place).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".txt")]
    used = {
        name
        for file in files
        for pattern in USES
        for name in re.findall(pattern, file.read_text(encoding="utf-8"), re.M)
    }
    page = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(PYMERGE_[A-Z_]+)`", page, re.M)) == used


def test_help_of_make_lists_its_targets():
    listed = set(re.findall(r'^\t@echo "make ([a-z-]+) ', MAKEFILE, re.M)) | {"help", "distclean"}
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony is not None
    assert listed == set(phony[1].split()) == TARGETS


def test_development_requirements_follow_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = project["project"]["optional-dependencies"]
    wanted = set(project["project"]["dependencies"]).union(*lists.values())
    wanted |= set(project["build-system"]["requires"])
    wanted -= {each for each in wanted if each.startswith("pymerge-engine[")}
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "no C++ compiler found (looked for no-such-compiler)"),
        ("false", "false does not compile C++17"),
    ],
    ids=["missing", "old"],
)
def test_preflight_names_what_is_missing(compiler, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "preflight.py")],
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
