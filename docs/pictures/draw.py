"""Draw the pictures of the documentation: `python docs/pictures/draw.py` writes the SVG files.

`objectives.py` has the pictures of the objectives. A test compares the committed files with the
output of this script.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from objectives import OBJECTIVE_PICTURES
from svg import (
    BLUE,
    EMPTY,
    GREEN,
    INK,
    MONO,
    ORANGE,
    PALE,
    UNUSED,
    draw_arrow,
    draw_box,
    draw_square,
    draw_text,
    write_svg,
)

# An example in slot order: the tokens of the text, and how many of them are clean.
SLOTS = ("sat", "The", "cat", "on", "a", "mat")
NUM_CLEAN = 2
CELL = 22


def draw_data() -> str:
    """Return the picture of the way of the data, from text to text."""
    # Two lines of boxes: a title, two lines of text and a command each.
    stages = (
        (
            ("text", ".jsonl  .parquet  .txt", "also .gz and .zst", "files, folders, globs"),
            ("shards", "tokens in tar files,", "a hash for every 32 KiB", "data_tools build"),
            (
                "sample N",
                "its tokens are a function",
                "of the seed and N",
                "data.train=shards/train",
            ),
            ("row plan", "order, mask and rows are a", "function of the seed and N", "[objective]"),
        ),
        (
            (
                "training",
                "Megatron-Core, any tensor,",
                "pipeline and data layout",
                "pretrain.train",
            ),
            (
                "checkpoint",
                "complete or absent,",
                "every file with its hash",
                "checkpoints/step_...",
            ),
            ("sampler directory", "safetensors, tokenizer;", "no Megatron needed", "to-sampler"),
            (
                "text, likelihoods",
                "one GPU or one CPU,",
                "KV cache in both phases",
                "sampler sample, score",
            ),
        ),
    )
    width, height, gap, left, tops = 196, 92, 26, 22, (22, 158)
    # The boxes, with an arrow from each to the next one.
    parts = []
    for line, (boxes, top) in enumerate(zip(stages, tops, strict=True)):
        for number, (title, first, second, command) in enumerate(boxes):
            x = left + number * (width + gap)
            parts.append(draw_box(x, top, width, height))
            parts.append(draw_text(x + 12, top + 23, title, size=15, weight="bold"))
            parts.append(draw_text(x + 12, top + 43, first, size=12.5))
            parts.append(draw_text(x + 12, top + 59, second, size=12.5))
            parts.append(draw_text(x + 12, top + 80, command, size=11, color=BLUE, font=MONO))
            if number:
                middle = top + height / 2
                parts.append(draw_arrow([(x - gap + 3, middle), (x - 4, middle)]))
        if line == 0:
            turn, last = (tops[0] + height + tops[1]) / 2, left + 3.5 * width + 3 * gap
            start, down = left + width / 2, tops[1] - 4
            corners = [(last, top + height + 3), (last, turn), (start, turn), (start, down)]
            parts.append(draw_arrow(corners))
    return write_svg(2 * left + 4 * width + 3 * gap, tops[1] + height + 22, parts)


def draw_rows() -> str:
    """Return the picture of a row plan and of the mask that it replaces, for one short sample."""
    size = len(SLOTS)
    # The reference has its copies first; clean rows come first here so that both sides compare.
    clean = [(slot, False) for slot in range(size)]
    copies = [(slot, True) for slot in range(size)]
    plan = clean[:-1] + copies[NUM_CLEAN:]
    # The captions and both grids.
    top, first, second = 118, 84, 478
    num_scores = sum(_reads(row, key) for row in plan for key in plan)
    parts = [
        draw_text(
            22, 34, "Sequential phase of one sample: which row (left) reads which (top)", 15, "bold"
        ),
        draw_text(first - 62, 62, "Reference: a dense mask over 2T rows", weight="bold"),
        draw_text(first - 62, 80, f"{2 * size} rows, {(2 * size) ** 2} scores"),
        *_matrix(first, top, clean + copies, set(plan)),
        draw_text(second - 62, 62, "Row plan: T - 1 clean rows and m mask queries", weight="bold"),
        draw_text(second - 62, 80, f"{len(plan)} rows, {num_scores} scores"),
        *_matrix(second, top, plan, set(plan)),
    ]
    # The legend, and the example in words.
    legend = (
        (BLUE, "a clean row reads clean rows up to its own slot"),
        (ORANGE, "a mask query reads clean rows strictly before its slot ..."),
        (GREEN, "... and itself; it predicts the token of its slot"),
        (UNUSED, "computed by the reference, needed by no loss"),
    )
    for number, (color, text) in enumerate(legend):
        y = top + 9 * CELL + 18 + 21 * number
        parts.append(draw_square(second - 62, y, color, 13))
        parts.append(draw_text(second - 42, y + 11, text, size=12.5))
    example = (
        'T = 6: "The cat sat on a mat". Slots 0 and 1 (sat, The) are clean, in random order; '
        "m = 4 masked slots follow, left to right."
    )
    parts.append(draw_text(22, top + 12 * CELL + 52, example, size=12.5, color=PALE))
    return write_svg(846, top + 12 * CELL + 70, parts)


def _matrix(
    x: float, y: float, rows: list[tuple[int, bool]], used: set[tuple[int, bool]]
) -> list[str]:
    """Draw who reads whom, with the rows' tokens at the left and the columns' slots on top."""
    parts = []
    for i, row in enumerate(rows):
        slot, is_copy = row
        label = "[mask]" if is_copy and slot >= NUM_CLEAN else SLOTS[slot]
        color = INK if row in used else PALE
        middle = y + i * CELL + CELL / 2 + 4
        parts.append(draw_text(x - 9, middle, label, size=12, color=color, anchor="end"))
        column = x + i * CELL + CELL / 2 - 1
        parts.append(draw_text(column, y - 8, str(slot), size=11, color=color, anchor="middle"))
        for j, key in enumerate(rows):
            shade = _shade(row, key, used) if _reads(row, key) else EMPTY
            parts.append(draw_square(x + j * CELL, y + i * CELL, shade, CELL - 2))
    return parts


def _reads(row: tuple[int, bool], key: tuple[int, bool]) -> bool:
    """Return whether a row attends to another; a row is its slot, and whether it is a copy."""
    if row == key:
        return True
    return not key[1] and (key[0] < row[0] if row[1] else key[0] <= row[0])


def _shade(row: tuple[int, bool], key: tuple[int, bool], used: set[tuple[int, bool]]) -> str:
    if row not in used:
        return UNUSED
    if not row[1]:
        return BLUE
    return GREEN if row == key else ORANGE


PICTURES: Mapping[str, Callable[[], str]] = {
    "data.svg": draw_data,
    "rows.svg": draw_rows,
    **OBJECTIVE_PICTURES,
}


def main() -> None:
    """Write every picture into the folder of this script."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
