"""The pages: short where it was promised, and no link between them leads nowhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flatshare_registry import layout
from flatshare_registry.errors import NotFound

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [
        *ROOT.glob("*.md"),
        *(page for folder in ("platform", "registry", "scripts") for page in ROOT.glob(f"{folder}/**/*.md")),
    ]
    if "node_modules" not in page.parts
)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        base = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_leads_nowhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


def test_a_long_file_says_why() -> None:
    for path in [*ROOT.glob("platform/flatshare/**/*.py"), *ROOT.glob("registry/flatshare_registry/**/*.py")]:
        text = path.read_text()
        if len(text.splitlines()) > 400:
            about = ast.get_docstring(ast.parse(text)) or ""
            assert re.search(r"\blong\b", about, re.IGNORECASE), (
                f"{path.relative_to(ROOT)} has over 400 lines"
            )


def test_the_table_of_errors_is_as_the_code_has_it() -> None:
    code = "from error_codes import PAGE, page; print(page(PAGE.read_text()), end='')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert made.stdout == (ROOT / "platform/API.md").read_text(), "run scripts/error_codes.py"


def test_the_registrys_page_has_the_layout_as_the_code_has_it() -> None:
    described = (layout.__doc__ or "").partition("::\n\n")[2].strip("\n")
    assert textwrap.dedent(described) in (ROOT / "registry/DESIGN.md").read_text()


def test_the_registrys_page_begins_with_code_that_runs() -> None:
    text = (ROOT / "registry/DESIGN.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("s3://models/prod", "memory://docs")
    before, _, after = code.partition("record = ")
    names: dict[str, object] = {}
    exec(before, names)
    with pytest.raises(NotFound, match="production"):  # it says: after a registration
        exec(f"record = {after}", names)
