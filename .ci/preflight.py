"""Look for what the installation needs before anything is downloaded; run by make.

It runs in the system's Python and keeps to what old ones understand, so that they get a sentence.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig

OLDEST = (3, 10)
PROGRAM = b"#include <string_view>\nint main() { if constexpr (true) return 0; }\n"


def problems():
    """Sentences that each name one missing thing and how to get it."""
    if sys.version_info < OLDEST:
        yield (
            f"pymerge needs Python {OLDEST[0]}.{OLDEST[1]} or newer, {sys.executable} is "
            f"{sys.version.split()[0]}; name another, for example make test PYTHON=python3.12"
        )
        return
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            yield (
                f"this Python has no module {module}; install the package that brings it "
                "(python3-venv on Debian and Ubuntu)"
            )
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        yield (
            f"Python.h is not in {include}; install the headers of this Python "
            "(python3-dev on Debian and Ubuntu, python3-devel on Fedora)"
        )
    problem = compiler_problem()
    if problem:
        yield problem


def compiler_problem():
    """Why no C++17 program can be compiled, or None. CMake looks for a compiler in this order."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [name for name in names if shutil.which(shlex.split(name)[0])]
    if not found:
        tried = ", ".join(names)
        return f"no C++ compiler found (looked for {tried}); install one, such as g++, or set CXX"
    command = [*shlex.split(found[0]), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 0:
        return None
    said = done.stdout.decode(errors="replace").strip()
    return f"{found[0]} does not compile C++17; install a newer compiler or set CXX\n{said}"


if __name__ == "__main__":
    sentences = list(problems())
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1 if sentences else 0)
