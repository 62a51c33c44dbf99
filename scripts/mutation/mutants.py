"""One change to one place of a module, found in its syntax tree: what ``scripts/mutate`` tries."""

from __future__ import annotations

import ast
import copy
import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Equivalent", "Mutant", "mutants_of", "read_equivalent", "sort_out"]

COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
PLUMBING: Final = ("logger", "warnings")
"""Calls on these say something to people; a test that holds their words holds nothing."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one place changed.

    Attributes
    ----------
    kind
        What sort of change: comparison, arithmetic, constant, boolean, logic, forced, not, dropped.
    line
        Where it begins, from 1.
    end
        Its last line.
    before, after
        The lines that differ, each stripped, joined with spaces: how people name the change.
    text
        The whole module, changed.
    """

    kind: str
    line: int
    end: int
    before: str
    after: str
    text: str

    @property
    def diff(self) -> str:
        """The change as diff lines."""
        return f"- {self.before}\n+ {self.after}"


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A change that no test can see, and why."""

    file: str
    before: str
    after: str
    reason: str


def mutants_of(source: str) -> list[Mutant]:
    """Every change that is tried in a module, in the order of its lines."""
    lines = source.splitlines(keepends=True)
    found: dict[str, Mutant] = {}
    for kind, node, new in _changes(ast.parse(source)):
        text = _replaced(lines, node, new)
        if text is None or text == source:
            continue
        try:
            compile(text, "<mutant>", "exec")
        except SyntaxError:
            continue  # a place where such a change makes no module: `yield` in a dropped statement, say
        before, after = _differing(source, text)
        found.setdefault(text, Mutant(kind, node.lineno, node.end_lineno or node.lineno, before, after, text))
    return sorted(found.values(), key=lambda one: (one.line, one.end, one.after))


def read_equivalent(path: Path) -> list[Equivalent]:
    """The list of changes that no test can see; each must have a reason.

    Raises
    ------
    ValueError
        An entry lacks one of its four texts.
    """
    if not path.exists():
        return []
    entries = tomllib.loads(path.read_text()).get("equivalent", [])
    for entry in entries:
        if set(entry) != {"file", "before", "after", "reason"} or not all(map(str.strip, entry.values())):
            raise ValueError(f"{path}: an entry needs file, before, after and reason: {entry}")
    return [Equivalent(**entry) for entry in entries]


def sort_out(
    mutants: list[Mutant], file: str, equivalent: list[Equivalent]
) -> tuple[list[Mutant], list[Mutant], list[Equivalent]]:
    """Those to try, those that are listed as equivalent, and entries for this file that match none of them."""
    listed = {(one.before, one.after): one for one in equivalent if one.file == file}
    same = [mutant for mutant in mutants if (mutant.before, mutant.after) in listed]
    hit = {(mutant.before, mutant.after) for mutant in same}
    stale = [one for key, one in listed.items() if key not in hit]
    return [mutant for mutant in mutants if mutant not in same], same, stale


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.stmt | ast.expr, ast.AST | None]]:
    """Kind, the node to replace, and what by: None drops a statement."""
    for node in _walk(tree):
        if isinstance(node, ast.stmt):
            if _may_go(node):
                yield "dropped", node, None
            if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
                yield "arithmetic", node, _with(node, op=ARITHMETIC[type(node.op)]())
        if isinstance(node, ast.If | ast.IfExp):
            yield "forced", node.test, ast.Constant(True)
            yield "forced", node.test, ast.Constant(False)
        elif isinstance(node, ast.While):
            if not isinstance(node.test, ast.Constant):
                yield "forced", node.test, ast.Constant(False)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield "forced", test, ast.Constant(True)
        elif isinstance(node, ast.Compare):
            for index, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                    yield "comparison", node, _with(node, ops=ops)
        elif isinstance(node, ast.BinOp):
            if type(node.op) in ARITHMETIC and not _is_text(node):
                yield "arithmetic", node, _with(node, op=ARITHMETIC[type(node.op)]())
        elif isinstance(node, ast.BoolOp):
            yield "logic", node, _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield "not", node, node.operand
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield "boolean", node, ast.Constant(not node.value)
            elif isinstance(node.value, int | float):
                yield "constant", node, ast.Constant(node.value + 1)
                yield "constant", node, ast.Constant(node.value - 1)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes whose change can be seen: no annotations, texts, logging, assertions or chosen figures."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if (
                not isinstance(child, ast.AST)
                or isinstance(child, ast.Assert | ast.JoinedStr)
                or _is_plumbing(child)
            ):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield child
            yield from _walk(child)


def _is_plumbing(node: ast.AST) -> bool:
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Final"):
        return True  # a figure that somebody chose: a test of it would say it once more
    if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["__all__"]:
        return True
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    called = ast.unparse(node.value.func)
    return called.split(".")[0] in PLUMBING


def _may_go(node: ast.stmt) -> bool:
    """Whether the module still makes sense without a statement: a name that is missing proves nothing."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Await | ast.Yield | ast.YieldFrom)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    if isinstance(node, ast.Return):
        return node.value is not None and not (
            isinstance(node.value, ast.Constant) and node.value.value is None
        )
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break)


def _is_text(node: ast.BinOp) -> bool:
    """Whether this puts texts together or formats them."""
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in (node.left, node.right)
    )


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _replaced(lines: list[str], node: ast.stmt | ast.expr, new: ast.AST | None) -> str | None:
    """The module's text with one node replaced; None where its place in the text is not what it says."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    head = lines[first].encode()[: node.col_offset].decode()
    tail = lines[last].encode()[node.end_col_offset :].decode()
    middle = "".join(lines[first : last + 1]).encode()
    middle = middle[node.col_offset : len(middle) - len(tail.encode())]
    try:
        if not isinstance(node, ast.expr):
            ast.parse(_flat(middle.decode()))
        elif ast.dump(ast.parse(f"({middle.decode()})", mode="eval").body) != ast.dump(node):
            return None
    except SyntaxError:
        return None
    if new is None:
        put = "pass"
    elif isinstance(new, ast.expr):
        put = ast.unparse(new)
        put = put if isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Attribute) else f"({put})"
    else:
        put = ast.unparse(new)
    return "".join([*lines[:first], head + put + tail, *lines[last + 1 :]])


def _flat(statement: str) -> str:
    """A statement as a module of its own; what only stands in a function or a loop is put into both."""
    inner = "\n ".join(["  " + statement.splitlines()[0], *statement.splitlines()[1:]])
    return f"async def f():\n while x:\n{inner}\n"


def _differing(before: str, after: str) -> tuple[str, str]:
    """The lines in which two texts differ."""
    matcher = difflib.SequenceMatcher(
        None, old := before.splitlines(), new := after.splitlines(), autojunk=False
    )
    gone: list[str] = []
    come: list[str] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            gone += old[i:j]
            come += new[k:m]
    return " ".join(map(str.strip, gone)), " ".join(map(str.strip, come))
