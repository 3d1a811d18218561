"""Counts of a checkout's text: widths, lengths, names that collide, places that know something."""

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from tests.structure.modules import PACKAGES, Module, find_imports, is_in

MAX_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PHASES = re.compile("diffusion|sequential", re.IGNORECASE)
OBJECTIVE_ROOMS = ("megatron_eso.objectives", "megatron_eso.diffusion")
# A name of a checkpoint's folder or file, as a whole string or as the beginning of a pattern.
CHECKPOINT_NAMES = re.compile(r"(^|.*/)(step_($|[*(\[\\{?].*)|latest$|state\.json$)")
# Every command has a `main`.
SHARED_NAMES = {"main"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def list_wide_folders(modules: Iterable[Module]) -> dict[str, int]:
    """Folders of more files than allowed, `__init__.py` not counted, by their number."""
    widths: dict[str, int] = defaultdict(int)
    for module in modules:
        widths[module.folder] += not module.is_init
    return {folder: width for folder, width in sorted(widths.items()) if width > MAX_FILES}


def list_long_files(modules: Iterable[Module]) -> dict[str, int]:
    """Files of more lines than allowed, by their number."""
    return {
        module.path.as_posix(): module.num_lines
        for module in modules
        if module.num_lines > MAX_FILE_LINES
    }


def list_long_functions(modules: Iterable[Module]) -> dict[str, int]:
    """Functions of more lines than allowed, from `def` to the last one, by their number."""
    found = {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found[f"{module.path.as_posix()}:{node.name}"] = num_lines
    return found


def list_shared_names(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Public classes and functions that stand under one name in several files, with these."""
    files: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        names = {n.name for n in module.tree.body if isinstance(n, Function | ast.ClassDef)}
        for name in names - SHARED_NAMES:
            if not name.startswith("_"):
                files[name].append(module.path.as_posix())
    return {name: found for name, found in sorted(files.items()) if len(found) > 1}


def count_lazy_imports(modules: dict[str, Module]) -> dict[str, int]:
    """Modules of ours that functions import, by the file that does so."""
    return _count_by_file(
        modules.values(),
        lambda module: (
            i for i in find_imports(module, modules) if i.is_lazy and is_in(i.target, PACKAGES)
        ),
    )


def count_objective_name_readers(modules: Iterable[Module]) -> dict[str, int]:
    """Count reads of the attribute `objective.name`."""

    def find(module: Module) -> Iterator[ast.AST]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "name":
                owner = node.value
                if isinstance(owner, ast.Attribute):
                    is_objective = owner.attr == "objective"
                else:
                    is_objective = isinstance(owner, ast.Name) and owner.id == "objective"
                if is_objective:
                    yield node

    return _count_by_file(modules, find)


def count_phase_names(modules: Iterable[Module]) -> dict[str, int]:
    """Count identifiers and strings outside the objectives' room that name a phase."""
    outside = [module for module in modules if not is_in(module.name, OBJECTIVE_ROOMS)]
    return _count_by_file(
        outside,
        lambda module: (
            word
            for word in (*find_identifiers(module.tree), *find_strings(module.tree))
            if PHASES.search(word)
        ),
    )


def count_checkpoint_names(modules: Iterable[Module]) -> dict[str, int]:
    """Strings that name a checkpoint's folder, the newest checkpoint, or a checkpoint's state."""
    return _count_by_file(
        modules,
        lambda module: filter(CHECKPOINT_NAMES.match, find_strings(module.tree)),
    )


def count_flocks(modules: Iterable[Module]) -> dict[str, int]:
    """Count calls of `flock`."""
    return _count_by_file(modules, lambda module: find_calls(module.tree, {"flock"}))


def count_renames(modules: Iterable[Module]) -> dict[str, int]:
    """Count calls that move a file: `os.replace`, `os.rename`, `path.rename(target)`."""

    def find(module: Module) -> Iterator[ast.Call]:
        for call in find_calls(module.tree, {"replace", "rename"}):
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            is_os = isinstance(owner, ast.Name) and owner.id == "os"
            # Only paths have a `replace` of one argument: that of strings has two.
            if is_os or (len(call.args) == 1 and not call.keywords):
                yield call

    return _count_by_file(modules, find)


def find_calls(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Yield the calls of methods and of modules' functions with one of these names."""
    for node in ast.walk(tree):
        callee = node.func if isinstance(node, ast.Call) else None
        if isinstance(callee, ast.Attribute) and callee.attr in names:
            yield node


def find_identifiers(tree: ast.AST) -> Iterator[str]:
    """Names of variables, attributes, arguments, functions and classes."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str) and not isinstance(node, ast.alias):
                yield value


def find_strings(tree: ast.AST) -> Iterator[str]:
    """Yield string constants, also those of f-strings, but not docstrings."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and id(node) not in documentation:
            yield value


def _count_by_file(
    modules: Iterable[Module], find: Callable[[Module], Iterable[object]]
) -> dict[str, int]:
    counts = {module.path.as_posix(): sum(1 for _ in find(module)) for module in modules}
    return {path: count for path, count in counts.items() if count}
