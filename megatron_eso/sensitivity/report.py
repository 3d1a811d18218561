"""The report of a sensitivity measurement: a table, a JSON object and a bar chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.loss import to_perplexity

FORMAT_VERSION = 1
GROUND, INK, PALE, BLUE, GRAY, ORANGE = (
    *("#fbfbf9", "#1f2328", "#5b626a"),
    *("#3b78c2", "#8b929a", "#dd8230"),
)
LEFT, BAR_WIDTH, LINE, TOP = 210, 420, 20, 54


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """The likelihood of a validation set under one schedule, or a NELBO.

    Attributes:
        name: The order, or the setting of the NELBO.
        tokens_per_step: Tokens that a step generates; None for a NELBO.
        nats_per_token: Mean over the samples.
        stderr: Standard error of that mean; None for one sample.
        perplexity: Exponential of `nats_per_token`.
        difference: Nats per token more than under the schedule of training.
        difference_stderr: Standard error of the difference, whose samples are paired.
    """

    name: str
    tokens_per_step: int | None
    nats_per_token: float
    stderr: float | None
    perplexity: float
    difference: float
    difference_stderr: float | None

    @classmethod
    def of(
        cls,
        name: str,
        tokens_per_step: int | None,
        nats_N: NDArray[np.float64],
        trained_N: NDArray[np.float64],
    ) -> Self:
        """Summarize the nats per token of N samples, and of the same under that of training."""
        mean = float(nats_N.mean())
        return cls(
            name=name,
            tokens_per_step=tokens_per_step,
            nats_per_token=mean,
            stderr=_standard_error(nats_N),
            perplexity=to_perplexity(mean),
            difference=float((nats_N - trained_N).mean()),
            difference_stderr=_standard_error(nats_N - trained_N),
        )

    @property
    def label(self) -> str:
        """The name, with the tokens of a step where there are several."""
        several = self.tokens_per_step is not None and self.tokens_per_step > 1
        return f"{self.name}, {self.tokens_per_step} a step" if several else self.name


def to_json(head: Mapping[str, Any], likelihoods: Sequence[Likelihood]) -> dict[str, Any]:
    """Return the content of `sensitivity.json`.

    Args:
        head: What was measured: step, weights, samples and length.
        likelihoods: The likelihood of each schedule.
    """
    schedules = [asdict(each) for each in likelihoods]
    return {"format_version": FORMAT_VERSION, **head, "likelihoods": schedules}


def format_table(likelihoods: Sequence[Likelihood]) -> str:
    """Return the table of the command, one line for each likelihood."""
    lines = [f"{'schedule':<26}{'nats/token':>12}{'perplexity':>13}{'difference':>12}{'+-':>9}"]
    for each in likelihoods:
        error = "-" if each.difference_stderr is None else f"{each.difference_stderr:.4f}"
        lines.append(
            f"{each.label:<26}{each.nats_per_token:>12.4f}{each.perplexity:>13.6g}"
            f"{each.difference:>+12.4f}{error:>9}"
        )
    return "\n".join(lines) + "\n"


def draw_chart(title: str, likelihoods: Sequence[Likelihood]) -> str:
    """Return an SVG bar chart of nats per token; a line marks the schedule of training.

    Args:
        title: Its title.
        likelihoods: The likelihood of each schedule, that of training first.
    """
    scale = BAR_WIDTH / (max(each.nats_per_token for each in likelihoods) or 1.0)
    parts = [_text(16, 26, title, size=15), _text(LEFT, 44, "nats per token", color=PALE)]
    for number, each in enumerate(likelihoods):
        y, value = TOP + number * LINE, each.nats_per_token
        several = (each.tokens_per_step or 1) > 1
        color = GRAY if each.tokens_per_step is None else ORANGE if several else BLUE
        error = "" if each.stderr is None else f" ± {each.stderr:.3f}"
        parts += [
            _text(LEFT - 10, y + 13, each.label, anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="14" fill="{color}"/>',
            _text(LEFT + BAR_WIDTH + 10, y + 13, f"{value:.3f}{error}", color=PALE),
        ]
    bottom = TOP + len(likelihoods) * LINE
    x = LEFT + likelihoods[0].nats_per_token * scale
    parts.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="{INK}" stroke-dasharray="3 3"/>')
    width, height = LEFT + BAR_WIDTH + 120, bottom + 16
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif">',
            f'<rect width="{width}" height="{height}" fill="{GROUND}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _standard_error(values_N: NDArray[np.float64]) -> float | None:
    """Return the standard error of the mean; None for one sample."""
    return float(values_N.std(ddof=1)) / math.sqrt(len(values_N)) if len(values_N) > 1 else None


def _text(
    x: float, y: float, text: str, *, size: int = 12, color: str = INK, anchor: str = "start"
) -> str:
    """Return a line of text of the chart."""
    style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y}" {style}>{escape(text)}</text>'
