"""Lines of the log about steps."""

import math

from megatron_eso.runs.counters import Counters
from megatron_eso.training.records import tags
from megatron_eso.training.records.log_lines import describe_oddity
from megatron_eso.training.steps.step import StepResult


def make_result(*, skipped: bool) -> StepResult:
    return StepResult(
        loss=math.nan,
        nelbo=math.nan,
        losses={"diffusion": math.nan},
        grad_norm=1.5,
        learning_rate=1e-3,
        deviations=0.0,
        num_tokens=64,
        skipped=skipped,
        bad_ranks=(1,),
    )


def test_an_update_that_was_not_applied_is_skipped_in_the_log_and_in_the_tag() -> None:
    before = Counters(step=4, consumed_samples=32)
    after = Counters(step=5, consumed_samples=40, skipped_steps=1, skipped_in_row=1)
    line = describe_oddity(make_result(skipped=True), before, after, ["a", "b"])
    assert line is not None
    assert line.startswith("step 5, samples 32 to 39: UPDATE SKIPPED, 1 in a row: loss nan")
    assert line.endswith("; not finite on rank 1 on b")
    assert "skipped" in tags.MEANINGS[tags.SKIPPED_STEPS]


def test_a_step_without_anything_odd_has_no_line() -> None:
    before, after = Counters(step=4), Counters(step=5)
    assert describe_oddity(make_result(skipped=False), before, after, ["a", "b"]) is None
