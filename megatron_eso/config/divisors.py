"""Whole numbers that divide others: multiples, divisors, and layers dealt to pipeline parts."""

MAX_DIVISOR = 100_000
"""Larger divisors are not looked for."""


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than `number`."""
    return -(-number // multiple) * multiple


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` on either side of `wanted`, in words."""
    limit = min(number, MAX_DIVISOR)
    divisors = [divisor for divisor in range(1, limit + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < wanted][-1:]
    above = [divisor for divisor in divisors if divisor > wanted][:1]
    return " or ".join(str(divisor) for divisor in below + above)


def even_layout(num_layers: int, num_parts: int) -> str:
    """A pipeline layout whose parts differ by one layer at most, the first ones larger."""
    sizes = [num_layers // num_parts + (part < num_layers % num_parts) for part in range(num_parts)]
    return "E" + "|".join("t" * size for size in sizes) + "L"
