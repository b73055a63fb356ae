"""Imports point one way. Read from the source, so that an import inside a function counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_prep", "launcher", "training", "model_configs")
RANK_ONLY = {"torch", "megatron", "transformers", "transformer_engine"}

# What each room may import of Phidias. `launcher` alone is the CLI.
ALLOWED = {
    "data_prep": {"data_prep"},
    "model_configs": set(),
    "launcher.config": {"launcher.config", "data_prep", "model_configs"},
    "launcher.plan": {"launcher.plan", "launcher.config", "data_prep"},
    "launcher.rundir": {"launcher.rundir", "launcher.plan", "launcher.config", "data_prep"},
    "launcher.report": {"launcher.report", "launcher.rundir", "launcher.plan", "launcher.config", "data_prep"},
    "launcher.jobs": {"launcher.jobs", "launcher.report", "launcher.rundir", "launcher.plan", "launcher.config", "data_prep"},
    "launcher.verbs": {"launcher", "data_prep"},
    "launcher.cli": {"launcher.verbs", "launcher.rundir"},
    "launcher.__main__": {"launcher.cli"},
    "training": {"training", "launcher.plan", "launcher.config", "launcher.rundir", "data_prep"},
}


def modules():
    return [
        (path, path.relative_to(ROOT).with_suffix("").parts) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    ]


def room_of(parts):
    return parts[0] if parts[0] != "launcher" else ".".join(parts[:2])


def imports(tree, *, top_level=False):
    """Every module the file imports, as dotted names; `top_level`: what importing the file imports."""
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            # `from launcher import config` imports launcher.config
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name, package):
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize(("path", "parts"), modules(), ids=[".".join(parts) for _, parts in modules()])
def test_imports_point_one_way(path, parts):
    room = room_of(parts)
    if parts == ("launcher", "__init__"):
        room = "launcher.cli"
    names = list(imports(ast.parse(path.read_text())))
    ours = [name for name in names if name.split(".")[0] in PACKAGES]
    wrong = [name for name in ours if not any(is_inside(name, allowed) for allowed in ALLOWED[room])]
    assert not wrong, f"{room} may import {sorted(ALLOWED[room])} of Phidias"
    if parts[0] != "training":
        assert not [name for name in names if name.split(".")[0] in RANK_ONLY], "only training/ imports these"


def test_every_room_has_a_rule():
    rooms = {room_of(parts) for _, parts in modules() if parts != ("launcher", "__init__")}
    assert rooms == set(ALLOWED)


def test_the_command_line_imports_nothing_heavy():
    """`phidias --help` answers at once: only the standard library, and modules of ours that import no more than that."""
    seen, todo = set(), ["launcher.cli"]
    while todo:
        name = todo.pop()
        path = next(
            (p for p in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__init__.py") if p.exists()),
            None,
        )
        if path is None or name in seen:
            continue
        seen.add(name)
        names = list(imports(ast.parse(path.read_text()), top_level=True))
        heavy = {"hydra", "omegaconf", "pydantic", "yaml", "numpy", "rich"} | RANK_ONLY
        assert not [found for found in names if found.split(".")[0] in heavy], name
        for found in names:
            pieces = found.split(".")
            todo += [".".join(pieces[: i + 1]) for i in range(len(pieces))] if pieces[0] in PACKAGES else []
    assert "launcher.verbs" in seen
