"""What `pretrain.sensitivity` refuses before it measures, and where it cannot write."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.errors import ConfigError
from megatron_eso.runs.run_directory import CONFIG_FILE
from megatron_eso.sensitivity.report import Likelihood
from pretrain.sensitivity import main, write_report
from tests.support.wrong_command_lines import GOLDEN


def test_an_objective_with_one_schedule_is_refused(tmp_path: Path) -> None:
    convert(["from-official", str(GOLDEN / "tiny.ckpt"), str(tmp_path / "sampler")])
    convert(["to-megatron", str(tmp_path / "sampler"), str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoints" / "step_00000000" / CONFIG_FILE
    config = json.loads(path.read_text())
    config["objective"] = {"name": "mdlm"}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match='objective.name = "mdlm" has one NELBO and no order'):
        main([str(tmp_path / "run")])


def test_a_run_that_cannot_be_written_to_is_an_error() -> None:
    nats_N = np.ones(2)
    head = {"step": 1, "objective": "eso_lm", "num_samples": 2}
    with pytest.raises(ConfigError, match=r"^/proc/nowhere: .*; the report is written there$"):
        write_report(Path("/proc/nowhere"), head, [Likelihood.of("trained", 1, nats_N, nats_N)])
