"""Tables of the report as rows of text; the page's template escapes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiny_onn.report.comparing import (
    differing,
    interval_at,
    mflops,
    read_at,
    same_text,
    setting,
)
from tiny_onn.report.exact_k import perplexity
from tiny_onn.report.run_data import Record, Run
from tiny_onn.report.sentences import compute_of

HEADLINE = (
    "model",
    "KL, nats",
    "agreement",
    "perplexity",
    "k / target",
    "FFN MFLOPs",
    "total MFLOPs",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table whose first column names the rows.

    Attributes:
        header: the names of the columns.
        rows: the cells as text.
        strong: the indices of the rows that stand out.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()


def headline(runs: Sequence[Run]) -> TextTable:
    """Return the teacher, then every run untrained, as deployed, and at exactly the asked k.

    The asked k are the run's own target and the k of the controls, as far as the run was measured
    around them.
    """
    measured = [run for run in runs if run.last is not None]
    rows: list[tuple[str, ...]] = []
    strong = []
    texts: list[Record] = []
    for run in measured:
        last = run.last
        assert last is not None
        if not any(same_text(last, text) for text in texts):
            texts.append(last)
            rows.append(_teacher_row(last, len(texts)))
        if run.untrained is not None and run.untrained is not last:
            rows.append(_row(f"{run.name}, untrained", run.untrained, run))
        if not run.is_control:
            strong.append(len(rows))
        control = run.is_control and run.selection not in run.name
        name = f"{run.name} ({run.selection})" if control else run.name
        rows.append(_row(name if run.was_judged else f"{name}, untrained", last, run))
        rows += _at_exactly(run, measured)
    return TextTable(header=HEADLINE, rows=rows, strong=strong)


def _at_exactly(run: Run, runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return the rows of a student at exactly its target and the controls' k, if it has those."""
    if run.is_control or not run.frontier or run.last is None:
        return []
    controls = [c.last for c in runs if c.is_control and c.last and same_text(c.last, run.last)]
    wanted = {round(last["mean_k"], 2): last["mean_k"] for last in controls}
    if run.target_k is not None:
        wanted[round(run.target_k, 2)] = run.target_k
    found = []
    for k, mean_k in sorted(wanted.items()):
        point = read_at(run, mean_k)
        if point is None:
            continue
        interval = interval_at(point)
        shown = "" if interval is None else " (95 %: {:.4f} to {:.4f})".format(*interval)
        found.append(
            (
                f"{run.name}, at exactly k = {k:g}",
                f"{point['forward_kl']:.4f}{shown}",
                f"{point['top1_agreement']:.1%}",
                f"{perplexity(point['student_nll']):.2f}",
                f"{point['mean_k']:.2f}",
                compute_of(point),
                mflops(point["total_flops"]),
            )
        )
    return found


def _teacher_row(last: Record, number: int) -> tuple[str, ...]:
    return (
        "teacher" if number == 1 else f"teacher, on text {number}",
        "0",
        "100.0%",
        f"{last['teacher_perplexity']:.2f}",
        "all",
        f"{mflops(last['dense_ffn_flops'])} (100%)",
        mflops(last["dense_total_flops"]),
    )


def _row(name: str, record: Record, run: Run) -> tuple[str, ...]:
    k = f"{record['mean_k']:.2f}"
    return (
        name,
        f"{record['forward_kl']:.4f}",
        f"{record['top1_agreement']:.1%}",
        f"{record['student_perplexity']:.2f}",
        k if run.target_k is None else f"{k} / {run.target_k:g}",
        compute_of(record),
        mflops(record["total_flops"]),
    )


def differences(runs: Sequence[Run]) -> TextTable | None:
    """Return the settings that differ between runs; None if all are equal."""
    names = differing([run.config for run in runs])
    if not names:
        return None
    rows = [(name, *(_text(setting(run.config, name)) for run in runs)) for name in names]
    return TextTable(header=("setting", *(run.name for run in runs)), rows=rows)


def settings(runs: Sequence[Run]) -> TextTable:
    """Return every setting of every run."""
    names = {
        f"{section}.{key}": None
        for run in runs
        for section, keys in run.config.items()
        for key in keys
    }
    rows = [(name, *(_text(setting(run.config, name)) for run in runs)) for name in names]
    return TextTable(header=("setting", *(run.name for run in runs)), rows=rows)


def provenance(runs: Sequence[Run]) -> TextTable:
    """Return versions, hardware, seed, commit and the checks of the conversion."""
    columns = [_provenance(run) for run in runs]
    names = {name: None for column in columns for name in column}
    rows = [(name, *(column.get(name, "not recorded") for column in columns)) for name in names]
    return TextTable(header=("", *(run.name for run in runs)), rows=rows)


def _provenance(run: Run) -> dict[str, str]:
    found: dict[str, str] = {"seed": _text(setting(run.config, "train.seed"))}
    for number, environment in enumerate(run.environments):
        after = f", resumption {number}" if number else ""
        found |= {
            f"started{after}": _text(environment.get("started_utc")),
            f"device{after}": f"{environment.get('device')}, {environment.get('cpu_count')} CPUs",
            f"system{after}": _text(environment.get("platform")),
            f"versions{after}": ", ".join(
                f"{name} {environment[name]}"
                for name in ("tiny_onn", "python", "torch", "transformers")
                if name in environment
            ),
            f"commit{after}": _commit(environment),
        }
        if environment.get("command"):
            found[f"command{after}"] = " ".join(map(str, environment["command"]))
        if environment.get("changes"):
            found[f"changes{after}"] = "; ".join(map(str, environment["changes"]))
    if run.conversion:
        conversion = run.conversion
        path = conversion.get("expert_path") or {}
        found |= {
            "largest logit gap, all experts on": _text(conversion.get("logit_gap")),
            "SHA-256 of the backbone": _text(conversion.get("backbone_sha256")),
            "teacher's commit": _text(conversion.get("teacher_commit")),
            "computation of experts": f"{path.get('path')}, because {path.get('reason')}",
        }
    if run.summary:
        found["training time"] = f"{run.summary.get('training_seconds', 0):,.0f} s"
        found["skipped steps"] = _text(run.summary.get("skipped_steps"))
    return found


def _commit(environment: Mapping[str, Any]) -> str:
    commit = environment.get("git_commit")
    if not commit:
        return "unknown, because an installed copy ran"
    return (
        f"{commit}{', with changes that were not committed' * bool(environment.get('git_dirty'))}"
    )


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value)
