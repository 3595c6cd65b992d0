"""Who may import whom, read from the source's syntax tree: DESIGN.md section 8 as a test.

Imports under ``if TYPE_CHECKING`` bind nobody at run time and are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent
PACKAGE = TREE / "qemu_remus"

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "streams": set(),
    "nbd": {"core"},
    "qemu": {"core", "nbd", "streams"},  # see NBD_IN_QEMU
    "storage": {"core", "nbd"},  # see NBD_IN_STORAGE
    "link": {"core", "streams"},
    "control_socket": {"core"},
    "control_client": {"core"},
    "control": {"core", "control_socket", "streams"},
    "primary": {"core", "link", "qemu", "nbd", "storage", "control", "streams"},  # see STORAGE_IN_PRIMARY
    "secondary": {"core", "link", "storage", "control", "streams"},
    "config": {"core"},
    "logs": {"core"},
    "status": {"core"},
    "toolstack": {"core", "control_client"},
    "cli": {"core", "qemu", "config", "logs", "status", "control_client", "toolstack", "primary", "secondary"},
}
"""Component of the package -> components that it may import, besides itself."""

NBD_IN_QEMU = {"qemu.attachment", "qemu.bitmap_look", "qemu.transport", "qemu.push", "qemu.staging"}
"""An epoch leaves QEMU over NBD: the first three put the halves together; or by push, in batches of the same kind."""

NBD_IN_STORAGE = {"storage.daemon_target"}
"""What we cannot write by ourselves is written over NBD."""

STORAGE_IN_PRIMARY = {"storage.memory"}
"""The primary has a state directory, and nothing else on disk."""

PURE = {
    "nbd.batches",
    "nbd.buffer",
    "nbd.negotiation",
    "nbd.protocol",
    "nbd.windows",
    "qemu.bitmap_file",
    "qemu.block_tree",
    "qemu.capabilities",
    "qemu.commands",
    "qemu.disks",
    "qemu.epoch",
    "qemu.faults",
    "qemu.nodes",
    "qemu.probe_checks",
    "qemu.probe_host_checks",
    "qemu.probe_model",
    "qemu.probe_text",
    "qemu.protocol",
    "qemu.schema",
    "storage.blockdev",
    "storage.format",
}
"""Pure halves outside core: no I/O, no clock, no randomness, no logging, and nothing that has them."""

IMPURE = {
    "asyncio",
    "fcntl",
    "logging",
    "mmap",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "structlog",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "trio",
}

IMPURE_CALLS = {"open", "input", "print", "uuid1", "uuid4", "now", "today", "utcnow", "read_bytes", "read_text"}

LONG = {
    "core.primary_machine": "a third of it names what can be had from it; all steps are read together",
    "storage.store": "one store: the order of all its durable acts is read together",
}
LINES = 500


def name_of(path: Path) -> str:
    """The module's name within the package; the package's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def is_pure(module: str) -> bool:
    return module.split(".")[0] == "core" or module in PURE


def run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from run_time(child)


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything that is imported; ``from a import b`` yields ``a.b``."""
    for node in run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported, by their names within it."""
    found = set()
    for name in imports(tree):
        if name.startswith("qemu_remus."):
            inner = name.removeprefix("qemu_remus.")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            if inner:
                found.add(inner)
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down_and_shells_do_not_import_each_other(module: str) -> None:
    component = module.split(".")[0]
    assert component in MAY_IMPORT, f"say in MAY_IMPORT whom {component} may import"
    for imported in ours(TREES[module]):
        other = imported.split(".")[0]
        assert other == component or other in MAY_IMPORT[component], f"{module} must not import {imported}"
        if (component, other) == ("qemu", "nbd"):
            assert module in NBD_IN_QEMU, f"{module} must not import {imported}"
        if (component, other) == ("storage", "nbd"):
            assert module in NBD_IN_STORAGE, f"{module} must not import {imported}"
        if (component, other) == ("primary", "storage"):
            assert imported in STORAGE_IN_PRIMARY, f"{module} must not import {imported}"


def test_the_layers_have_no_cycle() -> None:
    settled: set[str] = set()
    while layer := {name for name, below in MAY_IMPORT.items() if name not in settled and below <= settled}:
        settled |= layer
    assert settled == set(MAY_IMPORT)


@pytest.mark.parametrize("module", [name for name in MODULES if is_pure(name)])
def test_pure_modules_do_no_io_and_know_neither_time_nor_chance(module: str) -> None:
    tree = TREES[module]
    assert not {name.split(".")[0] for name in imports(tree)} & IMPURE
    assert not {name for name in ours(tree) if not is_pure(name) and MODULES[name].name != "__init__.py"}
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert not calls & IMPURE_CALLS


def test_the_lists_of_this_test_name_modules_that_exist() -> None:
    assert PURE | NBD_IN_QEMU | NBD_IN_STORAGE | STORAGE_IN_PRIMARY | set(LONG) <= set(MODULES)
    assert set(MAY_IMPORT) == {name.split(".")[0] for name in MODULES if name}


def test_only_the_qemu_part_knows_the_qmp_library() -> None:
    users = {module for module, tree in TREES.items() if any(name.split(".")[0] == "qemu" for name in imports(tree))}
    assert users
    assert all(module.split(".")[0] == "qemu" for module in users)


def test_the_guardian_starts_fast_because_it_imports_only_the_standard_library() -> None:
    allowed = {"__future__", "collections", "json", "os", "select", "signal", "socket", "sys", "time", "typing"}
    allowed |= {"argparse", "contextlib", "ctypes", "dataclasses", "enum", "errno", "types"}
    assert {name.split(".")[0] for name in imports(TREES["qemu.guardian"])} <= allowed
    # Python runs these before it.
    assert not list(imports(TREES["qemu"]))
    assert not set(imports(TREES[""])) - {"__future__.annotations"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_first_what_it_is(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree) or not tree.body


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_enough_to_be_read_or_says_why_not(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    if module in LONG:
        assert lines > LINES, f"{module} is short enough now: take it off the list"
    else:
        assert lines <= LINES
