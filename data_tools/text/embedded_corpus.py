"""`corpus`: writes English text that comes with CPython, for first trials without a download.

A topic of `pydoc_data` is one document; so are the docstrings of a module of the standard library.
The sources are read with `ast`: nothing is imported, so nothing runs. Repeated paragraphs are left
out: topics overlap, and no text may be in both training and validation.
"""

import ast
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import new_file

# Tests are not prose; installed packages differ between machines.
_EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}
_TOPICS = Path("pydoc_data", "topics.py")


def write_corpus(out: Path) -> int:
    """Write the corpus to a new JSONL file with the key `text`.

    Returns:
        The number of documents.

    Raises:
        ConfigError: The file exists, or its folder does not.
        DataError: This Python has no library in source form.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; remove it or give another file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    library = Path(sysconfig.get_path("stdlib"))
    with new_file(out) as file:
        documents = list(collect_documents(library))
        if not documents:
            raise DataError(f"{library}: holds no library in source form; use a complete Python")
        for text in documents:
            file.write(json.dumps({"text": text}).encode("ascii") + b"\n")
    size = sum(len(text.encode("utf-8")) for text in documents)
    sys.stdout.write(f"{out}: {len(documents)} documents, {size / 1e6:.2f} MB of text\n")
    return len(documents)


def collect_documents(library: Path) -> Iterator[str]:
    """Yield the documents of a standard library, in a fixed order."""
    seen: set[str] = set()
    for texts in itertools.chain(_read_topics(library / _TOPICS), _read_modules(library)):
        paragraphs = []
        for paragraph in "\n\n".join(texts).split("\n\n"):
            stripped = paragraph.strip("\n")
            if stripped and stripped not in seen:
                seen.add(stripped)
                paragraphs.append(stripped)
        if paragraphs:
            yield "\n\n".join(paragraphs) + "\n"


def _read_topics(path: Path) -> Iterator[list[str]]:
    if not path.is_file():
        return
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            for name in sorted(topics):
                yield [topics[name]]


def _read_modules(library: Path) -> Iterator[list[str]]:
    for path in sorted(
        library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()
    ):
        if _EXCLUDED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            yield _read_docstrings(path)


def _read_docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions, in the order of the source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # some libraries hold templates and files that are broken on purpose
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 0), text))
    return [text for _, text in sorted(found, key=lambda entry: entry[0])]
