"""Ranks of one copy of the model whose batches differ: every rank stops with the same error."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_eso.data.samples.order import SampleOrder
from megatron_eso.data.shards.format import BLOCK_BYTES, MANIFEST_FILE, numpy_dtype
from megatron_eso.data.shards.manifest import read_manifest
from megatron_eso.data.shards.reader import hash_file
from tests.ranks.batches import SAMPLE, STEP, compare_steps
from tests.support.processes import HANG_SECONDS
from tests.support.training import PP2, TP2, Overrides, tiny_arguments, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

WRONG_TOKEN = 7
MESSAGE = re.compile(
    rf"step {STEP}: ranks of one copy of the model have different batches: "
    r"ranks 0 hold ([0-9a-f]{16}); ranks 1 hold ([0-9a-f]{16}); "
)

# The command, with RANK in its arguments replaced.
COMMAND = """
import os, sys
from megatron_eso.errors import run_command
from pretrain.train import main
if __name__ == "__main__":
    run_command(main, [word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def data_by_rank(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a data folder for each rank. One token differs on rank 1, which has hashes of its own.

    Such a file is whole by all that reading checks.
    """
    # Copy the data for each rank, and find the record and the token of the sample.
    folder = tmp_path_factory.mktemp("data_by_rank")
    for rank in range(4):
        shutil.copytree(tiny_data, folder / str(rank))
    directory = folder / "1" / "train"
    manifest, _ = read_manifest(directory)
    layout, config = manifest.layout, tiny_config(folder, folder / "1", {})
    length = config.data.row_tokens
    order = SampleOrder(config.run.seed, layout.num_rows(length))
    records, places = layout.locate_rows(order.rows(np.array([SAMPLE])), length)
    record, place = int(records[0]), int(places[0])

    # Change the token in the shard.
    shard = directory / manifest.shards[record // layout.shard_records].name
    content = bytearray(shard.read_bytes())
    tokens = np.frombuffer(
        content,
        numpy_dtype(manifest.dtype),
        layout.record_num_tokens(record),
        layout.record_offset(record),
    )
    assert tokens[place] != WRONG_TOKEN
    tokens[place] = WRONG_TOKEN
    shard.write_bytes(content)
    # Write the hash of the changed block, and the manifest that fits.
    block = place * layout.itemsize // BLOCK_BYTES
    blocks = directory / manifest.blocks.name
    hashes = np.frombuffer(bytearray(blocks.read_bytes()), "<u8")
    block_bytes = tokens.tobytes()[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
    hashes[record * layout.blocks_per_record + block] = xxhash.xxh3_64_intdigest(block_bytes)
    blocks.write_bytes(hashes.tobytes())
    changed = dataclasses.replace(manifest.blocks, sha256=hash_file(blocks))
    (directory / MANIFEST_FILE).write_bytes(dataclasses.replace(manifest, blocks=changed).encode())
    return folder


@pytest.mark.parametrize(
    ("num_ranks", "overrides"), [(4, TP2), (2, PP2)], ids=["TP=2 DP=2", "PP=2"]
)
def test_all_ranks_say_which_ranks_differ_where(
    num_ranks: int, overrides: Overrides, data_by_rank: Path, world: World, tmp_path: Path
) -> None:
    """Name the ranks of other copies too, whose batches differ legitimately."""
    answers = world.run(compare_steps, num_ranks, tmp_path, data_by_rank, overrides)
    for messages in answers:
        assert messages == answers[0]
        assert [bool(message) for message in messages] == [step == STEP for step in range(STEP + 2)]
    found = MESSAGE.match(answers[0][STEP])
    assert found is not None
    assert found[1] != found[2]


def test_data_parallel_ranks_are_not_compared(
    data_by_rank: Path, world: World, tmp_path: Path
) -> None:
    for messages in world.run(compare_steps, 2, tmp_path, data_by_rank, {}):
        assert not any(messages)


@pytest.mark.slow
def test_a_run_on_different_shards_does_not_start(data_by_rank: Path, tmp_path: Path) -> None:
    """Data-parallel ranks are compared as well: here by the datasets that they have opened."""
    script, run = tmp_path / "command.py", tmp_path / "run"
    script.write_text(COMMAND)
    arguments = tiny_arguments(run, data_by_rank / "RANK", {})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert finished.returncode != 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 on ")
    assert "has opened other shards than rank 0" in line
