"""Where the configurations are that come with the package."""

from pathlib import Path

SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "pretrain" / "configs"
