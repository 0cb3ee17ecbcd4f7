"""What the long-form scripts share: the machine they ran on, a child process per trial, tables."""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
FAULTS, RANKS, FUZZ, RESUMED = "faults", "ranks", "fuzz", "resume_gpus"
# The comparison of `resume_gpus.py` that must find a difference.
CONTROL = "other bits after one weight's last bit was changed (control)"
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "pyarrow", "hypothesis")


def set_environment() -> None:
    """Set what libraries read when they are imported; to be called before that."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `publish` reads."""
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--write", action="store_true", help="write the JSON and document in git")


def publish(name: str, record: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what the document says of a script's record, and write it where the arguments say."""
    print()
    print(PARTS[name](record))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write_results(name, record)


def surroundings(command: Sequence[str]) -> dict[str, Any]:
    """Command, date, machine and versions of a run of a script."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python -m", f"reliability.{Path(command[0]).stem}", *command[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
    }


def in_child(work: Callable[[], int], output: Path) -> int:
    """Fork, run `work` in the child with its output in a file, and return the child's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 99
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = work()
    except BaseException:  # noqa: BLE001 - the child ends here, and this is its last word
        traceback.print_exc()
    finally:
        # Whatever happened: the parent's handlers and buffers are not the child's.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait_for(child: int, seconds: float) -> int | None:
    """The child's exit status as `os.waitstatus_to_exitcode` gives it; None: it runs on."""
    until = time.monotonic() + seconds
    pause = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if (left := until - time.monotonic()) <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(0.02, pause * 1.5)


def table_lines(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _origin(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return [
        f"`{record['command']}`, seed {record['seed']}, {record['seconds']} s,",
        f"{record['date']}, {record['machine']}, {record['system']}; {versions}.",
    ]


def _faults_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of faults with its first line; runs of several processes name `train.shard`."""
    total, survived = (sum(row[key] for row in rows) for key in ("tried", "survived"))
    columns = {"fault": "fault", "shard": "`train.shard`", "tried": "tried", "survived": "survived"}
    columns |= {"lost_tokens": "work lost at most, tokens"}
    named = {key: head for key, head in columns.items() if all(key in row for row in rows)}
    return [
        "",
        f"**{survived} of {total} survived.**",
        "",
        *table_lines(list(named.values()), [[row[key] for key in named] for row in rows]),
    ]


def faults_part(record: dict[str, Any]) -> str:
    """What the document says of a run of `faults.py`."""
    rows = record["rows"]
    lines = [
        *_origin(record),
        f"Runs of {record['run']}. Disk: {record['disk']}. Permission: {record['permission']}.",
        *_faults_table(rows),
        "",
        *table_lines(
            ("fault", "what the user is told, for example"),
            [(row["fault"], row["told"].replace("|", "\\|")) for row in rows if row["told"]],
        ),
    ]
    return "\n".join(lines) + "\n"


def ranks_part(record: dict[str, Any]) -> str:
    """What the document says of a run of `rank_faults.py`."""
    rows = record["rows"]
    lines = [*_origin(record), f"Runs of {record['run']}.", *_faults_table(rows)]
    return "\n".join(lines) + "\n"


def resumed_table(record: dict[str, Any]) -> list[str]:
    """What `resume_gpus.py` compared."""
    lines = []
    for row in record["rows"]:
        got = "was not run"
        if row["done"] and row["bound"] is None:
            got = "yes" if row["passed"] else "NO"
        elif row["done"]:
            got = f"gap {row['gap']:.1e}, bound {row['bound']:.0e}"
            got += "" if row["passed"] else ", FAILED"
        lines.append([row["check"], row["processes"], f"`{row['shard']}`", got])
    if CONTROL not in {row["check"] for row in record["rows"]}:
        lines.append([CONTROL, "-", "-", "was not measured"])
    return table_lines(("compared", "processes", "`train.shard`", "result"), lines)


def fuzz_part(record: dict[str, Any]) -> str:
    """What the document says of a run of `fuzz_inputs.py`."""
    head = ("input", "cases", "refused in one line", "accepted", "failed", "worst s", "worst MiB")
    lines = [
        *_origin(record),
        "",
        f"**{record['failed']} of {record['cases']} failed.**",
        "",
        *table_lines(head, [list(row.values()) for row in record["rows"]]),
    ]
    return "\n".join(lines) + "\n"


PARTS = {FAULTS: faults_part, RANKS: ranks_part, FUZZ: fuzz_part}


def document_with(document: str, name: str, record: dict[str, Any]) -> str:
    """The document with the part that a script writes replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    part = PARTS[name](record)
    head, _, rest = document.partition(begin)
    _, _, foot = rest.partition(end)
    return f"{head}{begin}\n{part}{end}{foot}"


def filled(document: str) -> str:
    """The document with its parts as the committed records say."""
    for name in (FAULTS, RANKS, FUZZ):
        record = json.loads(results_file(name).read_text(encoding="utf-8"))
        document = document_with(document, name, record)
    return document


def results_file(name: str) -> Path:
    """Where a script's committed record is."""
    return ROOT / "reliability" / "results" / f"{name}.json"


def write_results(name: str, record: dict[str, Any]) -> None:
    """Write a script's record and its part of the document."""
    results_file(name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
