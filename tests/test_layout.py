"""Imports point one way: cli → api → study, ship → engine → methods → base, data → core (DESIGN section 6)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src" / "katei"
RANK = {
    "core": 0,
    "data": 1,
    "base": 1,
    "methods": 2,
    "engine": 3,
    "ship": 4,
    "study": 4,
    "doctor": 4,
    "api": 5,
    "progress": 6,
    "printing": 6,
    "cli": 7,
}
PRINTS = {"cli.py"}


def imports(file: Path) -> set[str]:
    """Top-level parts of katei that a file imports for use; what is imported for types alone does not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "katei" else [f"katei.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("katei.")}
    return found & set(RANK)


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        if part(file) in RANK:
            wrong += [
                f"{file.relative_to(ROOT)} imports {other}" for other in imports(file) if RANK[other] > RANK[part(file)]
            ]
    assert wrong == []


def test_data_and_base_do_not_know_each_other() -> None:
    files = [*(ROOT / "data").glob("*.py"), *(ROOT / "base").glob("*.py")]
    assert [f.name for f in files if {"data", "base"} <= imports(f) | {part(f)}] == []


def test_only_the_commands_print() -> None:
    def prints(file: Path) -> bool:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print" for n in nodes)

    assert {f.name for f in ROOT.rglob("*.py") if prints(f)} <= PRINTS


def test_a_method_is_a_string_in_one_place() -> None:
    """No branch anywhere compares with a method's name."""
    from katei.methods import METHODS

    found = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                found += [f"{file.name}:{node.lineno}" for word in words if word in METHODS]
    assert found == []
