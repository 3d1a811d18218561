"""Limits of the tree: narrow folders, short files and functions, imports without a circle."""

import ast
import re
from pathlib import Path

import pytest

from tests.structure.import_map import ROOT, Structure, find_floors, read_structure

# Files of a sampler directory, and a name that no file may have.
FILES_OF_OTHERS = {"modeling_eso_lm.py", "configuration_eso_lm.py", "utils.py"}


@pytest.fixture(scope="module")
def structure() -> Structure:
    return read_structure(ROOT)


def test_no_circle_of_files(structure: Structure) -> None:
    assert structure.file_circles == []


def test_no_circle_within_a_folder(structure: Structure) -> None:
    assert structure.level_circles == []


def test_no_circle_of_folders(structure: Structure) -> None:
    assert structure.folder_circles == [], "\n".join(map(str, structure.circle_imports))


def test_folders_are_narrow(structure: Structure) -> None:
    assert structure.wide_folders == {}


def test_files_are_short(structure: Structure) -> None:
    assert structure.long_files == {}


def test_functions_are_short(structure: Structure) -> None:
    assert structure.long_functions == {}


DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "checkpoints_conversion/README.md", "data_tools/README.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [t for t in targets if not (ROOT / document).parent.joinpath(t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document: str) -> None:
    folders = (ROOT, ROOT / "megatron_eso", (ROOT / document).parent)
    text = (ROOT / document).read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([\w/]+\.py)`", text) if "NAME" not in name}
    missing = [name for name in names if not any((f / name).is_file() for f in folders)]
    assert [name for name in missing if name not in FILES_OF_OTHERS] == []


def list_imports(path: Path) -> list[tuple[str, bool]]:
    """List the modules that a file imports, and whether a function imports them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node not in tree.body))
        elif isinstance(node, ast.Import):
            found += [(alias.name, node not in tree.body) for alias in node.names]
    return found


def test_no_test_module_imports_another() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): module
        for path in (ROOT / "tests").rglob("*.py")
        for module, _ in list_imports(path)
        if re.match(r"tests\.(.+\.)?test_", module)
    }
    assert found == {}


def test_functions_of_ranks_import_nothing() -> None:
    for path in [*(ROOT / "tests/ranks").glob("*.py"), *(ROOT / "tests/parallel").glob("*.py")]:
        assert [module for module, in_function in list_imports(path) if in_function] == [], path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_circles_and_floors_are_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "megatron_eso/errors.py": "X = 1\n",
            "megatron_eso/config/sections.py": "from megatron_eso.errors import X\n",
            "megatron_eso/model/block.py": "from ..config import sections\n",
            "megatron_eso/model/late.py": "def f():\n    import megatron_eso.training.loop\n",
            "megatron_eso/training/loop.py": "import megatron_eso.model.block\n",
            "pretrain/train.py": "from megatron_eso.training.loop import run\n",
        },
    )
    found = read_structure(tmp_path)
    assert found.file_circles == []
    assert found.folder_circles == [["megatron_eso/model", "megatron_eso/training"]]
    assert found.level_circles == found.folder_circles
    assert found.circle_imports == [
        [
            "megatron_eso/model/late.py <- megatron_eso/training/loop.py",
            "megatron_eso/training/loop.py <- megatron_eso/model/block.py",
        ]
    ]
    floors = {folder.name.rpartition("/")[2]: folder.floor for folder in found.folders}
    assert floors == {"megatron_eso": 0, "config": 1, "model": 2, "training": 2, "pretrain": 3}
    assert found.lazy_imports == {"megatron_eso/model/late.py": 1}
    assert find_floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}


def test_a_room_between_two_files_of_its_folder_is_no_circle_of_one_level(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "megatron_eso/training/step.py": "X = 1\n",
            "megatron_eso/training/records/tags.py": "import megatron_eso.training.step\n",
            "megatron_eso/training/loop.py": "from .records import tags\n",
        },
    )
    found = read_structure(tmp_path)
    assert found.folder_circles == [["megatron_eso/training", "megatron_eso/training/records"]]
    assert found.level_circles == []
    write(tmp_path, {"megatron_eso/training/step.py": "from .records.tags import X\n"})
    assert read_structure(tmp_path).level_circles == [
        ["megatron_eso/training/records", "megatron_eso/training/step.py"]
    ]


def test_what_is_counted(tmp_path: Path) -> None:
    # A tree with one or more of everything that is counted.
    long_function = "def long():\n" + "    x = 1\n" * 60
    write(
        tmp_path,
        {
            "data_tools/builds/a.py": "def run():\n    pass\n\n\ndef main():\n    pass\n",
            "data_tools/builds/b.py": "class run:\n    pass\n\n\ndef main():\n    pass\n",
            "data_tools/builds/c.py": long_function + "Y = 1\n" * 400,
            "megatron_eso/objectives/eso_lm.py": "name = 'diffusion'\n",
            "megatron_eso/training/step.py": '"""diffusion"""\nloss = f"loss_{x}_sequential"\n',
            "megatron_eso/runs/paths.py": (
                "import os, fcntl\n"
                "a = ['latest', 'the latest', f'step_{n:08d}', 'step_seconds', 'x/state.json']\n"
                "fcntl.flock(f, 1)\n"
                "os.replace(a, b)\n"
                "path.rename(other)\n"
                "text.replace('a', 'b')\n"
                "if config.objective.name == objective.name: pass\n"
            ),
            **{f"pretrain/m{number}.py": "X = 1\n" for number in range(13)},
            "pretrain/__init__.py": "",
        },
    )
    # The counts.
    found = read_structure(tmp_path)
    assert found.wide_folders == {"pretrain": 13}
    assert found.long_files == {"data_tools/builds/c.py": 461}
    assert found.long_functions == {"data_tools/builds/c.py:long": 61}
    assert found.shared_names == {"run": ["data_tools/builds/a.py", "data_tools/builds/b.py"]}
    assert found.phase_names == {"megatron_eso/training/step.py": 1}
    paths = "megatron_eso/runs/paths.py"
    assert found.checkpoint_names == {paths: 3}
    assert found.flocks == {paths: 1}
    assert found.renames == {paths: 2}
    assert found.objective_name_readers == {paths: 2}
