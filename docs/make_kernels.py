"""Write the op table of docs/kernels.md from pymerge/ops/table.py; the rest of the page is prose.

Run it after a change of the table: ``make docs``. A test compares.
"""

from __future__ import annotations

from pathlib import Path

from pymerge.ops.table import OPS, Op

PAGE = Path(__file__).with_name("kernels.md")
BEGIN = "<!-- ops: made by docs/make_kernels.py from pymerge/ops/table.py; do not edit -->\n"
END = "<!-- ops: end -->\n"


def render(page: str) -> str:
    """The page with a fresh table between the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks one of the marks {BEGIN!r} and {END!r}")
    head = ("op", "numerics", "memory traffic per element", "backends")
    lines = [head, ("---",) * len(head), *(row(op) for op in OPS.values())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    details = "\n\n".join(f"`{op.signature}`\n\n{escaped(op.doc)}" for op in OPS.values())
    return f"{before}{begin}\n{table}\n\n{details}\n\n{end}{after}"


def row(op: Op) -> tuple[str, ...]:
    return (f"`{op.name}`", op.numerics, traffic_text(op), ", ".join(op.backends))


def escaped(text: str) -> str:
    """Code marks as Markdown has them, and stars as they are."""
    return text.replace("``", "`").replace("*", r"\*")


def traffic_text(op: Op) -> str:
    """The arrays of which the op reads or writes every element."""
    moved = op.traffic
    return " + ".join(name for name in (moved.base, moved.models, moved.out, moved.masks) if name)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
