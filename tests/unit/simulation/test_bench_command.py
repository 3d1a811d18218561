"""`pretrain.bench` on this machine: steps timed on the CPU, and a trace of one."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import HANG_SECONDS

TINY = (
    "data.vocab_size=64",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "data.sequence_length=16",
)


def test_steps_are_timed_and_traced(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "pretrain.bench", "quickstart.toml", *TINY, "--steps=2"]
    found = subprocess.run(
        [*command, "--json", f"--profile={trace}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_SECONDS,
    )
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["device"] == "CPU"
    assert len(figures["seconds"]) == 2
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
