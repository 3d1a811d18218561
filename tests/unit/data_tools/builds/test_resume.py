"""An interrupted build continues with the same input and the same options."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.builds.dataset import BuildOptions, Part, build_dataset, merge_parts
from data_tools.builds.journal import SpanFiles, read_state
from data_tools.builds.merging import SKIPPED_FILE
from data_tools.text.interface import TextOptions
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError

NUM_LINES = 60
BAD_LINE = 50
SKIP = TextOptions(on_error="skip")


def write_lines(path: Path, *, is_bad: bool, first: str = "a") -> None:
    """Write long documents, a few of which make a unit; one line may be broken."""
    texts = [f"{number} " + "word " * 20_000 for number in range(NUM_LINES)]
    texts[0] = first + texts[0]
    lines = [json.dumps({"text": text}) for text in texts]
    if is_bad:
        lines[BAD_LINE - 1] = lines[BAD_LINE - 1][:-1]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def options(tmp_path: Path, tokenizer_directory: Path) -> BuildOptions:
    """Return options of a build that stops at a late broken line, with most work committed."""
    write_lines(tmp_path / "a.jsonl", is_bad=True)
    return BuildOptions(
        inputs=[str(tmp_path / "a.jsonl")],
        tokenizer=str(tokenizer_directory),
        out=tmp_path / "out",
        commit_bytes=2**20,
    )


def change(options: BuildOptions, **settings: object) -> BuildOptions:
    fields = {name: getattr(options, name) for name in BuildOptions.__dataclass_fields__}
    return BuildOptions(**fields | settings)


def stop_at_bad_line(options: BuildOptions) -> SpanFiles:
    with pytest.raises(DataError, match=rf"a\.jsonl:{BAD_LINE}: invalid JSON"):
        build_dataset(options)
    return SpanFiles(directory=options.out.with_name("out.building") / "spans", number=0)


def test_what_is_skipped_is_listed_and_the_work_before_it_is_kept(
    options: BuildOptions, tmp_path: Path
) -> None:
    files = stop_at_bad_line(options)
    committed, tokens = read_state(files), files.tokens.read_bytes()
    assert committed.num_units >= 3
    again = stop_at_bad_line(options)
    assert read_state(again) == committed
    build_dataset(change(options, text=SKIP))
    straight = change(options, text=SKIP, out=tmp_path / "straight")
    build_dataset(straight)
    for path in straight.out.iterdir():
        if path.is_file():
            assert (options.out / path.name).read_bytes() == path.read_bytes()
    dataset = TokenDataset.open(options.out)
    kept = dataset.rows(np.arange(committed.num_tokens), 1)
    assert kept.astype("<u2").tobytes() == tokens[: 2 * committed.num_tokens]
    (skipped,) = (options.out / SKIPPED_FILE).read_text().splitlines()
    problem = json.loads(skipped)
    assert problem["path"] == options.inputs[0]
    assert problem["line"] == BAD_LINE
    assert "invalid JSON" in problem["what"]


def test_other_options_are_refused_by_name(
    options: BuildOptions, tmp_path: Path, small_corpus: Path
) -> None:
    stop_at_bad_line(options)
    for settings, difference in (
        ({"validation_share": 0.1}, "--validation 0.0, not 0.1"),
        ({"shuffle_seed": 1}, "--shuffle None, not 1"),
        ({"text": TextOptions(text_key="body")}, "--text-key text, not body"),
        ({"inputs": [*options.inputs, str(small_corpus)]}, "--input of 1 files, not 2"),
    ):
        with pytest.raises(ConfigError, match=rf"out\.building was begun with {difference}"):
            build_dataset(change(options, **settings))
    write_lines(tmp_path / "a.jsonl", is_bad=False)
    with pytest.raises(ConfigError, match=r"--input a\.jsonl of \d+ bytes, not \d+"):
        build_dataset(options)


def test_input_that_has_changed_is_refused(options: BuildOptions, tmp_path: Path) -> None:
    stop_at_bad_line(options)
    write_lines(tmp_path / "a.jsonl", is_bad=True, first="b")
    with pytest.raises(DataError, match=r"a\.jsonl.* has changed since"):
        build_dataset(options)
    write_lines(tmp_path / "a.jsonl", is_bad=True)
    build_dataset(change(options, text=SKIP))


def test_a_little_work_is_not_kept(options: BuildOptions, tmp_path: Path) -> None:
    """A build that stops early leaves nothing, so a corrected command starts again."""
    small = change(options, commit_bytes=2**30)
    with pytest.raises(DataError):
        build_dataset(small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_what_a_kill_has_left_between_the_last_steps_is_finished(
    options: BuildOptions, tmp_path: Path
) -> None:
    """The last steps: spans are moved, the dataset is renamed, the rest is removed."""
    stop_at_bad_line(options)
    building = tmp_path / "out.building"
    plan = (building / "plan.json").read_bytes()
    ids = build_dataset(change(options, text=SKIP))
    manifest = (options.out / "manifest.json").read_bytes()

    def leave(*, is_published: bool) -> None:
        (building / "finished").mkdir(parents=True)
        (building / "finished" / "00000.tokens").write_text("no longer needed")
        (building / "plan.json").write_bytes(plan)
        if not is_published:
            options.out.rename(building / "dataset")

    for is_published in (False, True):
        leave(is_published=is_published)
        assert build_dataset(options) == ids  # the broken line is not read again
        assert (options.out / "manifest.json").read_bytes() == manifest
        assert not building.exists()
    leave(is_published=False)
    assert merge_parts(options.out) == ids
    assert not building.exists()


def test_every_part_is_needed(options: BuildOptions, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", is_bad=False)
    parts = change(options, span_bytes=2**20)
    straight = change(parts, out=tmp_path / "straight")
    build_dataset(straight)
    for number in (2, 0, 2):
        build_dataset(change(parts, part=Part(number=number, count=3)))
    with pytest.raises(DataError, match=r"lacks 2 of 6 spans; run again --part 1/3$"):
        merge_parts(parts.out)
    with pytest.raises(ConfigError, match="--deduplicate False, not True"):
        build_dataset(change(parts, part=Part(number=1, count=3), deduplicate=True))
    # A build of the whole continues from the parts.
    build_dataset(parts)
    for path in straight.out.iterdir():
        if path.is_file():
            assert (parts.out / path.name).read_bytes() == path.read_bytes()


def test_standard_input_continues_when_it_is_piped_again(
    options: BuildOptions, tmp_path: Path
) -> None:
    out = tmp_path / "piped"
    bad = (tmp_path / "a.jsonl").read_bytes()
    write_lines(tmp_path / "a.jsonl", is_bad=False)
    build_dataset(options)
    good = (tmp_path / "a.jsonl").read_bytes()

    assert f"standard input:{BAD_LINE}: invalid JSON" in pipe(bad, options, out)
    files = SpanFiles(directory=tmp_path / "piped.building" / "spans", number=0)
    committed = files.journal.read_bytes()
    assert committed
    assert "standard input, or a file read before it, has changed since" in pipe(
        good.replace(b"a0 word", b"b0 word"), options, out
    )
    assert files.journal.read_bytes() == committed
    assert "error" not in pipe(good, options, out)
    for name in ("shard-00000.tar", "documents.u64", "blocks.xxh3"):
        assert (out / name).read_bytes() == (options.out / name).read_bytes()


def pipe(content: bytes, options: BuildOptions, out: Path) -> str:
    """Build from standard input in another process, and return its stderr."""
    program = f"""
from pathlib import Path
from data_tools.builds.dataset import BuildOptions, build_dataset
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import run_command
options = BuildOptions(
    inputs=["-"],
    tokenizer={options.tokenizer!r},
    out=Path({str(out)!r}),
    commit_bytes={options.commit_bytes},
    num_workers=2,
)
run_command(lambda _: build_dataset(options) and None)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, input=content, capture_output=True, check=False)
    return result.stderr.decode()
