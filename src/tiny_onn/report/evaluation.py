"""Tables of the verb `eval`: a student against its teacher, and the same by domain."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tiny_onn.config.schema import RunConfig
from tiny_onn.report.comparing import mflops, shown_end
from tiny_onn.report.terminal import add_numbers, counted, drop_empty_columns, narrow_table

# The number of domains in the table; the JSON has all of them.
MAX_DOMAINS = 20
# Rows of the table: title, field of the student, field or value of the teacher, format.
ROWS = (
    ("KL(teacher, student)", "forward_kl", "0", "{:.4f}"),
    ("KL(student, teacher)", "reverse_kl", "0", "{:.4f}"),
    ("same first token", "top1_agreement", "100.0%", "{:.1%}"),
    ("same first five tokens", "top5_agreement", "100.0%", "{:.1%}"),
    ("perplexity", "student_perplexity", "teacher_perplexity", "{:.3f}"),
    ("perplexity / teacher's", "perplexity_ratio", "1", "{:.4f}"),
    ("bits per byte", "student_bits_per_byte", "teacher_bits_per_byte", "{:.4f}"),
    ("bits per byte - teacher's", "bits_per_byte_difference", "0", "{:.4f}"),
    ("calibration error", "student_calibration_error", "teacher_calibration_error", "{:.4f}"),
    ("active experts", "mean_k", "all", "{:.2f}"),
    ("FFN MFLOPs", "ffn_flops", "dense_ffn_flops", "MFLOPs"),
    ("total MFLOPs", "total_flops", "dense_total_flops", "MFLOPs"),
)


def budget_advice(config: RunConfig | None, *, follows: bool = False) -> str:
    """Return what helps where held-out tokens have more or fewer experts than the budget asks for.

    Thresholds that were settled on four times the evaluation's tokens are known twice as well as
    its mean k, so that more tokens help little.

    Args:
        config: the settings of the student's run; None: they are unknown.
        follows: true if the student's thresholds follow each sequence.
    """
    if follows:
        return (
            "its thresholds follow each sequence already, and hold the budget better on longer ones"
        )
    ways = list[str]()
    if config is not None:
        data, held_out = config.data, config.data.held_out_fraction
        enough = 4 * data.eval_tokens
        if (data.settling_tokens or config.experts.calibration_tokens) < enough:
            change = f"--set data.settling_tokens={enough} --allow-change data.settling_tokens"
            ways.append(f"resume the run with `{change}`")
        # Training keeps half of the rest at least.
        share = min(2 * held_out, (1 - held_out) / 2)
        if data.settling_fraction <= held_out and data.settling_fraction < share:
            ways.append(f"begin a new run with data.settling_fraction = {share:g}")
    ways.append('let the student follow each sequence (routing_controller = "sequence")')
    return "the thresholds were settled on other text: " + ", or ".join(ways)


def eval_tables(result: Mapping[str, Any]) -> Group:
    """Return the tables and sentences about one evaluation, as `run_eval` returns it."""
    at_k = result.get("at_k")
    parts: list[Table | Text] = [_numbers(result, at_k)]
    parts += [Text(line) for line in (*_spread(result), *_how(result, at_k))]
    domains = result["domains"]
    if len(domains) > 1:
        parts += domain_tables(domains)
    return Group(*parts)


def shown_interval(interval: Sequence[float] | None, form: str) -> str:
    """Return an interval as text, empty if there is none."""
    if interval is None:
        return ""
    return " to ".join(form.format(end) for end in interval)


def shown_between(exact: Mapping[str, Any]) -> str:
    """Tell between which two measurements the numbers at exactly a k were read."""
    ends = [shown_end(end) for end in exact["between"]]
    if len(ends) == 1:
        return f"The numbers at exactly k = {exact['mean_k']:g} are those measured at {ends[0]}."
    return (
        f"The numbers at exactly k = {exact['mean_k']:g} are read between {ends[0]} and {ends[1]}:"
        " the logarithm of a KL on a straight line over k, the other numbers on a straight line."
    )


def _numbers(result: Mapping[str, Any], at_k: Mapping[str, Any] | None) -> Table:
    windows = result["windows"]
    cut = "" if windows["stride"] is None else f", {windows['stride']} apart"
    documents = counted(result["num_documents"], "document")
    table = narrow_table(
        Text(
            f"{result['model']} on {result['num_tokens']:,} tokens of {result['text']}"
            f" ({documents}, windows of {windows['tokens']}{cut})"
        )
    )
    # A terminal has room for one interval; the JSON has both.
    shown = [("deployed", result)]
    if at_k is not None:
        shown.append((f"at k = {at_k['mean_k']:g}", at_k))
    table.add_column("", no_wrap=True)
    add_numbers(table, ("teacher", *(name for name, _ in shown), "95 %"))
    for title, name, teacher, form in ROWS:
        cells = [title, _shown(result.get(teacher, teacher), form)]
        cells += [_shown(numbers.get(name), form) for _, numbers in shown]
        table.add_row(*cells, shown_interval(shown[-1][1]["intervals"].get(name), form))
    drop_empty_columns(table)
    return table


def _shown(value: object, form: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    return mflops(float(str(value))) if form == "MFLOPs" else form.format(value)


def _spread(result: Mapping[str, Any]) -> list[str]:
    spread, budget = result["spread"], result.get("budget")
    k, ffn, total = spread["k"], spread["ffn_flops"], spread["total_flops"]
    lines = [
        f"Over tokens, k has a standard deviation of {k['std']:.2f} and 90 % of it lies between"
        f" {k['p5']:.2f} and {k['p95']:.2f}; FFN MFLOPs {mflops(ffn['std'])}, between"
        f" {mflops(ffn['p5'])} and {mflops(ffn['p95'])}; total MFLOPs {mflops(total['std'])}."
    ]
    if budget is not None and not budget["met"]:
        lines.append(
            f"OFF TARGET: the budget is {budget['target_k']:g} experts per token, and the student"
            f" uses {budget['error']:+.1%}; {result['budget_advice']}."
        )
    return lines


def _how(result: Mapping[str, Any], at_k: Mapping[str, Any] | None) -> list[str]:
    if at_k is None:
        missing = result.get("at_k_missing", "not asked for")
        return [f"There are no numbers at exactly the budget: {missing}."]
    return [shown_between(at_k)]


def domain_tables(domains: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return two tables with the numbers of each domain, the first `MAX_DOMAINS` of them."""
    left_out = len(domains) - MAX_DOMAINS
    more = f", the {MAX_DOMAINS} largest of {len(domains)}" if left_out > 0 else ""
    # All of the numbers beside each other would not fit into a terminal of 80 columns.
    distance = narrow_table(Text(f"By domain{more}, as deployed"))
    text = narrow_table(Text("The text by domain, as deployed"))
    for table, names in (
        (distance, ("tokens", "docs", "k", "KL", "95 %", "agreement")),
        (text, ("perplexity", "teacher's", "bits per byte")),
    ):
        table.add_column("domain", overflow="fold")
        add_numbers(table, names)
    for name, numbers in list(domains.items())[:MAX_DOMAINS]:
        distance.add_row(
            Text(name or "unknown"),
            f"{numbers['num_tokens']:,}",
            f"{numbers['num_documents']:,}",
            _shown(numbers["mean_k"], "{:.2f}"),
            _shown(numbers["forward_kl"], "{:.4f}"),
            shown_interval(numbers["intervals"]["forward_kl"], "{:.4f}"),
            _shown(numbers["top1_agreement"], "{:.1%}"),
        )
        text.add_row(
            Text(name or "unknown"),
            _shown(numbers["student_perplexity"], "{:.2f}"),
            _shown(numbers["teacher_perplexity"], "{:.2f}"),
            _shown(numbers["student_bits_per_byte"], "{:.4f}"),
        )
    drop_empty_columns(distance)
    return [distance, text]
