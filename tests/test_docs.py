"""The documents are current, their links lead somewhere, and the site can be built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rsa_fast.methods import METHODS
from rsa_fast.tools.docs import ABOUT, GENERATED, MEASURED, pages, small_budget
from tests.helpers import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
RESULTS = (DOCS / "results.md").read_text()
BEGIN = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FIGURES = DOCS / "figures"


def test_the_generated_pages_are_those_that_the_code_makes():
    made = pages(RESULTS)
    kept = {str(path.relative_to(DOCS)): path.read_text() for path in DOCS.rglob("*.md")}
    kept = {name: text for name, text in kept.items() if GENERATED in text}
    stale = [name for name in sorted({*made, *kept}) if made.get(name) != kept.get(name)]
    assert not stale, f"not as the code is: {', '.join(stale)}. To write them again: make docs"


def test_every_method_has_a_page_a_link_and_its_figures():
    assert set(ABOUT) == set(METHODS) and set(MEASURED) <= set(METHODS)
    papers = {about.paper for about in ABOUT.values() if "arxiv" in about.paper}
    assert set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README)) == papers
    assert set(re.findall(r"docs/methods/([\w-]+)\.md", README)) == set(METHODS)
    _, rows = small_budget(RESULTS)
    labels = {label for names in MEASURED.values() for label in names}
    assert labels | {"random initialisation"} == set(rows)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", BEGIN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if FIGURES in target.parents and not FIGURES.is_dir():
            pytest.skip("docs/figures does not exist: the pictures were not drawn")
        assert target.is_file(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {link}"


def test_the_files_named_in_the_architecture_exist():
    listed = (DOCS / "architecture.md").read_text().partition("## Files")[2]
    place: list[str] = []
    for line in re.findall(r"^ *[\w.]+[\w./-]*(?=  +\S)|^ +[\w]+/$", listed, re.M):
        depth = (len(line) - len(line.lstrip())) // 2
        place = [*place[:depth], line.strip()]
        assert ROOT.joinpath(*place).exists(), line
    assert place == ["tests/"]


def test_the_site_is_built_and_loads_nothing_from_the_network(tmp_path):
    if not (find_spec("mkdocs") and find_spec("material")):
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(  # strict: a broken link or a page that is not listed is an error
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in DOCS.rglob("*.md"):
        html = (tmp_path / path.relative_to(DOCS)).with_suffix(".html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*?src=\"?([^\"> ]+)", html)
        loaded += re.findall(r"<link[^>]*?href=\"?([^\"> ]+)[^>]*?rel=\"?stylesheet", html)
        loaded += re.findall(r"<link[^>]*?rel=\"?stylesheet[^>]*?href=\"?([^\"> ]+)", html)
        assert loaded and not [url for url in loaded if url.startswith(("http", "//"))], path
