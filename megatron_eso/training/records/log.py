"""The log of a rank: on stderr, and in a file per rank in the run directory."""

import logging
import warnings
from pathlib import Path

from megatron_eso.ranks import is_first_rank, own_rank

LOG_FORMAT = "%(asctime)s %(message)s"


def start_logging() -> None:
    """Log to stderr: everything on rank 0, only warnings with the rank's number on other ranks."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    if not is_first_rank():
        (handler,) = logging.getLogger().handlers
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(_format_of_rank(), "%H:%M:%S"))
    # Megatron-Core warns of every optional package that is missing.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="megatron")
    # Each rank reads its own part of a checkpoint on purpose.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # It calls collectives by names that newer versions of torch deprecate.
    warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)


def log_to_file(path: Path) -> None:
    """Log to a file as well; it is appended to, and its folder is created where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(_format_of_rank(), "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log on rank 0 only what every rank knows."""
    if is_first_rank():
        logger.log(level, "%s", message)


def _format_of_rank() -> str:
    return f"[rank {own_rank()}] {LOG_FORMAT}"
