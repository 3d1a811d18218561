"""What setup.py requires: every extra is used by the code and named in the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "megatron_eso", "data_tools", "checkpoints_conversion")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
EXTRAS = {
    name: re.findall(r'"([^"]+)"', packages)
    for name, packages in re.findall(
        r'^        "(\w+)": \[(.*?)\]', SETUP.partition("extras_require")[2], re.M | re.S
    )
}


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev"}))
def test_every_extra_is_used(extra: str) -> None:
    """A module of it is named in the code: installing what nothing reads costs a user an hour."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )
    modules = [re.split(r"[\[<>=]", package)[0].replace("-", "_") for package in EXTRAS[extra]]
    assert any(re.search(rf"\b{module}\b", sources) for module in modules), modules


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_readme_names_every_extra(extra: str) -> None:
    (sentence,) = re.findall(r"with the extras.*?\.", (ROOT / "README.md").read_text(), re.S)
    assert f"`{extra}`" in sentence
