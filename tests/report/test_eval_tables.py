"""The tables that `eval` prints, in a terminal of 80 columns."""

import io
import re

import pytest
from rich.console import Console

from tiny_onn.config.read import override
from tiny_onn.config.schema import RunConfig
from tiny_onn.report.evaluation import budget_advice, eval_tables
from tiny_onn.report.frontier import frontier_tables

# The numbers of a bad student of a teacher with billions of parameters, which are wide.
SPREAD = {"std": 1.5e9, "p5": 1.1e9, "p95": 1.9e9}
NUMBERS = {
    "num_tokens": 131255,
    "num_documents": 1100,
    "forward_kl": 4.7351,
    "reverse_kl": 4.7352,
    "top1_agreement": 1.0,
    "top5_agreement": 0.8123,
    "student_perplexity": 327.904,
    "teacher_perplexity": 218.243,
    "perplexity_ratio": 1.3041,
    "student_bits_per_byte": 1.2269,
    "teacher_bits_per_byte": 1.1269,
    "bits_per_byte_difference": -0.1037,
    "student_calibration_error": 0.0312,
    "teacher_calibration_error": 0.0313,
    "mean_k": 15.89,
    "ffn_flops": 2.3456e9,
    "dense_ffn_flops": 2.3456e9,
    "total_flops": 4.5678e9,
    "dense_total_flops": 4.5678e9,
    "intervals": {
        "forward_kl": [4.5893, 4.7188],
        "student_perplexity": [317.301, 413.512],
        "bits_per_byte_difference": [-0.1151, -0.0952],
    },
}
EXACT = NUMBERS | {"mean_k": 16.0, "forward_kl": 4.9999, "between": [{"mean_k": 16.0}]}


def rows(renderable):
    """The words of every line that a terminal of 80 columns shows."""
    out = io.StringIO()
    Console(file=out, width=80).print(renderable)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_every_row_of_an_evaluation_is_one_line_with_whole_numbers():
    facts = {"model": "runs/mine", "text": "held-out text of embedded"}
    facts |= {"windows": {"tokens": 1024, "stride": None}}
    facts |= {"budget": {"target_k": 16.0, "mean_k": 17.0, "error": 0.0625, "met": False}}
    facts |= {"budget_advice": "train on"}
    facts |= {"spread": dict.fromkeys(("k", "ffn_flops", "total_flops"), SPREAD)}
    shown = rows(
        eval_tables(
            {
                **NUMBERS,
                **facts,
                "at_k": EXACT,
                "domains": {"embedded:prose": NUMBERS, "HuggingFaceFW/fineweb-edu": NUMBERS},
            }
        )
    )
    for row in (
        "KL(teacher, student) 0 4.7351 4.9999 4.5893 to 4.7188",
        "perplexity 218.243 327.904 327.904 317.301 to 413.512",
        "bits per byte - teacher's 0 -0.1037 -0.1037 -0.1151 to -0.0952",
        "total MFLOPs 4,568 4,568 4,568",
        "domain tokens docs k KL 95 % agreement",
        "embedded:prose 131,255 1,100 15.89 4.7351 4.5893 to 4.7188 100.0%",
        "HuggingFaceFW/fineweb-edu 327.90 218.24 1.2269",
    ):
        assert row in shown
    assert "uses +6.2%; train on." in " ".join(shown)


def test_advice_on_a_missed_budget_is_given_only_while_it_can_help():
    begun = RunConfig()
    more = override(begun, ["data.settling_tokens=32768"])
    both = override(more, ["data.settling_fraction=0.1"])
    raised = "resume the run with `--set data.settling_tokens=32768 --allow-change"
    assert raised in budget_advice(begun)
    assert raised not in budget_advice(more)
    assert "text: begin a new run with data.settling_fraction = 0.1, or let" in budget_advice(more)
    assert budget_advice(both) == budget_advice(None)
    assert "text: let the student follow each sequence" in budget_advice(None)
    assert "let the student" not in budget_advice(begun, follows=True)


@pytest.mark.parametrize("held_out", [0.05, 0.3, 0.5, 0.9])
def test_a_share_that_is_advised_is_accepted(held_out):
    begun = override(
        RunConfig(), [f"data.held_out_fraction={held_out}", "data.settling_fraction=0.02"]
    )
    share = re.search(r"data\.settling_fraction = ([\d.]+)", budget_advice(begun))
    assert share is not None
    override(begun, [f"data.settling_fraction={share[1]}"])


def test_a_single_document_is_counted_as_one_and_has_no_column_of_intervals():
    one = NUMBERS | {"num_documents": 1, "intervals": dict.fromkeys(NUMBERS["intervals"])}
    facts = {"model": "runs/mine", "text": "a.txt", "windows": {"tokens": 1024, "stride": None}}
    facts |= {"spread": dict.fromkeys(("k", "ffn_flops", "total_flops"), SPREAD)}
    shown = rows(eval_tables({**one, **facts, "domains": dict.fromkeys("ab", one)}))
    assert "tokens of a.txt (1 document, windows of 1024)" in " ".join(shown)
    assert "domain tokens docs k KL agreement" in shown
    point = one | {"budget": 16.0}
    shown += rows(frontier_tables({**facts, "points": [point], "exact": []}))
    assert not any("95 %" in line for line in shown)


def test_every_budget_of_a_frontier_is_one_line_with_whole_numbers():
    point = NUMBERS | {"budget": 16.0}
    frontier = {"model": "runs/mine", "text": "held-out text", "points": [point]}
    shown = rows(frontier_tables({**frontier, "exact": [EXACT]}))
    quality = "4.5893 to 4.7188 100.0% 327.90"
    assert f"16 15.89 2,346 100.0% 4.7351 {quality}" in shown
    assert f"16 4.9999 {quality}" in shown
    # A budget that no measurements lie around has no numbers at exactly its k.
    without = rows(frontier_tables({**frontier, "exact": []}))
    assert not any("exactly" in line for line in without)
