"""The table of docs/curves.md is that of the code; tags are spelled out in one file only."""

import re
from pathlib import Path

from megatron_eso.training.records import tags

ROOT = Path(__file__).resolve().parents[3]
PREFIXES = ("train", "val", "val_raw", "perf", "progress", "scaling", "data/share")


def test_the_document_lists_the_curves_as_the_code_does() -> None:
    document = (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| tag \| meaning \|\n\|---\|---\|\n((?:\|.+\n)+)", document, re.M)
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", table, re.M)
    assert dict(rows) == tags.MEANINGS
    assert [tag for tag, _ in rows] == list(tags.MEANINGS)


def test_no_other_file_spells_a_tag_out() -> None:
    tag = re.compile(rf"""["'](?:{"|".join(PREFIXES)})/[\w{{]""")
    for path in (*(ROOT / "megatron_eso").rglob("*.py"), *(ROOT / "pretrain").rglob("*.py")):
        if path.name != "tags.py":
            assert not tag.search(path.read_text(encoding="utf-8")), path


def test_tags_of_a_phase_are_those_of_the_contract() -> None:
    assert tags.loss_of_phase("diffusion") == "train/loss_diffusion"
    assert tags.phase_of_loss("train/loss_sequential") == "sequential"
    assert tags.phase_of_loss("train/loss") is None
    assert tags.val_nelbo_of_phase("sequential") == "val/nelbo_sequential"
    assert tags.val_nelbo_by_time("diffusion", 0.05) == "val/nelbo_diffusion_by_t/0.05"
    assert tags.with_raw_weights(tags.VAL_NELBO) == "val_raw/nelbo"
    assert tags.share_of_corpus("shards/web") == "data/share/shards/web"
