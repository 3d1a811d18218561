"""Counts of the rows and query-key pairs of a sample: for given masks, and the mean over masks.

Symbols: T tokens of a sample, m masked tokens of it.
"""

from dataclasses import dataclass

from megatron_eso.objectives.schedule import EPSILON


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """The rows and pairs of a forward pass, counted or expected; counts of samples add up."""

    rows: float = 0.0
    """Rows of every layer except the last, which computes only their keys and values."""
    pairs: float = 0.0
    """Query-key pairs of every layer except the last."""
    loss_rows: float = 0.0
    """Rows that carry loss, which the rest of the last layer and the head compute."""
    loss_pairs: float = 0.0
    """Query-key pairs of the last layer."""

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(
            rows=self.rows + other.rows,
            pairs=self.pairs + other.pairs,
            loss_rows=self.loss_rows + other.loss_rows,
            loss_pairs=self.loss_pairs + other.loss_pairs,
        )

    def __mul__(self, factor: float) -> "RowCounts":
        return RowCounts(
            rows=self.rows * factor,
            pairs=self.pairs * factor,
            loss_rows=self.loss_rows * factor,
            loss_pairs=self.loss_pairs * factor,
        )


def count_diffusion_rows(num_tokens: int, num_masked: int) -> RowCounts:
    """Count a diffusion sample: a causal stream of T rows, or no rows without a masked token.

    Args:
        num_tokens: T, the tokens of the sample.
        num_masked: m, the masked tokens of the sample.
    """
    if num_masked == 0:
        return RowCounts()
    return RowCounts(
        rows=num_tokens,
        pairs=num_tokens * (num_tokens + 1) / 2,
        loss_rows=num_masked,
        loss_pairs=count_masked_pairs(num_tokens, num_masked),
    )


def count_sequential_rows(num_tokens: int, num_masked: int) -> RowCounts:
    """Count a sequential sample: a clean stream of T - 1 rows and m mask queries.

    Args:
        num_tokens: T, the tokens of the sample.
        num_masked: m, the masked tokens of the sample.
    """
    if num_masked == 0:
        return RowCounts()
    queries = count_masked_pairs(num_tokens, num_masked)
    return RowCounts(
        rows=num_tokens - 1 + num_masked,
        pairs=num_tokens * (num_tokens - 1) / 2 + queries,
        loss_rows=num_masked,
        loss_pairs=queries,
    )


def count_masked_pairs(num_tokens: int, num_masked: int) -> float:
    """Count the keys that the last m of T slots read: all slots before them, and themselves."""
    return num_masked * num_tokens - num_masked * (num_masked - 1) / 2


def expect_diffusion_rows(num_tokens: int, alpha_0: float, sampling_eps: float) -> RowCounts:
    """Return the mean of `count_diffusion_rows` over t in [sampling_eps, 1] and the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        alpha_0: Share of tokens that diffusion reveals.
        sampling_eps: Lowest time.
    """
    eps, slope = sampling_eps, 1 - EPSILON
    mean_t, mean_square_t = (1 + eps) / 2, (1 + eps + eps**2) / 3
    rest, rate = 1 - alpha_0, alpha_0 * slope  # the probability of a mask is rest + rate t
    first = rest + rate * mean_t
    second = rest**2 + 2 * rest * rate * mean_t + rate**2 * mean_square_t
    power = num_tokens + 1
    unmasked = alpha_0**num_tokens * ((1 - slope * eps) ** power - (1 - slope) ** power)
    unmasked /= slope * power * (1 - eps)
    return RowCounts(
        rows=num_tokens * (1 - unmasked),
        pairs=num_tokens * (num_tokens + 1) / 2 * (1 - unmasked),
        loss_rows=num_tokens * first,
        loss_pairs=expect_masked_pairs(num_tokens, first, second),
    )


def expect_sequential_rows(num_tokens: int, alpha_0: float) -> RowCounts:
    """Return the mean of `count_sequential_rows` over the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        alpha_0: Share of tokens that diffusion reveals.
    """
    masked = 1 - alpha_0
    some = 1 - alpha_0**num_tokens
    queries = expect_masked_pairs(num_tokens, masked, masked**2)
    return RowCounts(
        rows=(num_tokens - 1) * some + num_tokens * masked,
        pairs=num_tokens * (num_tokens - 1) / 2 * some + queries,
        loss_rows=num_tokens * masked,
        loss_pairs=queries,
    )


def expect_masked_pairs(num_tokens: int, first: float, second: float) -> float:
    """Return the mean of `count_masked_pairs` over the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        first: Probability that a given token is masked.
        second: Probability that two given tokens are both masked.
    """
    return num_tokens**2 * first - num_tokens * (num_tokens - 1) / 2 * second
