"""The layout of DESIGN section 6, read from the source: imports point one way, and only the printers print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import katei

SOURCE = Path(katei.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# cli → api → study, ship → plan → engine → methods → base, data → core; each may import what stands in a lower row.
# methods stand above base since a method acts on a base's sites; doctor tells of base and api alone tells of doctor;
# progress shows an engine, printing a study.
ROWS = (
    ("core",),
    ("base", "data"),
    ("methods",),
    ("engine", "doctor"),
    ("plan",),
    ("study", "ship"),
    ("progress",),
    ("printing",),
    ("api",),
    ("cli", "sklearn"),
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}


def part_of(module: str) -> str:
    """katei.base.load → base"""
    return module.split(".")[1] if "." in module else "katei"


def name_of(file: Path) -> str:
    names = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(file: Path, *, at_load: bool = False) -> Iterator[str]:
    """Modules of katei that the file imports, anywhere in it or only while it is loaded; not those for type hints alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    nodes = tree.body if at_load else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "katei")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            if node.module == "katei":
                for alias in node.names:
                    inner = SOURCE / alias.name
                    yield f"katei.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").exists() else "katei"
            elif node.module and node.module.startswith("katei."):
                yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file))
def test_imports_point_one_way(file: Path) -> None:
    mine = part_of(name_of(file))
    for module in imported(file):
        theirs = part_of(module)
        if "katei" in (mine, theirs) or mine == theirs:
            continue
        assert theirs in ROW, f"{theirs} is new: give it its row"
        same_row = {mine, theirs} == {"study", "ship"}  # a run writes models, a merge reads a run's recipe
        assert ROW[theirs] < ROW[mine] or same_row, f"{name_of(file)} imports {module}"


def test_no_two_files_import_each_other_while_loading() -> None:
    graph = {name_of(file): set(imported(file, at_load=True)) for file in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file))
def test_only_the_printers_print(file: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    # gguf_classify is a program of its own, written beside an exported model
    may = ("katei.cli", "katei.printing", "katei.ship.gguf_classify")
    assert calls == [] or name_of(file) in may, f"lines {calls}"


def test_nothing_executes_what_it_reads() -> None:
    """Safetensors only: no pickle, no torch.load, no eval, no remote code (promise 9)."""
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(names), file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "np.load", "numpy.load"), f"{file}:{node.lineno}"
                for keyword in node.keywords:
                    assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", file


def test_tests_mirror_the_folders() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    tests = Path(__file__).parent
    missing = {name for name in folders - {"core"} if not list((tests / name).glob("test_*.py"))}
    assert missing == set()
