"""The table of domains that `eval` prints, in a terminal of 80 columns."""

import io

from rich.console import Console

from tiny_onn.report.evaluation import domain_table

NUMBERS = {
    "num_tokens": 13255,
    "num_documents": 11,
    "forward_kl": 0.7351,
    "top1_agreement": 0.612,
    "student_perplexity": 33.84,
    "teacher_perplexity": 18.24,
    "student_bits_per_byte": 1.2269,
    "mean_k": 15.89,
    "intervals": {"forward_kl": [0.5893, 0.7188]},
}


def test_no_number_is_cut_in_a_terminal_of_80_columns():
    out = io.StringIO()
    Console(file=out, width=80).print(domain_table({"embedded:prose": NUMBERS}))
    shown = out.getvalue()
    for number in ("13,255", "0.7351", "0.5893", "0.7188", "61.2%", "33.84", "1.2269", "15.89"):
        assert number in shown
