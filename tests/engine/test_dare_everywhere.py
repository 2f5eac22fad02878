"""One DARE merge, the same SHA-256 on every path: instruction sets, emulated GPU backends, threads,
memory, and after a stop and a kill with a resume."""

from __future__ import annotations

import functools
import importlib.util
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pymerge import api, ops

METHODS = ("dare_ties", "dare_linear", "della")


def recipe(models: Any, method: str) -> dict[str, Any]:
    own = {"weight": 0.6, "density": 0.4} | ({"epsilon": 0.1} if method == "della" else {})
    return {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(path), "parameters": own} for path in models.tuned],
        "parameters": {"seed": 41},
        "dtype": "bfloat16",
    }


def weights(folder: Path, digests: Any) -> dict[str, str]:
    found = {name: digest for name, digest in digests(folder).items() if "safetensors" in name}
    assert found
    return found


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, digests: Any) -> Any:
    """By the reference ops, in this process."""

    @functools.cache
    def found(models: Any, method: str) -> dict[str, str]:
        out = tmp_path_factory.mktemp("truth") / method
        api.merge(recipe(models, method), out, backend="reference", threads=1)
        return weights(out, digests)

    return found


PATHS: dict[str, tuple[list[str], dict[str, str]]] = {
    **{f"cpu-{isa}": (["--backend", "cpu"], {"PYMERGE_ISA": isa}) for isa in ops.available_isas()},
    "cpu-1-thread": (["--threads", "1"], {}),
    "cpu-2-threads": (["--threads", "2"], {}),
    "cpu-small-memory": (["--memory", "128MiB", "--threads", "2"], {}),
    "cuda-emulated": (["--backend", "cuda"], {"PYMERGE_CUDA_EMULATE": "1"}),
    "triton-interpreter": (["--backend", "triton"], {"TRITON_INTERPRET": "1"}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_same_digest(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_recipe: Any,
    command: Any,
    digests: Any,
    truth: Any,
    method: str,
    path: str,
) -> None:
    if path == "triton-interpreter" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # Triton's interpreter takes milliseconds for every block of every kernel.
    models = request.getfixturevalue("tiny" if path == "triton-interpreter" else "small")
    options, environment = PATHS[path]
    file = write_recipe(tmp_path / "recipe.yml", recipe(models, method))
    code, printed = command("merge", file, tmp_path / "out", *options, **environment)
    assert code == 0, printed
    assert weights(tmp_path / "out", digests) == truth(models, method)


@pytest.mark.parametrize("method", METHODS)
def test_same_digest_after_a_stop(
    small: Any, tmp_path: Path, digests: Any, stop_after: Any, truth: Any, method: str
) -> None:
    with stop_after(4):
        api.merge(recipe(small, method), tmp_path / "out")
    report = api.merge(recipe(small, method), tmp_path / "out")
    assert report.num_resumed == 4
    assert weights(tmp_path / "out", digests) == truth(small, method)


def test_same_digest_after_a_kill(
    many: Any, tmp_path: Path, write_recipe: Any, start_command: Any, command: Any, digests: Any
) -> None:
    file = write_recipe(tmp_path / "recipe.yml", recipe(many, "dare_ties"))
    code, printed = command("merge", file, tmp_path / "whole")
    assert code == 0, printed
    out = tmp_path / "out"
    process = start_command("merge", file, out, "--threads", "1")
    journal = out / ".pymerge-journal"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 20:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    assert process.wait() == -signal.SIGKILL, "the merge ended before it could be killed"
    assert journal.exists()
    code, printed = command("merge", file, out)
    assert code == 0, printed
    assert weights(out, digests) == weights(tmp_path / "whole", digests)
