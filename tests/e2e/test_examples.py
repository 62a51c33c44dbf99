"""``platform/examples`` that call a platform: the client, and the notebook's cells in their order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from .conftest import FLATSHARE, Platform

EXAMPLES = Path(__file__).parents[2] / "platform" / "examples"


@pytest.fixture(scope="module")
def environment(platform: Platform) -> dict[str, str]:
    """What the README's start leaves: a tenant that answers, and a key of it."""
    platform.add("example", 500)
    return {
        **platform.environment,
        "FLATSHARE_URL": platform.url,
        "KEY": platform.key("example"),
        "MODEL": "example",
    }


def run(environment: dict[str, str], *command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_the_client_classifies_and_says_why_it_could_not(
    platform: Platform, environment: dict[str, str], tmp_path: Path
) -> None:
    made = run(environment, FLATSHARE, "train", "digits", "--count", "2", "--out", "digits", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    done = run(
        environment,
        sys.executable,
        EXAMPLES / "client.py",
        "example",
        "digits/0.png",
        "digits/1.png",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    asked = run(environment, FLATSHARE, "predict", "example", "digits/0.png", "--json", folder=tmp_path)
    (label,) = json.loads(asked.stdout)["predicted_label"]
    first, second = done.stdout.splitlines()
    assert first == f"digits/0.png: {label}, by example@1" and second.endswith("by example@1")
    refused = run(
        environment, sys.executable, EXAMPLES / "client.py", "nobody", "digits/0.png", folder=tmp_path
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("not_found: there is no tenant nobody (request ")


def test_every_cell_of_the_notebook_runs(environment: dict[str, str], tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "ray_serve.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), (
        "kept without outputs"
    )
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    done = run({**os.environ, **environment}, sys.executable, "cells.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("Predicted labels: [") and said[1] == said[0], "both forms say the same"
    assert any(line.startswith("400 ") for line in said) and "notebook-7" in said and "64 labels" in said
    streamed = [json.loads(line) for line in said if line.startswith('{"index"')]
    assert sorted(one["index"] for one in streamed) == [0, 1, 2] and all(
        "predicted_label" in one for one in streamed
    )
    assert [line.split() for line in said if line.startswith(("example", "somebody"))] == [
        ["example", "200", "device"], ["example@1", "200", "device"], ["somebody-else", "404", "not_found"],
    ]  # fmt: skip
    assert said[-1].startswith(("200 ", "202 "))
