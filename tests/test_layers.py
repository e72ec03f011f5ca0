"""The promises between the packages, read from the source: imports, what is torch-free, how long things are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = {"model": set[str](), "export": {"model"}, "serve": {"model", "export"}}
"""What each package may import of the others."""

HEAVY = {"torch", "safetensors", "tensorboard", "onnx", "onnxscript"}
"""What no server has."""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def sources() -> dict[str, Path]:
    """Every module of the packages that is written by hand, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[:2] != ("serve", "pb"):
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def torch_free() -> set[str]:
    """What the packages' own docstrings promise to be torch-free, and all of serve."""
    promised = {name for name in SOURCES if name.partition(".")[0] == "serve"}
    for package in ("model", "export"):
        line = re.search(r"Torch-free.*", ast.get_docstring(TREES[package]) or "", re.DOTALL)
        assert line is not None
        promised |= {f"{package}.{module}" for module in re.findall(r"`(\w+)`", line[0])}
    return promised


def imports(name: str, *, everywhere: bool) -> Iterator[str]:
    """Modules that a module imports: when it is itself imported, or (everywhere) in its functions too."""
    nodes: list[ast.AST] = list(ast.walk(TREES[name])) if everywhere else list(_at_import(TREES[name]))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not type_checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _at_import(node)


@pytest.mark.parametrize("name", SOURCES)
def test_packages_import_in_one_direction(name: str) -> None:
    package = name.partition(".")[0]
    others = {module.partition(".")[0] for module in imports(name, everywhere=True)} & PACKAGES.keys()
    assert others - {package} <= PACKAGES[package]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_use_nothing_of_the_tests(path: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in nodes if (node.module or "").partition(".")[0] == "tests"]


@pytest.mark.parametrize("name", sorted(torch_free()))
def test_what_is_promised_torch_free_loads_no_torch(name: str) -> None:
    seen, waiting = set[str](), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for imported in imports(module, everywhere=False):
            assert imported.partition(".")[0] not in HEAVY, f"{module} imports {imported}"
            if imported in SOURCES:
                waiting.append(imported)


def test_promises_name_modules_that_are_there() -> None:
    assert torch_free() <= SOURCES.keys()
    assert {"model.search", "model.tokenizer", "export.manifest", "export.runtime"} <= torch_free()


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_stay_short(name: str) -> None:
    assert len(SOURCES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION]
    assert long == []


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith("__main__")])
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name])
