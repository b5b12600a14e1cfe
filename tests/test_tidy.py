"""A mirror for the code: prints what is longest, and fails only on what has no two sides.

Run as a script (`make lint` does) it prints the ranking alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sync_engine"
MODULES = sorted(PACKAGE.rglob("*.py"))
WRITTEN = sorted(path for folder in ("src", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))
RANKED = 5
UNNUMBERED = re.compile(r"\bTO" + r"DO\b(?!\(#\d+\))")
ADDRESS = re.compile(r"://|\bwww\.|^\s*-|\s@\s", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_ranking_can_be_printed() -> None:
    print("\n".join(ranking()))
    assert list(ranking())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "begin the file with one to three sentences"


@pytest.mark.parametrize("path", [path for path in MODULES if not path.stem.startswith("__main")], ids=name_of)
def test_a_public_module_names_its_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    # A package's __init__ re-exports by importing; elsewhere only what is defined counts.
    defined = set(names_in(tree, imported=path.stem == "__init__"))
    public = {name for name in defined if not name.startswith("_")}
    if path.stem.startswith("_") and path.stem != "__init__":
        return
    listed = exported(tree)
    if listed is None:
        assert not public, f"no __all__, though it has {', '.join(sorted(public))}"
        return
    assert sorted(set(listed)) == sorted(listed), "a name is listed twice"
    assert set(listed) <= set(names_in(tree, imported=True)) | lazy(tree), "a listed name does not exist"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_shields(path: Path) -> None:
    """Since Python 3.14 it tells the loop's handler of errors whose callers are gone, with what a driver quotes."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert "shield" not in names, "await sync_engine.owned.outlasting(task)"


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_what_is_left_to_do_has_an_issue(path: Path) -> None:
    left = [number for number, line in enumerate(path.read_text().splitlines(), 1) if UNNUMBERED.search(line)]
    assert not left, f"lines {left}: write TO" + "DO(#7) with the number of an issue"


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").iterdir()), ids=name_of)
def test_constraints_pin_versions_and_name_no_address(path: Path) -> None:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert not ADDRESS.search(text)
    assert all("==" in line for line in text.split("\n") if line)


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", ".ci/run"])
def test_where_packages_come_from_is_left_to_the_machine(name: str) -> None:
    assert not re.search(r"https?://|index-url|find-links|trusted-host", (ROOT / name).read_text())


def ranking() -> Iterator[str]:
    """The longest modules and functions of the package, one line each."""
    files, functions = [], []
    for path in MODULES:
        text = path.read_text()
        name = str(path.relative_to(PACKAGE))
        files.append((len(text.splitlines()), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.lineno} {node.name}"))
    yield f"   {len(files)} modules, {sum(lines for lines, _ in files)} lines"
    for kind in (files, functions):
        for lines, name in sorted(kind, reverse=True)[:RANKED]:
            yield f"   {lines:5d}  {name}"


def exported(tree: ast.Module) -> list[str] | None:
    """The names in ``__all__``, or None where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            listed: list[str] = ast.literal_eval(node.value)
            return listed
    return None


def names_in(tree: ast.Module, *, imported: bool) -> Iterator[str]:
    """Names that a module's top level binds: functions, classes, constants and, if asked, imports."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases) if imported:
                if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                    yield from (alias.asname or alias.name.partition(".")[0] for alias in aliases)


def lazy(tree: ast.Module) -> set[str]:
    """String constants, where a module resolves its names in ``__getattr__``."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return set()
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


if __name__ == "__main__":
    print("\n".join(ranking()))
