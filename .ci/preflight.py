"""Look for what the installation needs before anything is downloaded; run by make with the system's Python.

Keeps to the syntax of old Pythons, so that they get a sentence too.
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
            "pymerge needs Python {}.{} or newer, {} is {}; name another with PYTHON=, for example "
            "make test PYTHON=python3.12".format(*OLDEST, sys.executable, sys.version.split()[0])
        )
        return
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            yield (
                "this Python has no module {}; install the package that brings it "
                "(python3-venv on Debian and Ubuntu)".format(module)
            )
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        yield (
            "Python.h is not in {}; install the headers of this Python "
            "(python3-dev on Debian and Ubuntu, python3-devel on Fedora)".format(include)
        )
    problem = compiler_problem()
    if problem:
        yield problem


def compiler_problem():
    """Why no C++17 program can be compiled, or None. CMake makes the same choice of compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [name for name in names if shutil.which(shlex.split(name)[0])]
    if not found:
        return (
            "no C++ compiler found (looked for {}); install one, for example g++, or set CXX".format(
                ", ".join(names)
            )
        )
    command = [*shlex.split(found[0]), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 0:
        return None
    return "{} does not compile C++17; install a newer compiler or set CXX\n{}".format(
        found[0], done.stdout.decode(errors="replace").strip()
    )


if __name__ == "__main__":
    found = list(problems())
    for sentence in found:
        print("error: " + sentence, file=sys.stderr)
    sys.exit(1 if found else 0)
