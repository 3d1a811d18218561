"""Finds the files that `--input` names: files, folders, globs, standard input."""

import codecs
import errno
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.text.formats import STANDARD_INPUT_FORMATS, find_format, list_suffixes, look_into
from data_tools.text.interface import InputFile
from megatron_eso.command_line import quote
from megatron_eso.compression import SUFFIXES
from megatron_eso.errors import ConfigError

STANDARD_INPUT = "-"


def find_inputs(
    paths: Sequence[str], standard_input: str = STANDARD_INPUT_FORMATS[0]
) -> list[InputFile]:
    """List the input files in the given order, those of a folder or glob sorted by path.

    A path that does not exist may be a glob, where `**` matches any depth. Folders are searched at
    any depth, without hidden files and unknown kinds. `-` is standard input.

    Args:
        paths: The values of `--input`.
        standard_input: Name of the format of standard input.

    Raises:
        ConfigError: A path is missing, of an unknown kind, without text, or named twice.
    """
    inputs: list[InputFile] = []
    for text in paths:
        path = _to_path(text)
        # Standard input, whose kind and size no path shows.
        if text == STANDARD_INPUT:
            inputs.append(
                InputFile(
                    path=None,
                    name=text,
                    kind=standard_input,
                    compression=None,
                    num_bytes=0,
                )
            )
        # A path that exists, or else a glob.
        elif path.is_dir():
            inputs.extend(_describe_all(text, path, _search_folder(path)))
        elif path.is_file():
            inputs.append(_describe(path, path.name, f"--input {text}"))
        elif path.exists():
            raise ConfigError(
                f"--input {text}: is neither a file nor a folder; send its content to stdin, and "
                f"give --input -"
            )
        elif glob.has_magic(text):
            inputs.extend(_describe_all(text, *_match_glob(text)))
        else:
            raise ConfigError(f"--input {text}: there is no such file or folder")
    _check_distinct(inputs)
    return inputs


def _to_path(text: str) -> Path:
    """Return the path that a text names.

    Raises:
        ConfigError: No file can have this path.
    """
    if not text:
        raise ConfigError("--input '': names no file; name files or folders")
    try:
        Path(text).stat()
    except OSError as error:
        # A path that does not exist may be a glob; one that cannot be read fails later.
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"--input {quote(text)}: {error.strerror}") from None
    return Path(text)


def parse_separator(text: str) -> str:
    r"""Return the document separator of a command line, with `\n`, `\t`, `\x1e` as escapes.

    Raises:
        ConfigError: The separator is empty, or an escape is broken.
    """
    try:
        # Characters beyond Latin-1 become escapes; a broken escape at the end raises an error.
        raw = text.encode("latin-1", "backslashreplace")
        separator = codecs.decode(raw, "unicode_escape")
        separator.encode("utf-8")
    except UnicodeError as error:
        raise ConfigError(
            f"--document-separator {text}: has a broken escape; write a backslash as \\\\"
        ) from error
    if not separator:
        raise ConfigError(
            "--document-separator '': is empty; leave it out for one document per file"
        )
    return separator


def _search_folder(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file():
            yield path


def _match_glob(pattern: str) -> tuple[Path, set[Path]]:
    """Return the folder that a pattern starts from, and the files that match or lie in a match."""
    fixed: list[str] = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    found: set[Path] = set()
    for match in map(Path, glob.iglob(pattern, recursive=True)):
        found.update(_search_folder(match) if match.is_dir() else [match])
    return Path(*fixed), found


def _describe_all(text: str, root: Path, paths: Iterator[Path] | set[Path]) -> list[InputFile]:
    named = sorted(
        (path.relative_to(root).as_posix(), path) for path in paths if find_format(path) is not None
    )
    if not named:
        raise ConfigError(f"--input {text}: holds no text; the kinds are {list_suffixes()}")
    return [_describe(path, name, f"--input {text}") for name, path in named]


def _describe(path: Path, name: str, argument: str) -> InputFile:
    found = find_format(path)
    if found is None:
        raise ConfigError(f"{argument}: is of an unknown kind; the kinds are {list_suffixes()}")
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error.strerror}") from error
    compression = SUFFIXES.get(path.suffix)
    file = InputFile(
        path=path, name=name, kind=found.name, compression=compression, num_bytes=num_bytes
    )
    return look_into(file)


def _check_distinct(inputs: Sequence[InputFile]) -> None:
    seen: set[Path | None] = set()
    for file in inputs:
        path = None if file.path is None else file.path.resolve()
        if path in seen:
            raise ConfigError(
                f"--input {file.path or STANDARD_INPUT}: is named twice; name it once"
            )
        seen.add(path)
