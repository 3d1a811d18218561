"""The pictures of the objectives: the mask of the paper, and the row plan that stands for it.

The rows, their losses and what they read are those of the package's own plan for a short text; the
masks are written here after the papers. A test compares the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from svg import BLUE, EMPTY, INK, ORANGE, PALE, UNUSED, draw_square, draw_text, write_svg

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.noise.blocks import BlockNoise
from megatron_eso.objectives.noise.slots import Noise
from megatron_eso.objectives.objective import Samples

TEXT = ("The", "cat", "sat", "on", "a", "mat")
SIZE = len(TEXT)
MASK = SIZE
WORDS = (*TEXT, "[mask]")
ORDER = (2, 0, 1, 3, 4, 5)
"""Slot to position: sat and The are clean in the examples of Eso-LM, with `NUM_CLEAN` = 2."""
DIFFUSION_ORDER = (2, 0, 4, 1, 5, 3)
NUM_CLEAN = 2
CELL, LABEL, LEFT, GAP = 17, 80, 22, 120

Grid = NDArray[np.bool_]


class Row(NamedTuple):
    """A row of a network: its token, its position, and whether it belongs to the noisy copy."""

    token: int
    position: int
    is_noisy: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The paper's mask and the row plan of one example.

    Attributes:
        title: What the example is.
        paper: The rows of the paper's network.
        mask: `[L, L]`, which of them (first dimension) reads which.
        plan: The micro-batch that the package plans.
    """

    title: str
    paper: tuple[Row, ...]
    mask: Grid
    plan: MicroBatch

    @property
    def rows(self) -> list[Row]:
        """The rows of the plan; a row of the noisy copy is a mask, or repeats a position."""
        tokens, positions = self.plan.rows.tokens_R.tolist(), self.plan.rows.positions_R.tolist()
        has_copies = any(row.is_noisy for row in self.paper)
        return [
            Row(token, position, has_copies and (token == MASK or position in positions[:number]))
            for number, (token, position) in enumerate(zip(tokens, positions, strict=True))
        ]

    @property
    def reads(self) -> Grid:
        """`[R, R]`, which row of the plan reads which."""
        reads_4R = self.plan.rows.reads_4R.numpy()
        keys = np.arange(reads_4R.shape[1])
        first, num_keys, own, num_own = reads_4R[:, :, None]
        in_stream = (keys >= first) & (keys < first + num_keys)
        return in_stream | ((keys >= own) & (keys < own + num_own))

    @property
    def targets(self) -> dict[int, int]:
        """The token that each loss row predicts, by the number of the row."""
        loss_rows = self.plan.rows.loss_rows_E.tolist()
        return dict(zip(loss_rows, self.plan.loss.targets_E.tolist(), strict=True))


# The masks of the papers.


def read_causally() -> Grid:
    """Return the causal mask over slots."""
    return np.tri(SIZE, dtype=np.bool_)


def read_prefix_fully() -> Grid:
    """Return the mask of variant A: clean slots read each other, the others are causal."""
    is_clean = np.arange(SIZE) < NUM_CLEAN
    return read_causally() | np.outer(is_clean, is_clean)


def read_copies(clean: Grid, clean_of_noisy: Grid, noisy: Grid) -> Grid:
    """Return the mask over a clean copy of the text and a noisy one, which no clean row reads."""
    return np.block([[clean, np.zeros_like(clean)], [clean_of_noisy, noisy]])


def read_before(clean: Grid) -> Grid:
    """Return the mask of queries: noisy rows read the clean slots before theirs, and themselves."""
    return read_copies(clean, np.tri(SIZE, k=-1, dtype=np.bool_), np.eye(SIZE, dtype=np.bool_))


def read_blocks(size: int) -> Grid:
    """Return the mask of block diffusion: clean blocks before, and the whole own block."""
    block = np.arange(SIZE) // size
    row, key = block[:, None], block[None, :]
    return read_copies(key <= row, key < row, key == row)


# The examples.


def make_eso_lm(
    variant: str, *, is_sequential: bool, prediction: str = "own", documents: Any = None
) -> Panel:
    """Return a sample of Eso-LM in one of its phases."""
    order = ORDER if is_sequential else DIFFUSION_ORDER
    noise = make_noise(order, masked=order[NUM_CLEAN:], is_sequential=is_sequential)
    objective: Any = build(alpha_0=0.5, variant=variant, sequential_prediction=prediction)
    mask = read_prefix_fully() if variant == "a" else read_causally()
    title = "Sequential phase" if is_sequential else "Diffusion phase"
    if documents is not None:
        title = 'Eso-LM of variant B, diffusion phase: documents "The cat sat" and "on a mat"'
        mask &= np.equal.outer(*2 * [np.array(documents)[list(order)]])
    return Panel(
        title=title,
        paper=list_rows(order, order[NUM_CLEAN:], copies=is_sequential),
        mask=read_before(mask) if is_sequential else mask,
        plan=objective.plan_noise(make_samples(documents), noise),
    )


def make_mdlm() -> Panel:
    """Return a sample of MDLM."""
    natural, masked = range(SIZE), (1, 3, 4, 5)
    objective: Any = build(name="mdlm")
    return Panel(
        title="Positions 1, 3, 4 and 5 are masked",
        paper=list_rows(natural, masked),
        mask=np.ones((SIZE, SIZE), dtype=np.bool_),
        plan=objective.plan_noise(make_samples(), make_noise(natural, masked=masked)),
    )


def make_ar() -> Panel:
    """Return a sample of AR; a row has the position of the token that it predicts."""
    objective: Any = build(name="ar")
    tokens = (MASK, *range(SIZE - 1))
    return Panel(
        title='prepend_token = "mask": a row holds the token before its position',
        paper=tuple(Row(token, position, False) for position, token in enumerate(tokens)),
        mask=read_causally(),
        plan=objective.plan_texts(make_samples()),
    )


def make_bd3_lm() -> Panel:
    """Return a sample of block diffusion whose first block has no mask."""
    natural, masked = range(SIZE), (3, 4, 5)
    objective: Any = build(name="bd3_lm", block_size=2)
    is_masked_BT = np.isin(np.arange(SIZE), masked)[None]
    noise = BlockNoise(is_masked_BT=is_masked_BT, t_BT=np.full((1, SIZE), 0.5))
    return Panel(
        title="block_size = 2; positions 3, 4 and 5 are masked",
        paper=list_rows(natural, masked, copies=True),
        mask=read_blocks(2),
        plan=objective.plan_noise(make_samples(), noise),
    )


def make_set_dlm(name: str, order: tuple[int, ...]) -> Panel:
    """Return a sample in which every token is masked, in a given order."""
    objective: Any = build(name=name)
    words = " ".join(TEXT[position] for position in order)
    return Panel(
        title=f'objective.name = "{name}": the order {words}',
        paper=list_rows(order, order, copies=True),
        mask=read_before(read_causally()),
        plan=objective.plan_orders(make_samples(), np.array([order])),
    )


def build(**settings: Any) -> Any:
    """Build an objective from its keys."""
    vocabulary = Vocabulary(size=MASK + 1, mask_token_id=MASK)
    return build_objective(ObjectiveConfig(**settings), vocabulary, seed=1)


def make_samples(documents: Any = None) -> Samples:
    """Return the text as the one sample of a micro-batch."""
    return Samples(
        tokens_BT=np.arange(SIZE)[None],
        indices_B=np.zeros(1, dtype=np.int64),
        length_B=np.array([SIZE]),
        documents_BT=None if documents is None else np.array([documents]),
    )


def make_noise(order: Any, *, masked: Any, is_sequential: bool = False) -> Noise:
    """Return given masks and a given order."""
    return Noise(
        length_B=np.array([SIZE]),
        is_masked_BT=np.isin(np.arange(SIZE), masked)[None],
        permutation_BT=np.array([order]),
        t_B=np.array([np.nan if is_sequential else 0.5]),
        is_sequential_B=np.array([is_sequential]),
    )


def list_rows(order: Any, masked: Any, *, copies: bool = False) -> tuple[Row, ...]:
    """Return the rows of the paper's network; with copies the clean text first, then the noisy."""
    noisy = [Row(MASK if p in masked else p, p, copies) for p in order]
    return (*(Row(p, p, False) for p in order if copies), *noisy)


# The drawing.


def draw_objective(title: str, panels: tuple[Callable[[], Panel], ...]) -> str:
    """Return the picture of an objective: one panel below the other."""
    parts, y = [draw_text(LEFT, 34, title, 15, "bold")], 62.0
    legend = (
        (BLUE, "a row without loss reads"),
        (ORANGE, "a row with loss reads; the token that it predicts is at its right"),
        (UNUSED, "of the paper's mask, needed by no loss"),
    )
    for make in panels:
        drawn, y = draw_panel(make(), y)
        parts += drawn
    for number, (color, meaning) in enumerate(legend):
        parts.append(draw_square(LEFT, y + 20 * number, color, 13))
        parts.append(draw_text(LEFT + 20, y + 11 + 20 * number, meaning, size=12.5))
    return write_svg(850, y + 20 * len(legend) + 12, parts)


def draw_panel(panel: Panel, y: float) -> tuple[list[str], float]:
    """Return a panel below y, and where it ends."""
    rows, reads = panel.rows, panel.reads
    size, num_loss = len(panel.paper), len(panel.targets)
    copies = "2T" if size > SIZE else "T"
    second = LEFT + LABEL + 2 * SIZE * CELL + GAP
    # The captions, then both grids.
    parts = [
        draw_text(LEFT, y, panel.title, weight="bold"),
        draw_text(LEFT, y + 20, f"Paper: a mask over {copies} = {size} rows, {size**2} scores"),
        draw_text(
            second, y + 20, f"Plan: {len(rows)} rows, {num_loss} with loss, {reads.sum()} scores"
        ),
    ]
    top = y + 50
    targets = {rows[number]: target for number, target in panel.targets.items()}
    parts += draw_grid(LEFT + LABEL, top, list(panel.paper), panel.mask, set(rows), targets)
    parts += draw_grid(second + LABEL, top, rows, reads, set(rows), targets)
    return parts, top + max(size, len(rows)) * CELL + 36


def draw_grid(
    x: float, y: float, rows: list[Row], reads: Grid, used: set[Row], targets: dict[Row, int]
) -> list[str]:
    """Draw which row (left) reads which (top); both have their positions, loss rows a target."""
    parts = []
    for i, row in enumerate(rows):
        color = INK if row in used else PALE
        base = y + i * CELL + CELL / 2 + 4
        parts.append(draw_text(x - 26, base, WORDS[row.token], 11.5, color=color, anchor="end"))
        column = x + i * CELL + CELL / 2 - 1
        for place in ((x - 12, base), (column, y - 7)):
            parts.append(draw_text(*place, str(row.position), 10.5, color=color, anchor="middle"))
        shade = UNUSED if row not in used else ORANGE if row in targets else BLUE
        for j in range(len(rows)):
            cell = shade if reads[i, j] else EMPTY
            parts.append(draw_square(x + j * CELL, y + i * CELL, cell, CELL - 2))
        if row in targets:
            end = x + len(rows) * CELL + 6
            parts.append(draw_text(end, base, "→ " + WORDS[targets[row]], 11.5, color=ORANGE))
    return parts


PANELS: Mapping[str, tuple[str, tuple[Callable[[], Panel], ...]]] = {
    "eso_lm_b.svg": (
        "Eso-LM, variant B",
        tuple(partial(make_eso_lm, "b", is_sequential=phase) for phase in (False, True)),
    ),
    "eso_lm_next.svg": (
        'Eso-LM, sequential_prediction = "next"',
        (partial(make_eso_lm, "b", is_sequential=True, prediction="next"),),
    ),
    "eso_lm_a.svg": (
        "Eso-LM, variant A",
        tuple(partial(make_eso_lm, "a", is_sequential=phase) for phase in (False, True)),
    ),
    "mdlm.svg": ("MDLM", (make_mdlm,)),
    "ar.svg": ("AR", (make_ar,)),
    "bd3_lm.svg": ("BD3-LM", (make_bd3_lm,)),
    "set_dlm.svg": (
        "Set Diffusion and any-order AR",
        (
            partial(make_set_dlm, "set_dlm", (1, 0, 2, 4, 3, 5)),
            partial(make_set_dlm, "any_order_ar", (4, 1, 5, 0, 3, 2)),
        ),
    ),
    "documents.svg": (
        "data.document_attention = true",
        (partial(make_eso_lm, "b", is_sequential=False, documents=(0, 0, 0, 1, 1, 1)),),
    ),
}
"""The title and the panels of each picture."""

OBJECTIVE_PICTURES: Mapping[str, Callable[[], str]] = {
    name: partial(draw_objective, *picture) for name, picture in PANELS.items()
}
