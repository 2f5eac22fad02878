"""Every command as a user runs it: the installed program, its exit code and what it prints."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from pymerge import terminal
from pymerge.methods import METHODS

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def assert_plain(done):
    """Nothing but printable text: no colours, no cursor movement, no carriage returns."""
    assert not CONTROL.search(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def merged(tiny_models, tmp_path_factory, run_pymerge):
    """A folder with the models, the recipe and the finished merge ``out``."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(tiny_models, folder, dirs_exist_ok=True)
    recipe = "merge_method: task_arithmetic\nbase_model: llama\nmodels:\n"
    recipe += "  - {model: llama-finance, parameters: {weight: 0.5}}\n"
    recipe += "  - {model: llama-medicine, parameters: {weight: 0.5}}\ndtype: bfloat16\n"
    (folder / "recipe.yml").write_text(recipe)
    done = run_pymerge("merge", "recipe.yml", "out", "--trace", "trace.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_merge_writes_a_model_and_a_summary(merged):
    folder, done = merged
    assert_plain(done)
    assert "4 tensors merged by task_arithmetic" in done.stdout
    assert done.stderr == ""
    with safe_open(folder / "out" / "model.safetensors", "np") as file:
        assert set(file.keys()) == {
            "model.embed_tokens.weight",
            "model.layers.0.mlp.weight",
            "model.layers.1.mlp.weight",
            "model.norm.weight",
        }
    assert json.loads((folder / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


def test_trace_holds_the_three_stages(merged):
    folder, _ = merged
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["cat"] for event in events if "cat" in event} == {"read", "compute", "write"}


def test_quiet_merge_prints_nothing(model_folder, run_pymerge):
    done = run_pymerge("merge", "recipe.yml", "out", "--quiet", cwd=model_folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (model_folder / "out" / "model.safetensors").exists()
    done = run_pymerge("verify", "out", "-q", cwd=model_folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_names_the_damaged_tensor(merged, run_pymerge, tmp_path):
    folder, _ = merged
    done = run_pymerge("verify", "out", cwd=folder)
    assert done.returncode == 0
    assert "out is whole" in done.stdout
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x55
    path.write_bytes(data)
    done = run_pymerge("verify", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "model.norm.weight" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_prints_text_and_json(merged, run_pymerge):
    folder, _ = merged
    done = run_pymerge("plan", "recipe.yml", "--tensors", cwd=folder, env={"COLUMNS": "120"})
    assert done.returncode == 0
    assert_plain(done)
    assert "task_arithmetic" in done.stdout
    assert "model.layers.1.mlp.weight" in done.stdout
    done = run_pymerge("plan", "recipe.yml", "--json", "--tensors", cwd=folder)
    plan = json.loads(done.stdout)
    num_elements = 32 * 8 + 2 * 8 * 16 + 8
    assert plan["bytes_read"] == 3 * 4 * num_elements
    assert sum(job["bytes"] for job in plan["jobs"]) == 2 * num_elements
    assert plan["bytes_written"] == (folder / "out" / "model.safetensors").stat().st_size
    assert plan["floor_seconds"] > 0


def test_inspect_prints_text_and_json(merged, run_pymerge):
    folder, _ = merged
    done = run_pymerge("inspect", "out", cwd=folder)
    assert done.returncode == 0
    assert_plain(done)
    assert re.search(r"model\.norm\.weight +BF16 +\[8\]", done.stdout)
    done = run_pymerge("inspect", "out", "--json", "--check", cwd=folder)
    entry = json.loads(done.stdout)["model.embed_tokens.weight"]
    assert entry["dtype"] == "BF16"
    assert entry["shape"] == [32, 8]
    assert entry["nonfinite"] == 0


def test_methods_lists_all_and_shows_one(tmp_path, run_pymerge):
    done = run_pymerge("methods", cwd=tmp_path)
    assert done.returncode == 0
    assert_plain(done)
    for name in ("linear", "passthrough", "task_arithmetic", "ties"):
        assert re.search(rf"^ *{name} ", done.stdout, re.M)
    done = run_pymerge("methods", "ties", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("weight", "density", "normalize", "lambda", "trim_scope"):
        assert re.search(rf"^ *{name} ", done.stdout, re.M)
    assert re.search(r"^preset official: .*density: 0.2, trim_scope: model", done.stdout, re.M)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_shown(name, monkeypatch):
    """Also those whose parameters have one bound, or that have none at all."""
    monkeypatch.setattr(terminal, "_out", terminal._console(out := io.StringIO()))
    spec = METHODS[name].spec
    terminal.print_method(spec)
    terminal.print_methods([spec])
    text = out.getvalue()
    assert f" {spec.model_count} " in text
    for parameter in spec.parameters.values():
        line = re.search(rf"^ *{parameter.name} .*$", text, re.M)
        assert line
        assert parameter.choices or parameter.bounds in line[0]
    for preset in spec.presets:
        assert f"\npreset {preset}: " in text


def test_doctor_tells_instruction_set_and_storage(tmp_path, run_pymerge):
    done = run_pymerge("doctor", "--measure", cwd=tmp_path)
    assert done.returncode == 0
    assert_plain(done)
    for word in ("software", "backends", "resources", "storage", "measured:"):
        assert re.search(rf"^{word}", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_version(tmp_path, run_pymerge):
    import pymerge

    done = run_pymerge("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"pymerge {pymerge.__version__}\n")


@pytest.mark.parametrize("command", ["", "merge", "demo"])
def test_help_is_plain_when_piped(tmp_path, run_pymerge, command):
    done = run_pymerge(*command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"pymerge {command}".strip() in done.stdout
    assert_plain(done)


WRONG = {
    "no command": ([], 2, "Usage"),
    "unknown command": (["marge"], 2, "marge"),
    "missing argument": (["merge"], 2, "RECIPE"),
    "unknown option": (["merge", "recipe.yml", "x", "--fast"], 2, "--fast"),
    "threads": (["merge", "recipe.yml", "x", "--threads", "0"], 2, "--threads"),
    "no recipe": (["merge", "missing.yml", "x"], 2, "missing.yml"),
    "size": (["merge", "recipe.yml", "x", "--memory", "much"], 2, "for example 2GiB"),
    "too little memory": (["merge", "recipe.yml", "x", "--memory", "1MiB"], 2, "at least"),
    "shard size": (["plan", "recipe.yml", "--shard-size", "0"], 2, "shard size"),
    "backend": (["merge", "recipe.yml", "x", "--backend", "abacus"], 2, "cpu, reference"),
    "read method": (["merge", "recipe.yml", "x", "--read-method", "osmosis"], 2, "dontcache"),
    "non-finite": (["merge", "recipe.yml", "x", "--non-finite", "maybe"], 2, "expected warn"),
    "no manifest": (["verify", "llama"], 2, "pymerge_manifest.json"),
    "no checkpoint": (["inspect", "./nothing"], 2, "./nothing"),
    "method": (["methods", "tise"], 2, "did you mean 'ties'"),
    "output below a file": (["merge", "recipe.yml", "recipe.yml/x"], 3, "recipe.yml/x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_is_one_message_and_an_exit_code(model_folder, run_pymerge, case):
    args, code, words = WRONG[case]
    done = run_pymerge(*args, cwd=model_folder)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert_plain(done)
    assert not (model_folder / "x").exists()


def test_misspelt_recipe_names_line_and_nearest(model_folder, run_pymerge):
    text = (model_folder / "recipe.yml").read_text().replace("density", "densty", 1)
    (model_folder / "recipe.yml").write_text(text)
    done = run_pymerge("plan", "recipe.yml", cwd=model_folder)
    assert done.returncode == 2
    assert "line 5" in done.stderr
    assert "did you mean 'density'" in done.stderr


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["--debug", "merge", "missing.yml", "x"], {}),
        (["merge", "missing.yml", "x", "--debug"], {}),
        (["merge", "missing.yml", "x"], {"PYMERGE_DEBUG": "1"}),
    ],
    ids=["before", "after", "variable"],
)
def test_debug_shows_the_traceback(tmp_path, run_pymerge, args, env):
    done = run_pymerge(*args, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "RecipeError: no recipe file at 'missing.yml'" in done.stderr


def test_importing_the_command_line_imports_nothing_heavy():
    program = "import sys, pymerge.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    heavy = {"numpy", "pydantic", "rich", "torch", "yaml", "transformers", "safetensors"}
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())


def test_interrupted_command_says_so_and_exits_with_130(monkeypatch, capsys):
    """Ctrl-C outside a merge: the option parser swallows it, the command line must not."""
    import pymerge.checkpoint
    from pymerge import cli

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pymerge.checkpoint, "open_checkpoint", interrupt)
    monkeypatch.setattr("sys.argv", ["pymerge", "inspect", "somewhere"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_extension_is_one_message(tmp_path):
    """Every command of an installation whose native part does not load says so, and why."""
    hide = "import sys; sys.modules['pymerge._C'] = None; from pymerge import cli; "
    for arguments in (["methods"], ["plan", "recipe.yml"], ["inspect", "model"]):
        call = f"{hide}sys.argv = {['pymerge', *arguments]!r}; cli.main()"
        done = subprocess.run(
            [sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "pymerge._C" in done.stderr
        assert "Traceback" not in done.stderr
