"""Make the performance tables of README and docs from the records in `benchmarks/results`.

Every row is what one benchmark wrote on one machine; nothing is measured here.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.common import RESULTS, ROOT
from docs.tools import decoding, expert_layers, layer_scaling, pages
from experiments.arms_table import read_records

PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BEGIN, END = "<!-- performance: {name} -->", "<!-- end -->"
GIB = 2**30
# The GPUs of the card's step and of the benchmark's other sections.
CARD, GPU = "nvidia_h200", "nvidia_h100_80gb_hbm3"
# The records of the table of two CPU cores.
CPU = (
    "expert_layer",
    "surprise_overhead",
    "distill_step",
    "scaling",
    "cpu_inference",
    "conversion",
    "muon_step",
)


class Row(NamedTuple):
    """One line of a table: what was measured, our value, the peer's, their ratio, and the goal."""

    what: str
    ours: str
    peer: str
    ratio: str
    goal: str


def load(name: str) -> dict[str, Any]:
    """Return a benchmark's record."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def environment(name: str) -> dict[str, Any]:
    """Return where and when a benchmark's record was made."""
    return load(name)["environment"]


def layer_rows(row: dict[str, Any], where: str, goal: str) -> Iterator[Row]:
    """Yield the expert layer at one k beside the dense MLP and transformers' best MoE block."""
    label = f"expert layer, {where}, k = {row['k']}"
    ours = min(row[path] for path in ("dense", "grouped", "sparse") if path in row)
    dense = row["Qwen3MLP"]
    moe = min(value for key, value in row.items() if key.startswith("MoE") and value)
    yield Row(label, ms(ours), f"{ms(dense)} dense MLP", f"{ours / dense:.2f}", goal)
    yield Row("", ms(ours), f"{ms(moe)} best MoE of transformers", f"{ours / moe:.2f}", "< 1")


def cpu_rows() -> Iterator[Row]:
    """Yield what the benchmarks measured on two CPU cores."""
    for row in load("expert_layer")["rows"]:
        if row["k"] in (4, 16, 32):
            yield from layer_rows(row, row["dtype"], "<= 0.5" if row["k"] == 4 else "<= 1.0")
    smk = {row["step"]: row for row in load("surprise_overhead")["rows"]}
    frozen = smk["gate frozen"]["p50_ms"]
    for label, name in (
        ("step with SMK", "smk (default rule)"),
        ("step with SMK, model card's rule", "smk (model card's rule)"),
        ("the textbook way: hooks, second backward", "textbook (default rule)"),
    ):
        time = smk[name]["p50_ms"]
        goal = "" if "textbook" in label else "<= 1.05"
        yield Row(label, ms(time), f"{ms(frozen)} gate frozen", f"{time / frozen:.2f}", goal)
    steps = {row["step"]: row for row in load("distill_step")["rows"]}
    ours, plain = steps["ours"], steps["plain"]
    yield Row(
        "whole step, tokens/s",
        f"{ours['tokens_per_s']:.0f}",
        f"{plain['tokens_per_s']:.0f} plain trainer",
        f"{ours['tokens_per_s'] / plain['tokens_per_s']:.2f}",
        ">= 1.5",
    )
    yield Row(
        "whole step, memory beyond the models",
        gib(ours["step_peak_bytes"]),
        f"{gib(plain['step_peak_bytes'])} plain trainer",
        f"{ours['step_peak_bytes'] / plain['step_peak_bytes']:.2f}",
        "",
    )
    growth = load("scaling")["ratios"]["memory per token / saved inputs"]
    yield Row("memory per further token of a row", f"{growth:.2f}", "1 = saved inputs", "", "~ 1")
    muon = {row["step"]: row["p50_ms"] for row in load("muon_step")["rows"]}
    muon_label = "step of Muon for SmolLM2-135M's experts, float32"
    for label, peer in ((muon_label, "torch's Muon"), ("", "AdamW, fused")):
        ratio = f"{muon['ours'] / muon[peer]:.3g}"
        yield Row(label, ms(muon["ours"]), f"{ms(muon[peer])} {peer}", ratio, "")
    yield from inference_rows(load("cpu_inference")["rows"])
    if (RESULTS / "conversion.json").is_file():
        yield from conversion_rows(load("conversion"))


def inference_rows(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield whole models on a CPU, one token after another and a prompt at once."""
    for row in rows:
        decodes = row["what"] == "decode"
        what = "a token after another" if decodes else "a prompt"
        goal = f">= {0.9 * row['limit']:.2f}" if decodes else ">= 1.2"
        label = f"{row['shape']}, {what}, {row['dtype']}, k = {row['k']}, dense / ours"
        ratio = f"{row['speedup']:.2f}"
        goal = {16: goal, 32: ""}.get(row["k"], ">= 1")
        yield Row(label, ms(row["ours_ms"]), f"{ms(row['dense_ms'])} dense", ratio, goal)


def conversion_rows(record: dict[str, Any]) -> Iterator[Row]:
    """Yield the learned partition's time and what it holds, beside another commit's if it ran."""
    found, base = (
        {row["phase"]: row for row in part.get("rows", ())}
        for part in (record, record.get("base", {}))
    )
    name, held = "learned partition", "held share of the energy"
    seconds, share = found[name]["seconds"], found[held]["share"]
    peers = ("", "")
    ratios = ("", "")
    if base:
        before = base[name]["seconds"], base[held]["share"]
        peers = (f"{before[0]:.1f} s before", f"{before[1]:.4f} before")
        ratios = (f"{seconds / before[0]:.2f}", f"{share / before[1]:.4f}")
    threads = record["settings"]["threads"]
    label = f"learned partition, SmolLM2-135M, {threads} threads"
    yield Row(label, f"{seconds:.1f} s", peers[0], ratios[0], "<= 30 s")
    yield Row("share of the energy that its active experts hold", f"{share:.4f}", peers[1],
              ratios[1], ">= 1")  # fmt: skip


def gpu_records(name: str) -> list[dict[str, Any]]:
    """Return what the benchmark `gpu` wrote on a GPU."""
    return read_records(RESULTS / f"gpu_{name}.jsonl", needed=True)


def card_rows() -> Iterator[Row]:
    """Yield the model card's step; of several records of a kind the last one counts."""
    card = {
        (r["placement"], r["rows"], r["kind"], r.get("step", r.get("cap_gib")), r.get("variant")): r
        for r in gpu_records(CARD)
        if r["section"] == "card" and "rows" in r
    }
    for rows in ("packed", "whole"):
        packed = rows == "packed"
        time = card["separate", rows, "time", "smk", None]
        hours = time["hours_for_0.5B_tokens"]
        yield Row(
            f"card's step, {rows} rows, tokens/s",
            f"{time['tokens_per_s']:,.0f}",
            f"{hours:.1f} h for 0.5B tokens",
            "",
            "< 4 h" if packed else "",
        )
        share = time["share_of_matmul_peak"]
        yield Row(
            f"card's step, {rows} rows, share of the measured matmul peak",
            f"{100 * share:.0f} %",
            "",
            "",
            ">= 60 %" if packed else "",
        )
        ratio = card["shared", rows, "ratio", None, None]["smk / frozen"]
        yield Row(f"SMK's cost, {rows} rows", "", "gate frozen", f"{ratio:.3f}", "<= 1.03")
    memory = card["separate", "packed", "memory", 12, "layer"]
    used = gib(memory["peak_reserved_bytes"] + memory["context_bytes"])
    fits = "fits" if memory["fits"] else "does not fit"
    yield Row("card's step, memory with the context", used, f"{fits} a cap of 12 GiB", "", "fits")


def gpu_rows() -> Iterator[Row]:
    """Yield what else the benchmark `gpu` measured; of several records the last one counts."""
    records = gpu_records(GPU)
    yield from decode_rows([r for r in records if r["section"] == "decode"])
    # Until November 2026 the lines of this record were called cases.
    plans = [r.get("rows", r.get("cases")) for r in records if r["section"] == "plan"]
    for cases in [found for found in plans if found][-1:]:
        ratios = [case["ratio"] for case in cases]
        predicted = f"{min(ratios):.2f} to {max(ratios):.2f}"
        yield Row(f"plan's memory, {len(ratios)} cases", predicted, "1 = measured", "", "~ 1")
    losses = {
        (row["tokens"], row["loss"]): row
        for r in records
        if r["section"] == "loss"
        for row in r.get("rows", ())
    }
    for tokens in sorted({tokens for tokens, _ in losses}):
        ours = losses[tokens, "ours"]
        for peer in ("naive", "liger", "trl"):
            if (other := losses.get((tokens, peer))) is None:
                yield Row(f"loss, {tokens:,} tokens", "", f"{peer}: out of memory", "", "")
                continue
            yield Row(
                f"loss, {tokens:,} tokens",
                f"{ms(ours['p50_ms'])}, {gib(ours['peak_bytes'])}",
                f"{ms(other['p50_ms'])}, {gib(other['peak_bytes'])} {peer}",
                f"{ours['p50_ms'] / other['p50_ms']:.2f}, "
                f"{ours['peak_bytes'] / other['peak_bytes']:.2f}",
                "<= 1, < 1",
            )


def step_records() -> list[dict[str, Any]]:
    """Return the records of whole training steps on a GPU, one a line."""
    return read_records(RESULTS / "small_step_cuda.jsonl", needed=True)


def step_rows() -> Iterator[Row]:
    """Yield whole training steps on a GPU, replayed from a graph, or launched by the host."""
    for record in step_records():
        settings = record["settings"]
        rates = {row["step"]: row["tokens_per_s"] for row in record["rows"]}
        for name, rate in rates.items():
            label = f"step, {settings['model']}, {settings['tokens']:,} tokens, {name}, tokens/s"
            peer = rates.get("without graphs") if name == "keep activations" else None
            told = f"{peer:,.0f} without graphs" if peer else ""
            ratio = f"{rate / peer:.2f}" if peer else ""
            reaches = (settings["model"], settings["tokens"]) == ("SmolLM2-135M", 32_768)
            goal = ">= 200,000" if reaches and name == "keep activations" else ""
            yield Row(label, f"{rate:,.0f}", told, ratio, goal)


def attention_section() -> str:
    """Return attention's times over packed rows, forward + backward, way by way."""
    record = load("packed_attention_cuda")
    ways = ("flash", "flash deterministic", "flex")
    cases: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in record["rows"]:
        case = (row["model"], row["tokens"], row["documents"], row["longest"])
        ms_ms = f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f}"
        cases.setdefault(case, {})[row["way"]] = ms_ms
    lines = [
        "| heads of | tokens | documents, longest | flash | flash, repeats bits | FlexAttention |",
        "|---|---|---|---|---|---|",
    ]
    for (model, tokens, documents, longest), times in cases.items():
        told = " | ".join(times[way] for way in ways)
        lines.append(f"| {model} | {tokens:,} | {documents}, {longest:,} | {told} |")
    return (
        f"Measured on {where(record['environment'])}, in milliseconds.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def decode_rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield what the benchmark `decode` measured on a GPU, one token at a time."""
    timed = [r for r in records if "us_per_layer" in r]
    stacks = {r["k"]: r for r in timed if r["kind"] == "stack"}
    peers = {r["k"]: r["us_per_layer"] for r in timed if r["kind"] == "moe"}
    for k, record in sorted(stacks.items()):
        micro = record["us_per_layer"]
        ours, dense = micro["ours"], micro["Qwen3MLP"]
        label = f"decode, one layer, k = {k}"
        yield Row(label, us(ours), f"{us(dense)} dense MLP", f"{ours / dense:.2f}", "< 1")
        if k in peers:
            mine = peers[k].pop("ours")
            best = min(peers[k].values())
            peer = f"{us(best)} best MoE of transformers"
            yield Row("", us(mine), peer, f"{mine / best:.2f}", "< 1")
        share = f"{100 * record['share_of_bandwidth']:.0f} %"
        limit = f"{us(record['limit_us'])} to read the active weights"
        yield Row(f"{label}, share of the bandwidth", share, limit, "", ">= 85 %")


def us(value: float) -> str:
    """Format microseconds with three figures."""
    return f"{value:.3g} us"


def ms(value: float) -> str:
    """Format milliseconds with three figures."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def gib(value: float) -> str:
    """Format bytes as GiB."""
    return f"{value / GIB:.2f} GiB"


def where(*environments: dict[str, Any]) -> str:
    """Return the machine, the versions and the days of some records of one machine."""
    environment, versions = environments[0], environments[0]["versions"]
    days = sorted({record["time"][:10] for record in environments})
    machine = (
        environment.get("gpu") or f"{environment['cores']} cores of an {environment['machine']}"
    )
    return (
        f"{machine}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{' and '.join(days)}"
    )


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| | ours | peer | ratio | goal |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


# The README shows these rows only.
README_ROWS = (
    "card's step, packed rows, tokens/s",
    "card's step, memory with the context",
    "step, SmolLM2-135M, 32,768 tokens, keep activations, tokens/s",
    "expert layer, 32,768 tokens, k = 16, the default recipe's rule",
    "expert layer, 32,768 tokens, k = 16, the model card's rule",
    "decode, Qwen3-0.6B, step compiled, k = 16, tokens, overlap, tokens/s",
    "whole step, tokens/s",
)


def in_readme(row: Row) -> bool:
    """Return whether the README shows the row."""
    return row.what in README_ROWS and bool(row.ours)


def layer_in_readme() -> Iterator[Row]:
    """Yield the expert layer of training, replayed from graphs as there, by rule."""
    record = expert_layers.read(expert_layers.LAYER)
    for row in () if record is None else record["rows"]:
        if (row["tokens"], row["k"]) != (32_768, 16) or row["rule"] == "sampled":
            continue
        dense = row["MLP, captured"]
        times = (row.get(f"{name}, captured") for name in expert_layers.OURS)
        ours = min(time for time in times if time)
        label = f"expert layer, 32,768 tokens, k = 16, {expert_layers.WORDS[row['rule']]} rule"
        yield Row(label, ms(ours), f"{ms(dense)} dense MLP", f"{ours / dense:.2f}", "<= 0.85")


def sections() -> dict[str, str]:
    """Return the generated texts by the name of their place in the pages."""
    on_gpu, on_card = (
        where(*(r for r in gpu_records(name) if r["section"] == "environment"))
        for name in (GPU, CARD)
    )
    on_cpu = where(environment("distill_step"))
    on_stepped = where(*(record["environment"] for record in step_records()))
    of_readme = (
        (on_card, itertools.chain(step_rows(), card_rows(), layer_in_readme(), decode_step_rows())),
        (on_cpu, cpu_rows()),
    )
    short = (
        f"Measured on {place}:\n\n{table(filter(in_readme, rows))}" for place, rows in of_readme
    )
    ways = decoding.read()
    on_decoded = where(*(record for record in ways if record["part"] == "environment"))
    scaling, layer = layer_scaling.read(), expert_layers.read(expert_layers.LAYER)
    peers = expert_layers.read(expert_layers.PEERS)
    on_scaled, on_layer, on_peers = (
        "" if record is None else where(record["environment"]) for record in (scaling, layer, peers)
    )
    return {
        "scaling": layer_scaling.section(scaling, on_scaled),
        "layer": expert_layers.layer_section(layer, on_layer),
        "peers": expert_layers.peers_section(peers, on_peers),
        "cpu": f"Measured on {where(*map(environment, CPU))}.\n\n{table(cpu_rows())}",
        "gpu": f"Measured on {on_gpu}.\n\n{table(gpu_rows())}",
        "card": f"Measured on {on_card}.\n\n{table(card_rows())}",
        "decoding": f"Measured on {on_decoded}.\n\n{table(decode_step_rows())}",
        "steps": f"Measured on {on_stepped}.\n\n{table(step_rows())}",
        "attention": attention_section(),
        "readme": "\n".join(short),
    }


def decode_step_rows() -> Iterator[Row]:
    """Yield the ways to decode that the benchmark `decode_step` compared."""
    yield from (Row(*line) for line in decoding.rows(decoding.read()))


def filled(text: str) -> str:
    """Return a page with the generated texts in their places."""
    return pages.filled(text, sections(), BEGIN, END)
