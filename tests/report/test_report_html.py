"""The page of a report in headless Chromium: what a browser makes of it, not what we wrote."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pymerge.report.html import html_page
from pymerge.surveys import survey


class Page(HTMLParser):
    """Rows of the table of tensors, titles of marks and cells, and the elements by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.hidden: list[bool] = []
        self.titles: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._in_table = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self._open.append(tag)
        if tag == "table":
            self._in_table = found.get("id") == "tensors"
        if tag == "tr" and self._in_table:
            self.rows.append([])
            self.hidden.append("hidden" in found)
        if tag in ("td", "th") and self._in_table:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self._in_table = False

    def handle_data(self, data):
        if self._open and self._open[-1] == "title":
            self.titles.append(data)
        elif self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def shown(self) -> list[str]:
        """Names of the tensors that are not hidden, in order."""
        pairs = list(zip(self.rows, self.hidden, strict=True))[1:]
        return [row[0] for row, hidden in pairs if not hidden]

    def column(self, title: str) -> list[str]:
        place = self.rows[0].index(title)
        return [row[place] for row in self.rows[1:]]


def look(browser: str, path: Path, fragment: str = "") -> tuple[Page, str]:
    """The page after its script ran, and what the browser's console said."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=1000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{path}{fragment}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Page(done.stdout), "\n".join(said)


@pytest.fixture(scope="module")
def found(merged):
    return survey(merged.out)


@pytest.fixture
def page(found, tmp_path) -> Path:
    (tmp_path / "report.html").write_text(html_page(found), "utf-8")
    return tmp_path / "report.html"


def test_all_tensors_are_in_the_table(browser, page, found):
    seen, said = look(browser, page)
    assert not said
    assert seen.shown == [t.name for t in found.tensors]
    assert [float(text) for text in seen.column("Δ norm")] == pytest.approx(
        [t.figures.delta_norm for t in found.tensors], rel=1e-3
    )


def test_the_console_would_be_heard(browser, page):
    page.write_text("<script>undefined_name()</script>")
    _, said = look(browser, page)
    assert "undefined_name" in said


def test_the_address_filters_and_sorts(browser, page, found):
    seen, said = look(browser, page, "#filter=layers.+MLP&sort=4d")
    assert not said
    wanted = [t for t in found.tensors if "layers." in t.name and "mlp" in t.name]
    wanted.sort(key=lambda t: -t.figures.norm)
    assert seen.shown == [t.name for t in wanted]
    assert len(seen.rows) == len(found.tensors) + 1


ACT = """<script>
const heads = document.querySelectorAll("#tensors th button");
const click = (title) => [...heads].find((head) => head.textContent === title).click();
ACTIONS
</script>"""


@pytest.mark.parametrize(
    ("actions", "key", "reverse"),
    [
        ('click("conflicts")', lambda t: t.figures.conflict_rate, True),
        ('click("conflicts"); click("conflicts")', lambda t: t.figures.conflict_rate, False),
        ('click("norm"); click("tensor")', lambda t: t.name, False),
        ('click("cos math")', lambda t: t.figures.cosine(t.experts[1]), True),
    ],
)
def test_clicks_sort(browser, page, found, actions, key, reverse):
    act(page, actions)
    seen, said = look(browser, page)
    assert not said
    assert seen.shown == [t.name for t in sorted(found.tensors, key=key, reverse=reverse)]


def act(page: Path, actions: str) -> None:
    """Add a script to the page, which its policy would not run."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", ACT.replace("ACTIONS", actions) + "</body>"))


def test_typing_filters_and_a_key_hides_its_line(browser, page):
    act(
        page,
        """
        const box = document.getElementById("filter");
        box.value = "q_proj 1";
        box.dispatchEvent(new Event("input"));
        document.querySelector(".key").click();
        document.title = location.hash;
        """,
    )
    seen, said = look(browser, page)
    assert not said
    assert seen.shown == ["model.layers.1.self_attn.q_proj.weight"]
    assert "#filter=q_proj+1" in seen.titles
    lines = [attrs for tag, attrs in seen.tags if attrs.get("class", "").startswith("series")]
    assert lines[0]["style"] == "display: none;"
    assert all("style" not in attrs for attrs in lines[1:])


def test_every_layer_and_model_is_in_the_plots(browser, page, found):
    seen, _ = look(browser, page)
    for layer, figures in found.layers.items():
        for expert in found.experts:
            if layer:
                label = found.labels[expert]
                assert f"{label}, {layer}: {figures.cosine(expert):.4g}" in seen.titles
                assert f"{label}, {layer}: {figures.expert_norm(expert):.4g}" in seen.titles
    for tensor in found.tensors:
        if tensor.layer:
            wanted = f"{tensor.module}, {tensor.layer}: {tensor.figures.conflict_rate:.2%}"
            assert wanted in seen.titles


def test_nothing_is_loaded_from_anywhere(page):
    text = page.read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("http-equiv", ""))
    sources = [
        attrs[key] for _, attrs in Page(text).tags for key in ("src", "href") if key in attrs
    ]
    assert sources == ["data:,"]


HOSTILE = [
    '<img src=x onerror="document.title=1">.weight',
    "</title></table><script>document.title='owned'</script>",
    "\"'&amp;<b>",
    "</script><script>document.title='owned'</script>.weight",
]


def test_names_cannot_break_out(browser, tmp_path, write):
    """Tensors, models and folders with markup in their names stay names."""
    for name in ("base", "<i>a", "b\"'>", "</h1><script>alert(1)<"):
        tensors = {each: torch.randn(4, 3) for each in HOSTILE}
        write(tmp_path / name.replace("/", "∕"), tensors)
    out = tmp_path / "</h1><script>alert(1)<".replace("/", "∕")
    models = [str(tmp_path / name) for name in ("<i>a", "b\"'>")]
    path = tmp_path / "report.html"
    path.write_text(html_page(survey(out, base=str(tmp_path / "base"), models=models)), "utf-8")
    seen, said = look(browser, path)
    assert not said  # the policy would report a script that it stopped
    assert sorted(seen.shown) == sorted(HOSTILE)
    assert "owned" not in seen.titles[0]
    assert seen.titles[0].endswith(": merge report")
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("script") == 1
    assert not {"img", "i"} & set(tags)


def test_a_model_without_layers_and_without_numbers(browser, tmp_path, write):
    """Places are the tensors then; what is not finite leaves a gap."""
    for name in ("base", "a", "out"):
        write(
            tmp_path / name,
            {"w": torch.randn(3, 3), "v": torch.tensor([1.0, float("nan")]), "n": torch.arange(2)},
        )
    found = survey(tmp_path / "out", base=str(tmp_path / "base"), models=[str(tmp_path / "a")])
    path = tmp_path / "report.html"
    path.write_text(html_page(found), "utf-8")
    seen, said = look(browser, path, "#sort=5a")
    assert not said
    assert sorted(seen.shown) == ["n", "v", "w"]
    assert seen.shown[0] == "w"  # what has no number stands last
    marks = [text for text in seen.titles if text.startswith("a, ")]
    figures = next(t.figures for t in found.tensors if t.name == "w")
    (expert,) = found.experts
    values = (figures.expert_norm(expert), figures.cosine(expert))
    assert marks == [f"a, w: {value:.4g}" for value in values]
