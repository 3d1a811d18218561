"""Stores the options and inputs of a build, which continues with the same ones only."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.text.interface import InputFile
from data_tools.text.spans import Span, plan_spans
from megatron_eso.compression import Compression
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import ConfigError
from megatron_eso.files import write_once

PLAN_FILE = "plan.json"
FORMAT_VERSION = 1
"""Version of the files of an unfinished build; another version is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedInput:
    """An input file, without its path on one machine."""

    name: str
    kind: str
    compression: Compression | None
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """All that the bytes of the datasets depend on; the fields have the names of the options."""

    text_key: str
    document_separator: str | None
    validation: float
    deduplicate: bool
    shuffle: int | None
    record_tokens: int
    shard_records: int
    span_bytes: int
    tokenizer: TokenizerFingerprint
    input: tuple[PlannedInput, ...]

    def plan_spans(self) -> list[Span]:
        """Return the spans of the input, which follow from the sizes of the files."""
        files = [
            InputFile(
                path=None,
                name=file.name,
                kind=file.kind,
                compression=file.compression,
                num_bytes=file.num_bytes,
            )
            for file in self.input
        ]
        return plan_spans(files, self.span_bytes)

    def find_difference(self, other: "BuildPlan") -> str | None:
        """Describe the first option in which another plan differs: `--option A, not B`."""
        for each in dataclasses.fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if ours == theirs:
                continue
            option = f"--{each.name.replace('_', '-')}"
            if each.name == "tokenizer":
                return f"{option} of model {ours.model_sha256[:12]}, not {theirs.model_sha256[:12]}"
            if each.name == "input":
                return f"{option} {_compare_inputs(ours, theirs)}"
            return f"{option} {ours}, not {theirs}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """A build plan, and what merging needs besides."""

    plan: BuildPlan
    num_parts: int
    """Number of parts of the build, by which missing parts are named."""
    tokenizer_files: Mapping[str, bytes]


def list_inputs(files: Sequence[InputFile]) -> tuple[PlannedInput, ...]:
    """List the inputs without their paths on this machine."""
    return tuple(
        PlannedInput(
            name=file.name, kind=file.kind, compression=file.compression, num_bytes=file.num_bytes
        )
        for file in files
    )


def store_plan(directory: Path, stored: StoredPlan) -> StoredPlan:
    """Write a plan unless the directory has one; of several processes, one writes it.

    Returns:
        The plan that the directory has.
    """
    write_once(directory / PLAN_FILE, json.dumps(_encode(stored)))
    found = read_plan(directory)
    assert found is not None
    return found


def read_plan(directory: Path) -> StoredPlan | None:
    """Read the plan of a directory; return None where it has none.

    Raises:
        ConfigError: Another version of the program began the build.
    """
    try:
        text = (directory / PLAN_FILE).read_text(encoding="ascii")
    except (FileNotFoundError, NotADirectoryError):
        return None
    fields = json.loads(text)
    if fields.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{directory} was begun by another version of this program; continue with that, or "
            "remove it to begin again"
        )
    plan = fields["plan"]
    return StoredPlan(
        plan=BuildPlan(
            **plan
            | {
                "tokenizer": TokenizerFingerprint(**plan["tokenizer"]),
                "input": tuple(PlannedInput(**each) for each in plan["input"]),
            }
        ),
        num_parts=fields["num_parts"],
        tokenizer_files={
            name: base64.b64decode(content) for name, content in fields["tokenizer_files"].items()
        },
    )


def check_plan(directory: Path, stored: BuildPlan, wanted: BuildPlan) -> None:
    """Refuse to continue a build with other options.

    Raises:
        ConfigError: An option differs.
    """
    difference = stored.find_difference(wanted)
    if difference is not None:
        raise ConfigError(
            f"{directory} was begun with {difference}; give the options that it was begun with, "
            "or remove it to begin again"
        )


def _encode(stored: StoredPlan) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "plan": dataclasses.asdict(stored.plan),
        "num_parts": stored.num_parts,
        "tokenizer_files": {
            name: base64.b64encode(content).decode("ascii")
            for name, content in stored.tokenizer_files.items()
        },
    }


def _compare_inputs(ours: Sequence[PlannedInput], theirs: Sequence[PlannedInput]) -> str:
    if len(ours) != len(theirs):
        return f"of {len(ours)} files, not {len(theirs)}"
    first, other = next((one, two) for one, two in zip(ours, theirs, strict=True) if one != two)
    if first.name != other.name:
        return f"{first.name}, not {other.name}"
    return f"{first.name} of {first.num_bytes} bytes, not {other.num_bytes}"
