"""Prints the import map of a checkout, and the counts that its structure is held to.

    python -m tests.structure.import_map [--root DIR] [--json]

The checkout may be an older one: it is read as text, and nothing of it is run.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.structure import limits
from tests.structure.modules import Module, find_imports, find_modules

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, set[str]]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of the import map."""

    name: str
    num_files: int
    """`__init__.py` not counted."""
    num_lines: int
    floor: int
    """Folders on the longest path of imports below this one; those of a circle share a floor."""
    imports: list[str]
    """Folders that its files import at their top."""
    lazy_imports: list[str]
    """Folders that only functions of it import."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A checkout's import map and counts; the counts are by file, folder or name."""

    folders: list[Folder]
    folder_circles: list[list[str]]
    """Folders that reach one another."""
    circle_imports: list[list[str]]
    """For each circle of folders, the imports from file to file that it is made of."""
    level_circles: list[list[str]]
    """Files and folders of one folder that reach one another; a folder stands for all within."""
    file_circles: list[list[str]]
    wide_folders: dict[str, int]
    long_files: dict[str, int]
    long_functions: dict[str, int]
    shared_names: dict[str, list[str]]
    lazy_imports: dict[str, int]
    objective_name_readers: dict[str, int]
    phase_names: dict[str, int]
    checkpoint_names: dict[str, int]
    flocks: dict[str, int]
    renames: dict[str, int]


def read_structure(root: Path) -> Structure:
    """Read a checkout."""
    modules = find_modules(root)
    files = list(modules.values())
    early, lazy = build_graphs(modules, lambda module: module.folder)
    folder_graph = {name: early[name] | lazy[name] for name in early}
    folder_circles = find_circles(folder_graph)
    file_early, file_lazy = build_graphs(modules, lambda module: module.path.as_posix())
    file_graph = {name: file_early[name] | file_lazy[name] for name in file_early}
    return Structure(
        folders=describe_folders(files, early, lazy, find_floors(folder_graph)),
        folder_circles=folder_circles,
        circle_imports=[list_imports_within(circle, file_graph) for circle in folder_circles],
        level_circles=find_level_circles(file_graph),
        file_circles=find_circles(file_graph),
        wide_folders=limits.list_wide_folders(files),
        long_files=limits.list_long_files(files),
        long_functions=limits.list_long_functions(files),
        shared_names=limits.list_shared_names(files),
        lazy_imports=limits.count_lazy_imports(modules),
        objective_name_readers=limits.count_objective_name_readers(files),
        phase_names=limits.count_phase_names(files),
        checkpoint_names=limits.count_checkpoint_names(files),
        flocks=limits.count_flocks(files),
        renames=limits.count_renames(files),
    )


def build_graphs(
    modules: dict[str, Module], name_node: Callable[[Module], str]
) -> tuple[Graph, Graph]:
    """Who imports whom at the top of a file, and who only within functions."""
    early: Graph = {name_node(module): set() for module in modules.values()}
    lazy: Graph = {name: set() for name in early}
    for module in modules.values():
        source = name_node(module)
        for found in find_imports(module, modules):
            target = modules.get(found.target)
            if target is not None and name_node(target) != source:
                (lazy if found.is_lazy else early)[source].add(name_node(target))
    return early, {name: lazy[name] - early[name] for name in early}


def describe_folders(
    files: list[Module], early: Graph, lazy: Graph, floors: dict[str, int]
) -> list[Folder]:
    """List the folders, from the lowest floor to the highest."""
    by_folder: dict[str, list[Module]] = defaultdict(list)
    for module in files:
        by_folder[module.folder].append(module)
    folders = [
        Folder(
            name=name,
            num_files=sum(not module.is_init for module in inside),
            num_lines=sum(module.num_lines for module in inside),
            floor=floors[name],
            imports=sorted(early[name]),
            lazy_imports=sorted(lazy[name]),
        )
        for name, inside in by_folder.items()
    ]
    return sorted(folders, key=lambda folder: (folder.floor, folder.name))


def reach(graph: Graph, start: str) -> set[str]:
    """Find what `start` imports, directly or not; itself only where it is in a circle."""
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(graph[node])
    return reached


def find_circles(graph: Graph) -> list[list[str]]:
    """Find groups of nodes that reach one another, each group once."""
    reached = {node: reach(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached[other]))
        for node in graph
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


def find_level_circles(file_graph: Graph) -> list[list[str]]:
    """Find circles between the files and folders that lie in one folder, for every folder.

    A folder stands for all that lies in it: `data` and `training` make a circle where any file of
    one imports one of the other, and the other way round.
    """
    folders = {parent for file in file_graph for parent in Path(file).parents}
    circles = []
    for folder in sorted(folders):
        names = {
            file: (folder / Path(file).relative_to(folder).parts[0]).as_posix()
            for file in file_graph
            if Path(file).is_relative_to(folder)
        }
        graph: Graph = {name: set() for name in names.values()}
        for file, name in names.items():
            inside = {names[target] for target in file_graph[file] if target in names}
            graph[name] |= inside - {name}
        circles += find_circles(graph)
    return circles


def list_imports_within(circle: list[str], file_graph: Graph) -> list[str]:
    """List imports between files of a circle's folders, as `file <- what it imports`."""
    found = []
    for file, targets in file_graph.items():
        folder = str(Path(file).parent)
        crossing = sorted(
            target for target in targets if str(Path(target).parent) in set(circle) - {folder}
        )
        if folder in circle and crossing:
            found.append(f"{file} <- {', '.join(crossing)}")
    return found


def find_floors(graph: Graph) -> dict[str, int]:
    """Compute the longest path below each node; the nodes of a circle count as one."""
    reached = {node: reach(graph, node) for node in graph}
    floors: dict[str, int] = {}
    for node in sorted(graph, key=lambda name: len(reached[name] | {name})):
        below = [other for other in reached[node] if node not in reached[other]]
        floors[node] = max((floors[other] + 1 for other in below), default=0)
    return floors


def print_structure(structure: Structure) -> None:
    """Print for a reader."""
    # The folders, from the lowest floor on.
    print("floor files lines  folder <- what it imports (by functions only: in brackets)")
    for folder in structure.folders:
        imported = [*folder.imports, *(f"({name})" for name in folder.lazy_imports)]
        print(
            f"{folder.floor:5} {folder.num_files:5} {folder.num_lines:5}  {folder.name}"
            + (f" <- {', '.join(imported)}" if imported else "")
        )
    # Circles, which should not exist.
    print(f"\ncircles of folders: {len(structure.folder_circles)}")
    for circle, imports in zip(structure.folder_circles, structure.circle_imports, strict=True):
        print(f"  {', '.join(circle)}")
        for line in imports:
            print(f"    {line}")
    for title, circles in (
        ("circles between what lies in one folder", structure.level_circles),
        ("circles of files", structure.file_circles),
    ):
        print(f"\n{title}: {len(circles)}")
        for circle in circles:
            print(f"  {', '.join(circle)}")
    # What exceeds a limit, and facts that stand in several files.
    print_counts(f"folders of more than {limits.MAX_FILES} files", structure.wide_folders)
    print_counts(f"files of more than {limits.MAX_FILE_LINES} lines", structure.long_files)
    print_counts(
        f"functions of more than {limits.MAX_FUNCTION_LINES} lines", structure.long_functions
    )
    print(f"\npublic names that stand in several files: {len(structure.shared_names)}")
    for name, files in structure.shared_names.items():
        print(f"  {name}: {', '.join(files)}")
    print_counts("imports within functions, of our modules", structure.lazy_imports)
    print_counts("reads of objective.name", structure.objective_name_readers)
    print_counts("names of a phase outside the objectives' room", structure.phase_names)
    print_counts("names of checkpoints: step_, latest, state.json", structure.checkpoint_names)
    print_counts("calls of flock", structure.flocks)
    print_counts("files and folders moved to their place", structure.renames)


def print_counts(title: str, counts: dict[str, int]) -> None:
    """Print in how many places something is, and what is counted in each."""
    print(f"\n{title}: in {len(counts)} places")
    for place, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {count:5}  {place}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure.import_map")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout; default: this one")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args = parser.parse_args()
    structure = read_structure(args.root)
    if args.json:
        print(json.dumps(dataclasses.asdict(structure), indent=2))
    else:
        print_structure(structure)


if __name__ == "__main__":
    main()
