"""The modules of a checkout and what each imports, read from its text: nothing of it is run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("megatron_eso", "pretrain", "data_tools", "checkpoints_conversion")


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file."""

    name: str
    """Dotted; that of the package for an `__init__.py`."""
    path: Path
    """Relative to the checkout."""
    num_lines: int
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.parent.as_posix()

    @property
    def is_init(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module; a name that is itself a module of ours or of megatron.core counts."""

    target: str
    is_lazy: bool
    """Whether it stands within a function."""


def is_in(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def find_modules(root: Path) -> dict[str, Module]:
    """Find the modules of a checkout's four packages, by name; empty files are left out."""
    files = {path for name in PACKAGES for path in (root / name).rglob("*.py")}
    modules = {}
    for path in sorted(path for path in files if path.stat().st_size):
        text = path.read_text(encoding="utf-8")
        inside = path.relative_to(root)
        parts = inside.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(
            name=name, path=inside, num_lines=len(text.splitlines()), tree=ast.parse(text)
        )
    return modules


def find_imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """Every import of a module, those within functions included."""
    for node, is_lazy in walk_with_laziness(module.tree):
        for target in name_targets(node, module, modules):
            yield Import(target=target, is_lazy=is_lazy)


def walk_with_laziness(node: ast.AST, is_lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether a function holds it."""
    yield node, is_lazy
    inner = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk_with_laziness(child, inner)


def name_targets(node: ast.AST, module: Module, modules: dict[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module.name if module.is_init else module.name.rpartition(".")[0]
        source = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*above, source] if source else above)
        named = [f"{source}.{alias.name}" for alias in node.names]
        ours = [name for name in named if name in modules]
        if len(ours) < len(named):
            yield source
        yield from ours
        yield from (name for name in named if name.startswith("megatron."))
