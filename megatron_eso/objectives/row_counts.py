"""Counts of the rows and query-key pairs of a sample: for given masks, and the mean over masks.

The streams are those of `parts.py`.

Symbols: T tokens of a sample, m masked tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eso.objectives.noise.schedule import EPSILON


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


def expect_diffusion_rows(
    num_tokens: int, alpha_0: float, sampling_eps: float, *, reads_both_ways: bool = False
) -> RowCounts:
    """Return the mean of `count_diffusion_rows` over t in [sampling_eps, 1] and the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        alpha_0: Share of tokens that diffusion reveals.
        sampling_eps: Lowest time.
        reads_both_ways: Whether clean tokens read each other both ways.
    """
    eps, slope = sampling_eps, 1 - EPSILON
    mean_t, mean_square_t = (1 + eps) / 2, (1 + eps + eps**2) / 3
    rest, rate = 1 - alpha_0, alpha_0 * slope  # the probability of a mask is rest + rate t
    first = rest + rate * mean_t
    second = rest**2 + 2 * rest * rate * mean_t + rate**2 * mean_square_t
    power = num_tokens + 1
    unmasked = alpha_0**num_tokens * ((1 - slope * eps) ** power - (1 - slope) ** power)
    unmasked /= slope * power * (1 - eps)
    # Pairs of clean tokens that read each other the other way, in samples with a masked token.
    both_ways = num_tokens * (num_tokens - 1) / 2 * (1 - 2 * first + second - unmasked)
    return RowCounts(
        rows=num_tokens * (1 - unmasked),
        pairs=num_tokens * (num_tokens + 1) / 2 * (1 - unmasked) + both_ways * reads_both_ways,
        loss_rows=num_tokens * first,
        loss_pairs=expect_masked_pairs(num_tokens, first, second),
    )


def expect_full_rows(num_tokens: int, sampling_eps: float) -> RowCounts:
    """Return the mean rows of a diffusion sample whose rows all read each other, at alpha_0 = 1.

    Args:
        num_tokens: T, the tokens of the sample.
        sampling_eps: Lowest time.
    """
    causal = expect_diffusion_rows(num_tokens, 1.0, sampling_eps)
    return RowCounts(
        rows=causal.rows,
        pairs=causal.rows * num_tokens,
        loss_rows=causal.loss_rows,
        loss_pairs=causal.loss_rows * num_tokens,
    )


def expect_sequential_rows(
    num_tokens: int, alpha_0: float, *, reads_both_ways: bool = False
) -> RowCounts:
    """Return the mean of `count_sequential_rows` over the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        alpha_0: Share of tokens that diffusion reveals.
        reads_both_ways: Whether clean tokens read each other both ways.
    """
    masked = 1 - alpha_0
    some = 1 - alpha_0**num_tokens
    queries = expect_masked_pairs(num_tokens, masked, masked**2)
    both_ways = num_tokens * (num_tokens - 1) / 2 * (alpha_0**2 - alpha_0**num_tokens)
    pairs = num_tokens * (num_tokens - 1) / 2 * some + queries
    return RowCounts(
        rows=(num_tokens - 1) * some + num_tokens * masked,
        pairs=pairs + both_ways * reads_both_ways,
        loss_rows=num_tokens * masked,
        loss_pairs=queries,
    )


def expect_next_token_rows(num_tokens: int, alpha_0: float) -> RowCounts:
    """Return the mean rows of a sequential sample whose clean rows predict the next token.

    The masked tokens are in natural order after the clean ones, which are in random order.

    Args:
        num_tokens: T, the tokens of the sample.
        alpha_0: Share of tokens that diffusion reveals.
    """
    own, masked = expect_sequential_rows(num_tokens, alpha_0), 1 - alpha_0
    # A query stands at the start of each run. The slots before it hold the clean tokens and the
    # masked ones at lower positions; a run that begins at position p > 0 has a clean one at p - 1.
    later = num_tokens - 1
    starts = masked * (1 + later * alpha_0)
    keys = masked * (1 + later * alpha_0)
    keys += masked * alpha_0 * later * (2 + (num_tokens - 2) * (alpha_0 + masked / 2))
    # The first run needs no query where the last clean slot happens to hold the token before it:
    # one of k clean tokens, if any of the T tokens before a masked one is clean.
    mixed = 1 - alpha_0**num_tokens - masked**num_tokens
    starts -= mixed / num_tokens
    num_clean = num_tokens * (alpha_0 - alpha_0**num_tokens)
    keys -= (num_clean + mixed) / num_tokens
    # A row that predicts the next token reads one key less than a query of that token would.
    clean_rows = later * (1 - alpha_0**num_tokens)
    return RowCounts(
        rows=clean_rows + starts,
        pairs=clean_rows * num_tokens / 2 + keys,
        loss_rows=own.loss_rows,
        loss_pairs=own.loss_pairs - (own.loss_rows - starts),
    )


def expect_masked_pairs(num_tokens: int, first: float, second: float) -> float:
    """Return the mean of `count_masked_pairs` over the masks.

    Args:
        num_tokens: T, the tokens of the sample.
        first: Probability that a given token is masked.
        second: Probability that two given tokens are both masked.
    """
    return num_tokens**2 * first - num_tokens * (num_tokens - 1) / 2 * second


def count_block_rows(blocks: Sequence[tuple[int, int]]) -> RowCounts:
    """Count a sample of block diffusion: clean blocks up to the last noisy one, and noisy blocks.

    Args:
        blocks: For each block, its tokens and its masked tokens.
    """
    counts, before = RowCounts(), 0
    clean = RowCounts()
    for size, num_masked in blocks:
        if num_masked:
            # The clean blocks before this one have a reader.
            counts, clean = counts + clean, RowCounts()
            keys = before + size
            counts += RowCounts(
                rows=size, pairs=size * keys, loss_rows=num_masked, loss_pairs=num_masked * keys
            )
        clean += RowCounts(rows=size, pairs=size * (before + size))
        before += size
    return counts


def expect_block_rows(num_tokens: int, block_size: int, unmasked: float, share: float) -> RowCounts:
    """Return the mean of `count_block_rows` over the masks of independent whole blocks.

    Args:
        num_tokens: T, the tokens of the sample.
        block_size: Tokens of a block; the last block may have fewer.
        unmasked: Probability that a block has no masked token.
        share: Mean share of masked tokens.
    """
    noisy, counts = 1 - unmasked, RowCounts()
    starts = range(0, num_tokens, block_size)
    for number, start in enumerate(starts):
        size = min(block_size, num_tokens - start)
        keys = start + size
        is_read = 1 - (1 - noisy) ** (len(starts) - 1 - number)
        counts += RowCounts(
            rows=size * (noisy + is_read),
            pairs=size * keys * (noisy + is_read),
            loss_rows=size * share,
            loss_pairs=size * share * keys,
        )
    return counts
