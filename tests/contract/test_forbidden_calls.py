"""What no code of ours may do, by its syntax tree: unpickle, evaluate, load weights that run code, use a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("platform", "registry", "scripts") for path in (ROOT / folder).rglob("*.py")]

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "numpy.load", "subprocess.getoutput",
         "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}  # fmt: skip
TRUSTED = {
    # `flatshare convert` reads a checkpoint that its own user vouches for, and says so; never a server.
    ("platform/flatshare/models/convert.py", "torch.jit.load"),
    # The contenders of the benchmark, written as their own documentation does.
    ("scripts/bench/fastapi_lru/app.py", "torch.jit.load"),
    ("scripts/bench/litserve_lru/app.py", "torch.jit.load"),
    ("scripts/bench/stock_ray/app.py", "torch.jit.load"),
    # By hand, on this tree's own source: whether a mutant parses, and the module that a break is in.
    ("scripts/mutation/mutants.py", "compile"),
    ("scripts/promise_plugin.py", "importlib.import_module"),
}


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """What names mean that an import gave: ``import torch as t`` and ``from torch import load`` too."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def name_of(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value, aliases)}.{node.attr}"
    return "?"


def problems(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}.{one}" for one in names if one in MODULES)
        elif isinstance(node, ast.Call):
            name = name_of(node.func, aliases)
            keywords = {one.arg: one.value for one in node.keywords}
            if name in CALLS or name == "torch.jit.load":
                yield name
            weights_only = keywords.get("weights_only")
            if name == "torch.load" and not (
                isinstance(weights_only, ast.Constant) and weights_only.value is True
            ):
                yield "torch.load without weights_only=True"
            shell = keywords.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                yield f"{name} with a shell"
            allow = keywords.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                yield f"{name} with allow_pickle"
            verify = keywords.get("verify")
            if isinstance(verify, ast.Constant) and verify.value is False:
                yield f"{name} without verification"


ALSO_TRUSTED = {
    # Asks our own edge on this machine whether it answers; sends no key and reads no answer.
    ("platform/flatshare/local/platform.py", "httpx.HTTPTransport without verification"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_forbidden(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    found = {one for one in problems(path.read_text()) if (where, one) not in TRUSTED | ALSO_TRUSTED}
    assert not found, f"{where}: {found}"


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "import cloudpickle.x", "eval('1')", "exec('1')",
     "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)", "torch.jit.load(f)",
     "subprocess.run('x', shell=True)", "run('x', shell=flag)", "yaml.load(f)", "os.system('x')",
     "np.lib.format.read_array(f, allow_pickle=True)", "httpx.Client(verify=False)",
     "from torch import load\nload(f)", "import torch as t\nt.load(f)", "from torch import load as l\nl(f)",
     "from yaml import load\nload(f)", "yaml.unsafe_load(f)", "from os import system\nsystem('x')",
     "subprocess.getoutput('x')", "asyncio.create_subprocess_shell('x')", "from ray import cloudpickle",
     "import importlib\nimportlib.import_module(x)", "import numpy as np\nnp.load(f)"],
)  # fmt: skip
def test_each_would_be_found(text: str) -> None:
    assert list(problems(text))


def test_every_exception_is_still_needed() -> None:
    used = {
        (path.relative_to(ROOT).as_posix(), one) for path in SOURCES for one in problems(path.read_text())
    }
    assert used >= TRUSTED | ALSO_TRUSTED
