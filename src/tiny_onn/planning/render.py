"""A plan as tables in the terminal."""

from dataclasses import fields

from rich import box
from rich.console import Group
from rich.table import Table

from tiny_onn.planning.cluster import link_of
from tiny_onn.planning.costs import StepFlops
from tiny_onn.planning.memory import RUNTIME_BYTES
from tiny_onn.planning.pictures import (
    RUNTIME,
    disk_of_run,
    memory_stacks,
    name_of_devices,
    time_of_run,
    time_stacks,
)
from tiny_onn.planning.plan import Plan, card_lines
from tiny_onn.planning.sources import GIB


def render(plan: Plan) -> Group:
    """Return the plan as tables for a terminal."""
    title = f"{plan.model} on {name_of_devices(plan)}"
    return Group(
        f"[bold]{title}[/bold]: {plan.sizes.experts} experts of {plan.sizes.expert_dim} neurons in"
        f" each of {plan.sizes.layers} layers",
        _parameter_table(plan),
        *([_card_table(plan)] if card_lines(plan) else []),
        _flops_table(plan),
        _memory_table(plan),
        memory_stacks(plan),
        "",
        time_stacks(plan),
        "",
        *([_communication_table(plan)] if plan.collectives else []),
        *_time_lines(plan),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _parameter_table(plan: Plan) -> Table:
    p = plan.parameters
    table = _table("Parameters", "", "number")
    rows = {
        "embeddings": p.embeddings,
        "output head" + ("" if p.output_head else " (the embeddings)"): p.output_head,
        "attention": p.attention,
        "norms": p.norms,
        "backbone, frozen": p.backbone,
        "experts": p.experts,
        "gates, weights": p.gate_weights,
        "gates, thresholds (biases)": p.gate_biases,
        "student": p.student_total,
        "trainable": p.trainable,
        "one expert": p.one_expert,
        "dense model": p.dense_total,
    }
    for name, number in rows.items():
        table.add_row(name, f"{number:,}")
    return table


def _card_table(plan: Plan) -> Table:
    table = _table("Beside the model card (2025-07-19)", "", "card", "section", "true")
    table.add_column("why they differ")
    for line in card_lines(plan):
        table.add_row(line.quantity, line.card, line.section, line.true, line.why)
    return table


def _flops_table(plan: Plan) -> Table:
    row_tokens, token = plan.config.data.row_tokens, plan.token
    columns = [f"one document of {row_tokens:,}", f"documents of {plan.document_tokens:,}"]
    # Documents as long as a row need no column of their own.
    columns = columns[: 1 if plan.document_tokens >= row_tokens else 2]
    table = _table("FLOPs", "", *columns)
    k = f"{plan.config.router.target_k:g}"
    for name, number in (
        ("attention projections", token.attention_projections),
        ("attention scores", None),
        ("MLPs or all experts, as trained", token.ffn_dense),
        (f"{k} experts, as deployed", token.ffn_at_k),
        ("gates", token.router),
        ("head", token.head),
    ):
        scores = (token.attention_scores_row, token.attention_scores_documents)
        cells = scores if number is None else (number, number)
        shown = [f"{cell / 1e6:,.1f} M" for cell in cells[: len(columns)]]
        table.add_row(f"token, forward: {name}", *shown)
    for item in fields(StepFlops):
        cells = [getattr(step, item.name) for step in (plan.whole_rows, plan.packed)]
        name = item.name.replace("_", " ")
        shown = [f"{cell / 1e12:,.2f} T" for cell in cells[: len(columns)]]
        table.add_row(f"step: {name}", *shown)
    totals = (plan.whole_rows.total, plan.packed.total)[: len(columns)]
    table.add_row("[bold]step[/bold]", *(f"[bold]{total / 1e12:,.2f} T[/bold]" for total in totals))
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table(f"Memory at the peak of a step ({plan.peak.name})", "", "GiB")
    for name, number in plan.peak.parts.items():
        table.add_row(name, f"{number / GIB:,.3f}")
    table.add_row(RUNTIME, f"{RUNTIME_BYTES[plan.device.type] / GIB:,.3f}")
    has = plan.device.memory_bytes / GIB
    verdict = "fits" if plan.fits else "does not fit"
    total = f"[bold]{plan.peak_bytes / GIB:,.3f}[/bold]"
    table.add_row(f"[bold]total: {verdict} in {has:,.1f} GiB[/bold]", total)
    return table


def _communication_table(plan: Plan) -> Table:
    link, cluster = link_of(plan.device), plan.cluster
    between = f", {cluster.nodes} nodes of {cluster.network_gbps:,g} Gbit/s" * (cluster.nodes > 1)
    title = f"Communication of a step ({link.name}, {link.gb_s:g} GB/s{between})"
    table = _table(title, "", "GB", "calls", "ms")
    for part in plan.collectives:
        table.add_row(
            part.name, f"{part.bytes / 1e9:,.3f}", f"{part.calls:,}", f"{1e3 * part.seconds:,.2f}"
        )
    return table


def _cluster_lines(plan: Plan) -> list[str]:
    """Return the speed of all GPUs together; nothing for one GPU."""
    step = plan.packed
    rate, share = plan.tokens_per_s(step), plan.share_of_linear(step)
    if not plan.collectives or rate is None or share is None:
        return []
    rows = plan.config.train.rows_per_step // plan.cluster.gpus
    return [
        f"{plan.cluster.gpus:,} GPUs, {rows} x {plan.config.data.row_tokens:,} tokens of a step"
        f" each: {rate:,.0f} tokens/s, {share:.1%} of linear, in documents of"
        f" {plan.document_tokens:,}"
    ]


def _time_lines(plan: Plan) -> list[str]:
    device, tokens = plan.device, plan.config.train.tokens
    rate = f"{device.bf16_tflops:,.4g} TFLOP/s x {plan.efficiency:g}"
    share = plan.config.router.target_k / plan.sizes.experts
    dense, student = plan.decode_tokens_per_s(1.0), plan.decode_tokens_per_s(share)
    return [
        *_cluster_lines(plan),
        f"Time of {tokens:,} tokens ({plan.steps:,} steps) at {rate}, without conversion and"
        f" evaluations: {time_of_run(plan)}",
        f"Disk: {disk_of_run(plan)}",
        f"Decoding at {device.bandwidth_gb_s:,.4g} GB/s, at most: {student:,.0f} tokens/s, "
        f"dense {dense:,.0f}",
        f"MLP FLOPs saved when deployed: {plan.token.ffn_saved:.2%}; of all matmul FLOPs: "
        f"{plan.token.model_saved:.2%}",
        f"Device: {device.source}; teacher.dtype = {plan.config.teacher.dtype}",
    ]
