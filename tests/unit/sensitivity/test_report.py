"""The table and the chart of `pretrain.sensitivity`."""

from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_eso.sensitivity.report import Likelihood, draw_chart, format_table, to_json

TRAINED_N = np.array([2.0, 4.0])
LIKELIHOODS = [
    Likelihood.of("trained", 1, TRAINED_N, TRAINED_N),
    Likelihood.of("uniform", 4, TRAINED_N + np.array([1.0, 2.0]), TRAINED_N),
    Likelihood.of("NELBO, alpha_0 = 0.5", None, TRAINED_N + 1, TRAINED_N),
]


def test_differences_are_paired_by_sample() -> None:
    other = LIKELIHOODS[1]
    assert (other.nats_per_token, other.stderr) == pytest.approx((4.5, 1.5))
    assert other.perplexity == pytest.approx(np.exp(4.5))
    assert (other.difference, other.difference_stderr) == pytest.approx((1.5, 0.5))


def test_the_table_has_a_line_for_each_schedule() -> None:
    assert [line.split() for line in format_table(LIKELIHOODS).splitlines()] == [
        ["schedule", "nats/token", "perplexity", "difference", "+-"],
        ["trained", "3.0000", "20.0855", "+0.0000", "0.0000"],
        ["uniform,", "4", "a", "step", "4.5000", "90.0171", "+1.5000", "0.5000"],
        ["NELBO,", "alpha_0", "=", "0.5", "4.0000", "54.5982", "+1.0000", "0.0000"],
    ]


def test_one_sample_has_no_standard_error() -> None:
    one = Likelihood.of("trained", 1, TRAINED_N[:1], TRAINED_N[:1])
    assert (one.stderr, one.difference_stderr) == (None, None)
    assert format_table([one]).splitlines()[1].endswith(" -")


def test_the_json_object_has_a_version() -> None:
    found = to_json({"step": 3}, LIKELIHOODS)
    assert (found["format_version"], found["step"]) == (1, 3)
    assert found["likelihoods"][1]["tokens_per_step"] == 4


def test_the_chart_has_a_bar_for_each_schedule_and_a_line_at_training() -> None:
    root = ElementTree.fromstring(draw_chart("step 3 & more", LIKELIHOODS))
    tags = [element.tag.rpartition("}")[2] for element in root]
    ground, *bars = [float(element.attrib["width"]) for element in root if "rect" in element.tag]
    assert bars == [280.0, 420.0, 373.3]
    assert ground == float(root.attrib["width"])
    (line,) = [element.attrib["d"] for element in root if "path" in element.tag]
    assert line.startswith("M490.0 ")
    assert tags.count("text") == 2 + 2 * len(LIKELIHOODS)
