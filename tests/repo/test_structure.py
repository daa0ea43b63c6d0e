"""The structure of the proxy: levels of packages, sizes, names, docstrings, and a test for each module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.support.documents import ROOT

PROXY = ROOT / "proxy"
PACKAGE = PROXY / "xgen_proxy"
TESTS = [ROOT / "tests" / "unit", ROOT / "tests" / "integration"]

# Highest first. A package or top-level module imports only what stands on a line below its own.
LEVELS = [
    {"cli"},
    {"launch"},
    {"costs"},
    {"models"},
    {"server"},
    {"app"},
    {"reload", "api"},
    {"gateway"},
    {"observability"},
    {"forwarding"},
    {"routing"},
    {"fleet"},
    {"config"},
    {"dialects", "translation"},
    {"request", "downstream"},
    {"upstream", "sse", "gguf"},
    {"errors", "garbage_collection", "own_limits", "supervision", "values"},
    {"__init__"},  # the version
]
LEVEL = {name: -number for number, names in enumerate(LEVELS) for name in names}

MODULE_LINES = 400
FOLDER_MODULES = 11
FUNCTION_LINES = 60
UNDOCUMENTED_LINES = 15  # of a public class that explains itself

# Modules without a test file of their own, and the tests that cover them.
TESTED_ELSEWHERE = {
    "app": "every integration test starts it",
    "api.translated": "tests of each API that is translated",
    "translation.translation": "has protocols only, which type checkers read",
    "gateway": "every integration test runs through it",
}


@dataclass(frozen=True)
class Module:
    path: Path

    @property
    def name(self) -> str:
        """Dotted, without the package: `fleet.backend`. `fleet` for a package's `__init__`."""
        parts = list(self.path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The package at the top, or the module itself where it is in none."""
        return self.name.partition(".")[0]

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
MODULES = {module.name: module for module in map(Module, sorted(PACKAGE.rglob("*.py")))}
each_module = pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)


def imports(module: Module) -> set[str]:
    """The modules of the proxy that this one imports, also in functions and under TYPE_CHECKING."""
    found = set()
    for node in module.nodes(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            found |= {resolve(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: imports are absolute"
            found |= {resolve(f"{node.module}.{alias.name}") for alias in node.names}
    return {name for name in found if name and name != module.name}


def resolve(dotted: str) -> str | None:
    """`xgen_proxy.fleet.backend.Backend` → `fleet.backend`; None for what is not the proxy's."""
    top, _, name = dotted.partition(".")
    if top != "xgen_proxy":
        return None
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, its first one repeated at the end; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                if circle := visit(target, [*path, node]):
                    return circle
            done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_find_circle() -> None:
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_modules_do_not_import_in_a_circle() -> None:
    assert find_circle({name: imports(module) for name, module in MODULES.items()}) == []


def test_packages_do_not_import_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {module.room: set() for module in MODULES.values()}
    for module in MODULES.values():
        rooms[module.room] |= {MODULES[name].room for name in imports(module)} - {module.room}
    assert find_circle(rooms) == []


@each_module
def test_imports_point_down(module: Module) -> None:
    others = {name: MODULES[name].room for name in imports(module) if MODULES[name].room != module.room}
    assert {name for name, room in others.items() if LEVEL[room] >= LEVEL[module.room]} == set()


def test_every_level_exists() -> None:
    assert set(LEVEL) == {module.room for module in MODULES.values()}


@each_module
def test_the_proxy_imports_no_other_folder_of_the_repository(module: Module) -> None:
    others = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    for node in module.nodes(ast.Import, ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]  # type: ignore[attr-defined]
        assert not {name.partition(".")[0] for name in names} & others, names


# -- sizes -------------------------------------------------------------------------------------------------------------


@each_module
def test_modules_are_short(module: Module) -> None:
    assert len(module.text.splitlines()) <= MODULE_LINES


@pytest.mark.parametrize(
    "folder", sorted({module.path.parent for module in MODULES.values()}), ids=lambda path: path.name
)
def test_folders_have_few_modules(folder: Path) -> None:
    names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(names) <= FOLDER_MODULES, names


@each_module
def test_functions_are_short(module: Module) -> None:
    sizes = {each.name: lines_of(each) for each in module.nodes(*FUNCTION) if isinstance(each, FUNCTION)}
    assert {name: lines for name, lines in sizes.items() if lines > FUNCTION_LINES} == {}


def lines_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


# -- names -------------------------------------------------------------------------------------------------------------


def classes() -> dict[str, list[str]]:
    """Every class of the proxy and the names of its bases."""
    found = {}
    for module in MODULES.values():
        for node in module.nodes(ast.ClassDef):
            assert isinstance(node, ast.ClassDef)
            found[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return found


def test_exceptions_end_in_error() -> None:
    bases = classes()

    def is_exception(name: str) -> bool:
        if name in bases:
            return any(is_exception(base) for base in bases[name] if base != name)
        return name in ("Exception", "BaseException") or name.endswith(("Error", "Exception"))

    exceptions = {name for name in bases if is_exception(name)}
    assert "ProxyError" in exceptions
    assert {name for name in exceptions if not name.endswith("Error")} == set()


def test_every_module_has_a_test_of_its_name() -> None:
    untested = {
        module.name for module in MODULES.values() if module.path.name != "__init__.py" and not find_tests(module)
    }
    assert untested == set(TESTED_ELSEWHERE)


def find_tests(module: Module) -> list[Path]:
    inside = module.path.relative_to(PACKAGE)
    places = [folder / inside.parent / f"test_{inside.name}" for folder in TESTS]
    return [place for place in places if place.exists()]


def test_every_folder_of_tests_mirrors_a_package() -> None:
    folders = {path.parent.relative_to(top) for top in TESTS for path in top.rglob("test_*.py")}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} == set()


@each_module
def test_only_dialects_tell_engines_apart_by_name(module: Module) -> None:
    """What differs between engines is a method of `Dialect`."""
    if module.room == "dialects":
        return
    compared = [side for node in module.nodes(ast.Compare) for side in (node.left, *node.comparators)]  # type: ignore[attr-defined]
    assert [ast.unparse(side) for side in compared if re.search(r"\bdialect\.name$", ast.unparse(side))] == []


@each_module
def test_only_commands_print(module: Module) -> None:
    if module.name in ("cli", "models.progress"):
        return
    calls = [node.func for node in module.nodes(ast.Call)]  # type: ignore[attr-defined]
    assert [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"] == []


@each_module
def test_modules_that_are_started_are_not_taken_from_the_current_folder(module: Module) -> None:
    """`python -m` looks there first, and it may be a repository of others; `-P` stops that."""
    commands = [[ast.unparse(each) for each in node.elts] for node in module.nodes(ast.List, ast.Tuple)]  # type: ignore[attr-defined]
    python = [command for command in commands if "sys.executable" in command and "'-m'" in command]
    assert [command for command in python if "'-P'" not in command] == []


# -- docstrings --------------------------------------------------------------------------------------------------------


@each_module
def test_modules_have_docstrings(module: Module) -> None:
    is_empty_package = module.path.name == "__init__.py" and not module.text.strip()
    assert is_empty_package or ast.get_docstring(module.tree)


@each_module
def test_large_public_classes_have_docstrings(module: Module) -> None:
    """A class of a few lines may explain itself."""
    classes = [node for node in module.tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    large = [node for node in classes if lines_of(node) > UNDOCUMENTED_LINES]
    assert [node.name for node in large if not ast.get_docstring(node)] == []


@each_module
def test_docstrings_are_statements(module: Module) -> None:
    documented = [module.tree, *module.nodes(*FUNCTION, ast.ClassDef)]
    first = [(ast.get_docstring(node) or "").partition("\n")[0] for node in documented]  # type: ignore[arg-type]
    assert [line for line in first if line.endswith("?")] == []
