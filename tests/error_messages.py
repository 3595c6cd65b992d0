"""Finds every message of every error that the package can raise, by walking its syntax trees.

A message is the first argument of an error class of :mod:`qemu_remus.core.errors` (``what``), with ``...`` where it
varies. Where that argument is handed on, it is looked for where it comes from: the callers of the function whose
parameter it is, the assignments to the variable. What cannot be followed like that is an error of *ours*: write the
message where the error is made, or say in ``tests/test_docs_faq.py`` why nobody needs an entry for it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qemu_remus.core import errors

PACKAGE = Path(errors.__file__).parent.parent
VARIES = "..."
_DEPTH = 4

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Message:
    """One message.

    :param text: with ``...`` for what varies.
    :param kind: the error's class.
    :param where: ``module:line``.
    """

    text: str
    kind: str
    where: str


@dataclass(frozen=True, order=True)
class Unknown:
    """An error whose message could not be followed to where it is written.

    :param expression: what is handed on there.
    """

    expression: str
    kind: str
    where: str


def classes() -> dict[str, type[errors.QemuRemusError]]:
    """All error classes by name."""
    found = {name: getattr(errors, name) for name in errors.__all__}
    return {
        name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, errors.QemuRemusError)
    }


def find(package: Path = PACKAGE) -> Iterator[Message | Unknown]:
    """All of them."""
    trees = {
        ".".join(path.relative_to(package).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }
    helpers = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)}
    for module, tree in trees.items():
        yield from _Module(module, tree, helpers).find()


class _Module:
    def __init__(self, name: str, tree: ast.Module, helpers: set[str]) -> None:
        self._name = name
        self._tree = tree
        self._helpers = helpers
        """Functions of the whole package: what they make themselves is found in them."""
        self._inside: dict[ast.AST, _Function] = {}
        self._classes = {name: name for name in classes()}
        self._raised = {node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)}
        for function in ast.walk(tree):
            if isinstance(function, _Function):
                for node in ast.walk(function):
                    # The innermost is met last.
                    self._inside[node] = function

    def find(self) -> Iterator[Message | Unknown]:
        for call in ast.walk(self._tree):
            if isinstance(call, ast.Call):
                for kind, argument in self._errors(call):
                    where = f"{self._name}:{call.lineno}"
                    for text in self._texts(argument, self._inside.get(call), _DEPTH):
                        if text is None and _called(call) in self._helpers:
                            continue
                        if text is None:
                            yield Unknown(ast.unparse(argument), kind, where)
                        else:
                            yield Message(_tidy(text), kind, where)

    def _errors(self, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
        """The error that a call makes, and its message."""
        name = _called(call)
        if name == "__init__" and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "super()":
            owner = next((kind for kind in self._owners(call) if kind in self._classes), None)
            if owner is not None and call.args and not isinstance(call.args[0], ast.Name):
                yield owner, call.args[0]
        elif name in ("CommandFailed", "CommandInDoubt"):
            return  # their message is made in the class, from a command's name
        elif name in self._classes:
            yield name, _first(call)
        elif any(keyword.arg in ("safe", "hint") for keyword in call.keywords) and call.args:
            # The class is in a variable, or it is made in a function of another module, from the message given here.
            if not self._defined(name):
                yield name or "?", call.args[0]
        elif name == "Diagnosis":
            yield name, _first(call)
        elif call in self._raised and call.args and self._varies(call):
            yield name or "?", call.args[0]

    def _varies(self, call: ast.Call) -> bool:
        """Whether what is called is no class that is written there: a parameter, or ``type(error)``."""
        if isinstance(call.func, ast.Call):
            return _called(call.func) == "type"
        function = self._inside.get(call)
        return (
            isinstance(call.func, ast.Name) and function is not None and _parameter(function, call.func.id) is not None
        )

    def _owners(self, node: ast.AST) -> Iterator[str]:
        for owner in ast.walk(self._tree):
            if isinstance(owner, ast.ClassDef) and any(inner is node for inner in ast.walk(owner)):
                yield owner.name

    def _defined(self, name: str) -> bool:
        return any(isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name == name for node in ast.walk(self._tree))

    def _texts(self, value: ast.expr, function: _Function | None, depth: int) -> Iterator[str | None]:
        """What an expression may be as text; None where that cannot be followed."""
        match value:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                for one in self._texts(left, function, depth):
                    for other in self._texts(right, function, depth):
                        yield (VARIES if one is None else one) + (VARIES if other is None else other)
            case ast.IfExp(body=body, orelse=orelse):
                yield from self._texts(body, function, depth)
                yield from self._texts(orelse, function, depth)
            case ast.Name(id=name) if depth:
                yield from self._named(name, function, depth - 1)
            case _:
                yield None

    def _named(self, name: str, function: _Function | None, depth: int) -> Iterator[str | None]:
        found = list(self._assigned(name, function))
        if function is not None and not found:
            place = _parameter(function, name)
            if place is not None:
                found = [
                    (argument, self._inside.get(call))
                    for call in ast.walk(self._tree)
                    if isinstance(call, ast.Call) and _called(call) == function.name
                    for argument in _argument(call, name, place)
                ]
        if not found:
            yield None
        for value, inside in found:
            yield from self._texts(value, inside, depth)

    def _assigned(self, name: str, function: _Function | None) -> Iterator[tuple[ast.expr, _Function | None]]:
        for node in ast.walk(function or self._tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        yield node.value, function
                    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        for inner, value in zip(target.elts, node.value.elts, strict=False):
                            if isinstance(inner, ast.Name) and inner.id == name:
                                yield value, function
        if function is not None and _parameter(function, name) is None:
            for node in self._tree.body:
                match node:
                    case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                        yield value, None
                    case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                        yield value, None


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _first(call: ast.Call) -> ast.expr:
    if call.args:
        return call.args[0]
    return next((keyword.value for keyword in call.keywords if keyword.arg == "what"), ast.Constant(VARIES))


def _parameter(function: _Function, name: str) -> int | None:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    if name in names:
        return names.index(name)
    return -1 if name in [argument.arg for argument in function.args.kwonlyargs] else None


def _argument(call: ast.Call, name: str, place: int) -> Iterator[ast.expr]:
    yield from (keyword.value for keyword in call.keywords if keyword.arg == name)
    if 0 <= place < len(call.args):
        yield call.args[place]


def _tidy(text: str) -> str:
    """One ``...`` for several in a row, and nothing that a heading of Markdown cannot hold."""
    return re.sub(r"(?:\.\.\.)+", VARIES, text.replace("`", "'")).strip()
