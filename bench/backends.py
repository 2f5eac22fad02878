"""What our backends take beside their hosts: FusionBench, sd-mecha and PEFT.

    python bench/backends.py                   all three
    python bench/backends.py peft --repeat 5   one

Each host runs in its own environment (make bench-peers) and does every merge by itself and by
pymerge in turns, in one process with the same threads: what is reported is the median of each and
their ratio. FusionBench's pools hold a Llama-shaped float32 model (22 MB) and three tuned ones;
sd-mecha merges the same tensors from files to memory; PEFT combines three adapters of rank 16 of a
model whose layers are 1024 wide. Start-up and loading are outside of what is timed, the reading of
files inside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from machine import ROOT, describe, machine_line

HOSTS = {
    "fusion_bench": ROOT / ".venv-fusionbench",
    "sd_mecha": ROOT / ".venv-peers",
    "peft": ROOT / ".venv-peers",
}
PACKAGES = ("pymerge-engine", "numpy", "torch", "fusion-bench", "sd-mecha", "peft")
DRIVER = Path(__file__).with_name("backends_driver.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("hosts", nargs="*", help=f"of {', '.join(HOSTS)}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    unknown = set(options.hosts) - set(HOSTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(HOSTS)}")
    machine = machine_line(PACKAGES)
    print(describe(machine))
    rows = []
    for host in options.hosts or HOSTS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            words = [host, str(out), str(options.repeat), str(options.threads)]
            subprocess.run([HOSTS[host] / "bin" / "python", DRIVER, *words], check=True)
            report = json.loads(out.read_text())
        for row in report["rows"]:
            row = {"host": host, "version": report["version"], **row}
            rows.append(row)
            print(
                f"{host:12} {row['case']:16} {row['host_seconds']:8.3f} s  pymerge "
                f"{row['pymerge_seconds']:8.3f} s  {row['ratio']:6.2f} times"
            )
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = ROOT / "bench" / "results" / f"backends-{stamp}.json"
    report = {"machine": machine, "threads": options.threads, "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
