"""The rooms of the house import one way, and what is asked for little loads little."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pymerge"

#: Leaf modules, usable by every room.
LEAVES = frozenset(
    {
        "_version",
        "cache",
        "errors",
        "formats",
        "machine",
        "methods.spec",
        "methods.values",
        "names",
        "sizes",
    }
)

#: Room -> the rooms it may import, beside the leaves and itself. A room is a folder or a module
#: of pymerge; _C is the extension, "" the package's own names.
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels", "_C"},
    "methods": {"ops"},
    "recipe": set(),
    # The checksums of verify are the extension's.
    "checkpoint": {"_C"},
    "adaptive": {"checkpoint", "ops"},
    "lora": {"checkpoint", "ops"},
    "plan": {"recipe", "checkpoint", "methods", "ops"},
    # It shows what the plan explains.
    "report": {"plan"},
    "engine": {"plan", "checkpoint", "methods", "ops", "report", "_C"},
    # Which weights of a module are transposed the plan knows.
    "in_memory": {"methods", "ops", "plan"},
    "state_dicts": {"in_memory", "methods"},
    "session": {"checkpoint", "in_memory", "methods", "ops"},
    "integrations": {
        "api",
        "checkpoint",
        "engine",
        "in_memory",
        "lora",
        "methods",
        "ops",
        "plan",
        "recipe",
        "runtime",
        "session",
        "state_dicts",
    },
    "api": {"engine", "plan", "checkpoint", "recipe", "methods"},
    "multi": {"api", "checkpoint", "engine", "plan", "recipe"},
    "surveys": {"api", "checkpoint", "engine", "plan", "recipe", "report"},
    "raw": {"api", "engine", "methods", "plan", "recipe"},
    "doctor": {"ops", "_C"},
    "demo": {""},
    "terminal": {"engine", "plan", "checkpoint"},
    "runtime": {"api", "engine", "plan", "checkpoint", "methods", "ops"},
    "cli": {"commands"},
    "commands": {
        "api",
        "engine",
        "checkpoint",
        "methods",
        "terminal",
        "doctor",
        "demo",
        "integrations",
        "lora",
        "multi",
        "plan",
        "raw",
        "recipe",
        "report",
        "runtime",
        "surveys",
    },
    "": {
        "adaptive",
        "api",
        "engine",
        "in_memory",
        "lora",
        "methods",
        "multi",
        "raw",
        "runtime",
        "session",
        "state_dicts",
        "surveys",
    },
}

#: pymerge.plan is a package and a function of the API; the package answers a call by the function.
EXCEPTIONS = {("pymerge/plan/__init__.py", "api")}

#: Imports of a leaf.
LEAF_IMPORTS = {
    "machine": {"errors"},
    "methods.values": {"methods.spec", "names"},
    "sizes": {"errors", "names"},
}

#: Third parties that a room may import when it is imported; every room: the standard library.
THIRD_PARTIES = {
    # Imported by the backend that runs them, when it runs them.
    "kernels": {"numpy", "triton"},
    "ops": {"numpy"},
    "methods": {"numpy"},
    "recipe": {"yaml", "pydantic"},
    "checkpoint": {"numpy"},
    "adaptive": {"numpy"},
    "lora": {"numpy"},
    "plan": {"numpy"},
    "report": {"yaml"},
    "engine": {"numpy"},
    "in_memory": {"numpy"},
    "state_dicts": set(),
    "session": {"numpy"},
    # Each host is imported when its integration is used.
    "integrations": {"numpy"},
    "api": set(),
    "runtime": {"numpy"},
    "multi": set(),
    "surveys": set(),
    "raw": set(),
    "doctor": set(),
    "terminal": {"rich"},
    "cli": {"typer"},
    "commands": {"typer"},
    # It trains the models that it merges, and is imported by its command alone.
    "demo": {"numpy", "rich", "safetensors", "torch", "yaml"},
    "": set(),
    **{leaf: set() for leaf in LEAVES},
}


def room_of(path: Path) -> str:
    """``pymerge/ops/view.py`` is in room ops, ``pymerge/cli.py`` in cli, ``__init__.py`` in ''."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    if ".".join(inside) in LEAVES:
        return ".".join(inside)
    return "" if inside == ("__init__",) else inside[0]


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of what import statements and import_module calls name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the arrow"
            module = node.module or ""
            if module == "pymerge":
                yield from (f"pymerge.{alias.name}" for alias in node.names)
            else:
                yield module
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not in functions, not for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_import(node)


def target_room(name: str) -> str | None:
    """The room that a dotted name is in, None where it is not ours."""
    parts = name.split(".")
    if parts[0] != "pymerge":
        return None
    if ".".join(parts[1:3]) in LEAVES:
        return ".".join(parts[1:3])
    known = {*MAY_IMPORT, *LEAVES, "_C"}
    return parts[1] if len(parts) > 1 and parts[1] in known else ""


def test_every_room_is_in_the_table():
    rooms = {room_of(path) for path in sources()}
    assert rooms == {*MAY_IMPORT, *LEAVES} & rooms
    assert set(MAY_IMPORT) | LEAVES <= rooms


def test_the_table_has_no_circle():
    graph = {room: allowed for room, allowed in MAY_IMPORT.items() if room not in ("", "demo")}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    for above, below in (
        ("cli", "engine"),
        ("engine", "plan"),
        ("plan", "recipe"),
        ("plan", "checkpoint"),
        ("plan", "methods"),
        ("methods", "ops"),
        ("ops", "kernels"),
        ("ops", "_C"),
    ):
        assert order.index(below) < order.index(above)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    file = path.relative_to(ROOT).as_posix()
    allowed = (
        LEAF_IMPORTS.get(room, set()) if room in LEAVES else LEAVES | MAY_IMPORT[room] | {room}
    )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in imported(ast.walk(tree)):
        target = target_room(name)
        if target is not None and (file, target) not in EXCEPTIONS:
            assert target in allowed, f"{file} imports {name}: {room or 'pymerge'} may not"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_third_parties_wait_for_their_use(path):
    room = room_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name.partition(".")[0] for name in imported(at_import(tree))}
    found -= {*sys.stdlib_module_names, "pymerge"}
    assert found <= THIRD_PARTIES[room]


def python(program: str, *args: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(program: str, *args: str, cwd: Path | None = None) -> set[str]:
    """The top-level modules that are loaded after a program."""
    output = python(f"{program}\nimport sys\nprint()\nprint(*sys.modules)", *args, cwd=cwd)
    return {name.partition(".")[0] for name in output.splitlines()[-1].split()}


HEAVY = {"torch", "transformers", "huggingface_hub", "sklearn", "matplotlib"}


def test_importing_pymerge_loads_nothing_else():
    assert not loaded("import pymerge") & {*HEAVY, "numpy", "pydantic", "yaml", "rich", "typer"}


def test_help_loads_nothing_heavy():
    program = (
        "import sys; sys.argv = ['pymerge', '--help']\n"
        "from pymerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert not loaded(program) & {*HEAVY, "numpy", "pydantic", "yaml"}


LINEAR = """
import pymerge
recipe = "{merge_method: linear, models: [{model: llama}, {model: llama-finance}], parameters: "
pymerge.merge(recipe + "{weight: 1}}", "out")
"""


def test_a_linear_merge_does_not_load_torch(model_folder):
    assert not loaded(LINEAR, cwd=model_folder) & HEAVY
    assert (model_folder / "out" / "model.safetensors").exists()


def test_a_linear_merge_loads_no_other_method(model_folder):
    names = python(f"{LINEAR}import sys\nprint(*sys.modules)", cwd=model_folder).split()
    files = (PACKAGE / "methods").glob("*.py")
    methods = {path.stem for path in files if "\n@method(" in path.read_text(encoding="utf-8")}
    assert len(methods) > 1
    assert {name.rpartition(".")[2] for name in names if ".methods." in name} & methods == {
        "linear"
    }


def test_ops_work_with_numpy_alone():
    program = """
import sys
for name in ("pydantic", "typer", "rich", "torch", "yaml", "safetensors", "huggingface_hub"):
    sys.modules[name] = None
import numpy as np
from pymerge import ops
out, x = np.empty(100, np.float32), np.arange(100, dtype=np.float32)
assert ops.axpy_n(ops.view(out), [ops.view(x)], [2.0]) == 0
assert (out == 2 * x).all()
ours = {name for name in sys.modules if name.startswith("pymerge.")}
print(*sorted(name.split(".")[1] for name in ours))
"""
    assert set(python(program).split()) <= {"_C", "_version", "errors", "formats", "ops"}


def hooks() -> list[dict[str, object]]:
    """The pre-commit hooks that search for a pattern."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert all(repo["repo"] == "local" for repo in config["repos"])
    found = [hook for repo in config["repos"] for hook in repo["hooks"]]
    return [hook for hook in found if hook["language"] == "pygrep"]


SUFFIXES = {
    "python": (".py",),
    "pyi": (".pyi",),
    "c++": (".cpp", ".h"),
    "c": (".h",),
    "cuda": (".cu",),
    "makefile": ("Makefile",),
    "cmake": ("CMakeLists.txt", ".cmake"),
}


def takes(hook: dict, file: str) -> bool:
    """Whether a hook looks at a file, by the rules of pre-commit."""
    types = [kind for kind in (*hook.get("types", ()), *hook.get("types_or", ())) if kind != "text"]
    suffixes = tuple(suffix for kind in types for suffix in SUFFIXES[kind])
    return (
        (not types or file.endswith(suffixes))
        and re.search(hook.get("files", ""), file) is not None
        and not ("exclude" in hook and re.search(hook["exclude"], file))
    )


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file of the working tree that git would take, by name."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("the files to look at are those of git, and this folder is no clone")
    found = {}
    for name in done.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (data := path.read_bytes()):
            found[name] = data.decode()
    return found


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_no_file_has_what_the_hooks_ban(texts, hook):
    whole = "--multiline" in hook.get("args", ())
    pattern = re.compile(hook["entry"], re.M | re.S if whole else 0)
    bad = []
    for file, text in texts.items():
        if not takes(hook, file):
            continue
        for part in [text] if whole else text.splitlines():
            if pattern.search(part):
                bad.append(f"{file}: {part.strip()[-100:]}")
                break
    assert not bad, f"{hook['name']}\n" + "\n".join(bad)


#: For each hook a text that it must find, so that a pattern cannot rot unseen.
BANNED = {
    "end-of-file": "no newline",
    "trailing-space": "blank ",
    "no-todo": "# TODO: later",
    "no-banner": "# ---------- part one",
    "no-machine-path": "see /home/someone/models",
    "no-assert": "    assert value > 0, value",
    "no-top-level-kernels": "import kernels",
    "no-removed-triton": "block = tl.make_block_ptr(p)",
    "no-bf16-cast": "x.to(tl.bfloat16)",
    "no-fast-math": "set(FLAGS -Ofast -ffast-math)",
    "no-torch-headers": "#include <torch/extension.h>",
    "no-pybind11-outside-bind": "#include <pybind11/pybind11.h>",
}


def test_the_hooks_find_what_they_ban():
    patterns = {hook["id"]: hook["entry"] for hook in hooks()}
    assert patterns.keys() == BANNED.keys()
    for name, text in BANNED.items():
        assert re.search(patterns[name], text, re.M | re.S), name
