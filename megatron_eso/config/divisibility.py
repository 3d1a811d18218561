"""Divisibility: of batches that are dealt to ranks, of layers that are dealt to pipeline parts."""

import math
from fractions import Fraction

from megatron_eso.errors import ConfigError

MAX_DIVISOR = 100_000
"""The search for divisors ends here; larger ones are found as cofactors only."""
MAX_DENOMINATOR = 1_000_000
MAX_WRITTEN_LAYERS = 500
NUM_SUGGESTIONS = 4


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def list_divisors(number: int) -> list[int]:
    """List the divisors in order, except pairs of which both are larger than MAX_DIVISOR."""
    limit = min(math.isqrt(number), MAX_DIVISOR)
    small = [divisor for divisor in range(1, limit + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def nearest_divisors(number: int, wanted: int) -> str:
    """Return the closest divisors of `number` below and above `wanted`, for an error."""
    divisors = list_divisors(number)
    below = [divisor for divisor in divisors if divisor < wanted][-1:]
    above = [divisor for divisor in divisors if divisor > wanted][:1]
    return " or ".join(str(divisor) for divisor in below + above)


def even_layout(num_layers: int, num_parts: int) -> str | None:
    """Describe a pipeline whose parts differ by at most one layer; the first ones are larger.

    Returns:
        Megatron-Core's notation, a character for each layer; None above MAX_WRITTEN_LAYERS.
    """
    if max(num_layers, num_parts) > MAX_WRITTEN_LAYERS:
        return None
    sizes = [num_layers // num_parts + (part < num_layers % num_parts) for part in range(num_parts)]
    return "E" + "|".join("t" * size for size in sizes) + "L"


def as_share(batch_split: float) -> Fraction:
    """Return the fraction that a decimal approximates: 0.3333333 is one third."""
    return Fraction(batch_split).limit_denominator(MAX_DENOMINATOR)


def check_dealing(
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    batch_split: float,
    origin: str = "",
) -> None:
    """Refuse batch sizes whose samples of both phases cannot be dealt evenly to the ranks.

    The split is p/q in lowest terms. If q divides the micro-batch, every micro-batch holds the same
    mix. Otherwise a micro-batch holds one phase, and q must divide their number on a rank.

    Args:
        global_batch_size: Samples of a step.
        micro_batch_size: Samples that a rank processes at once.
        data_parallel_size: Ranks that share the samples.
        batch_split: Share of the samples that train the diffusion phase.
        origin: Where the global batch size was set, for the error.

    Raises:
        ConfigError: The sizes do not deal evenly; the error names sizes that do.
    """
    # Refuse what is out of range.
    for name, value in (
        ("train.global_batch_size", global_batch_size),
        ("train.micro_batch_size", micro_batch_size),
        ("data-parallel size", data_parallel_size),
    ):
        if value < 1:
            raise ConfigError(f"{origin and origin + ': '}{name} = {value}: must be at least 1")
    if not 0 <= batch_split <= 1:
        raise ConfigError(f"objective.batch_split = {batch_split}: must be between 0 and 1")
    # Find the unit that the global batch must be a multiple of.
    denominator = as_share(batch_split).denominator

    def unit_of(size: int) -> int:
        return size * data_parallel_size * (1 if size % denominator == 0 else denominator)

    unit = unit_of(micro_batch_size)
    if global_batch_size % unit == 0:
        return
    # Suggest the closest sizes.
    below, above = global_batch_size // unit * unit, round_up(global_batch_size, unit)
    sizes = f"{below} or {above}" if below else f"{above}"
    divisors = list_divisors(global_batch_size)
    valid = [size for size in divisors if global_batch_size % unit_of(size) == 0]
    names = " or ".join(map(str, valid[-NUM_SUGGESTIONS:]))
    raise ConfigError(
        f"{origin and origin + ': '}train.global_batch_size = {global_batch_size} cannot be dealt "
        f"evenly with train.micro_batch_size = {micro_batch_size}, "
        f"data-parallel size {data_parallel_size} and objective.batch_split = {batch_split}: "
        f"take a multiple of {unit} ({sizes})"
        + (f", or train.micro_batch_size = {names}" if valid else "")
    )
