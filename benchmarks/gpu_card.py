"""The model card's step on a GPU: Qwen3-0.6B's shape, 1 x 32,768 tokens, time, memory, roofline.

Used by `gpu.py`. Random weights; NF4 teacher and 8-bit AdamW where bitsandbytes is there.
"""

import gc
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.common import Deadline, Timing, measure
from benchmarks.steps import Step, make_step, random_dense, random_rows, settings
from tiny_onn.config.schema import Checkpointing, Objective
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.clock import Clock
from tiny_onn.model.expert_path import set_objective
from tiny_onn.planning.costs import (
    StepFlops,
    document_context,
    meta_models,
    sizes_of,
    step_flops,
    token_flops,
)

GIB = 2**30
BUDGET_TOKENS = 0.5e9
DOCUMENTS = (1024, 2048)
# What a step does to fit: changes of `train`.
VARIANTS: dict[str, dict[str, object]] = {
    "layer": {"checkpointing": "layer"},
    "selective": {"checkpointing": "selective"},
    "layer, ffn chunks": {"checkpointing": "layer", "ffn_chunk_tokens": 4096},
    "offload, ffn chunks": {"checkpointing": "offload", "ffn_chunk_tokens": 4096},
}
# By cap, the first of them for all rows and teachers, the others for packed rows and a shared one.
TRIED = {24: ("layer", "selective"), 12: ("layer", "layer, ffn chunks", "offload, ffn chunks")}


def card_step(placement: str, row: PackedRow, model: str, device: str, bnb: bool) -> Step:
    """The card's step for one placement of the teacher."""
    smoke = model == "tiny"
    config = settings(
        f"teacher.placement={placement}",
        f"teacher.quantization={'nf4' if bnb else 'none'}",
        f"optim.name={'adamw8bit' if bnb else 'adamw'}",
        f"data.row_tokens={row.input_ids.numel()}",
        f"train.compile={str(not smoke).lower()}",
        "loss.chunk_tokens=1024",
    )
    return make_step(random_dense(model, config, device), config, [row])


def matmul_flop_per_s(device: str, smoke: bool) -> float:
    """Measured rate of a large bf16 matrix product on random data."""
    size = 256 if smoke else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    timing = measure({"mm": lambda: torch.mm(a, b, out=out)}, repeats=10, warmup=3, device=device)[
        "mm"
    ]
    return 2 * size**3 / (timing.p50_ms / 1e3)


def run(device: str, deadline: Deadline, *, smoke: bool, bnb: bool) -> Iterator[dict]:
    """Records, one as soon as it is known: rows, phases, memory under caps."""
    model, tokens = ("tiny", 128) if smoke else ("Qwen3-0.6B", 32_768)
    peak = matmul_flop_per_s(device, smoke)
    yield {"kind": "peak", "bf16_matmul_tflops": peak / 1e12, "bitsandbytes": bnb}
    documents = (8, 16) if smoke else DOCUMENTS
    for placement in ("shared", "separate"):
        if not deadline.left():
            yield {"kind": "skipped", "placement": placement, "reason": "time budget"}
            continue
        vocab = 512 if smoke else 150_000
        rows = {
            "packed": random_rows(vocab, tokens, documents=documents)[0].to(device),
            "whole": random_rows(vocab, tokens, seed=1)[0].to(device),
        }
        step = card_step(placement, rows["packed"], model, device, bnb)
        for name, row in rows.items():
            labels = {"placement": placement, "rows": name}
            for record in _times(step, row, labels, peak, deadline):
                yield labels | record
        for name, row in rows.items() if torch.device(device).type == "cuda" else ():
            labels = {"placement": placement, "rows": name}
            step.rows = itertools.repeat(row)
            for record in _memory(step, labels, device, deadline):
                yield labels | record
        del step
        gc.collect()


def _times(
    step: Step, row: PackedRow, labels: dict[str, str], peak: float, deadline: Deadline
) -> Iterator[dict]:
    """Times with the gate learning and frozen, and one step's phases against the roofline."""
    device = row.input_ids.device
    step.rows = itertools.repeat(row)

    train = step.config.train

    def arm(objective: Objective, mode: Checkpointing) -> None:
        # The settings say it too, because a graph is captured by them.
        step.config = replace(step.config, train=replace(train, checkpointing=mode))
        checkpoint_layers(step.student, mode)
        step(objective)

    arms = {"smk": partial(arm, "smk", "layer"), "gate frozen": partial(arm, "none", "layer")}
    if labels["placement"] == "shared":
        arms["smk, attention kept"] = partial(arm, "smk", "selective")
    else:
        del arms["gate frozen"]
    packed = labels["rows"] == "packed"
    repeats = 5 if packed else 3
    timings = measure(arms, repeats=repeats, warmup=2, device=device)
    step.config = replace(step.config, train=replace(train, checkpointing="layer"))
    checkpoint_layers(step.student, "layer")
    set_objective(step.student.banks(), step.config)
    flops = _flops(step, row, packed=packed)
    tokens = row.input_ids.numel()
    for label, timing in timings.items():
        yield {"kind": "time", "step": label, **_rates(timing, flops, tokens, peak, label)}
    if "gate frozen" in timings:
        ratio = timings["smk"].p50_ms / timings["gate frozen"].p50_ms
        yield {"kind": "ratio", "smk / frozen": ratio}
    if not deadline.left():
        return
    clock = Clock(device, wait=True)
    step("smk", clock=clock)
    seconds = clock.seconds
    work = {
        "teacher forward": flops.teacher_forward,
        "student forward": flops.student_forward,
        "loss": flops.loss_heads,
        "backward": flops.recompute + flops.backward,
    }
    yield {
        "kind": "phases",
        "seconds": seconds,
        "flops": work,
        "share_of_matmul_peak": {k: work[k] / seconds[k] / peak for k in work},
    }


def _rates(timing: Timing, flops: StepFlops, tokens: int, peak: float, label: str) -> dict:
    seconds = timing.p50_ms / 1e3
    # With attention's outputs kept its scores are not computed again, which the count includes.
    total = flops.total if "kept" not in label else None
    share = None if total is None else total / seconds / peak
    return {
        "p20_ms": timing.p20_ms,
        "p50_ms": timing.p50_ms,
        "p80_ms": timing.p80_ms,
        "tokens_per_s": tokens / seconds,
        "hours_for_0.5B_tokens": BUDGET_TOKENS * seconds / tokens / 3600,
        "step_tflop": flops.total / 1e12,
        "share_of_matmul_peak": share,
    }


def _flops(step: Step, row: PackedRow, *, packed: bool) -> StepFlops:
    lengths = row.cu_seqlens.diff().double()
    _, student = meta_models(step.config, step.student.config.get_text_config())
    sizes = sizes_of(student)
    token = token_flops(
        sizes,
        target_k=step.config.router.target_k,
        row_context=document_context(row.input_ids.numel()),
        document_context=document_context(round((lengths.square().sum() / lengths.sum()).item())),
    )
    return step_flops(step.config, sizes, token, packed=packed)


def _memory(step: Step, labels: dict[str, str], device: str, deadline: Deadline) -> Iterator[dict]:
    """Whether a step runs with the process capped, and what it needed."""
    total = torch.cuda.get_device_properties(device).total_memory
    free, _ = torch.cuda.mem_get_info(device)
    # What is neither free nor torch's: the CUDA context and the libraries' kernels.
    context = total - free - torch.cuda.memory_reserved(device)
    train = step.config.train
    for cap, variants in TRIED.items():
        for variant in variants if list(labels.values()) == ["shared", "packed"] else variants[:1]:
            if not deadline.left():
                yield {"kind": "skipped", "cap_gib": cap, "reason": "time budget"}
                return
            step.config = replace(step.config, train=replace(train, **VARIANTS[variant]))  # pyright: ignore[reportArgumentType]
            checkpoint_layers(step.student, step.config.train.checkpointing)
            set_objective(step.student.banks(), step.config)
            # The graphs of other settings hold memory of their own.
            step.graphs.clear()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((cap * GIB - context) / total, device)
            torch.cuda.reset_peak_memory_stats(device)
            record = {
                "kind": "memory",
                "cap_gib": cap,
                "variant": variant,
                "context_bytes": context,
            }
            try:
                timings = measure({"step": step}, repeats=1, warmup=2, device=device)
                record |= {"fits": True, "p50_ms": timings["step"].p50_ms}
            except torch.OutOfMemoryError as error:
                record |= {"fits": False, "error": str(error).partition(".")[0]}
            if not record["fits"]:
                # Not while the exception is handled: its frames hold the step's tensors.
                _recover(step)
            record["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            record["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            yield record
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    step.config = replace(step.config, train=train)
    checkpoint_layers(step.student, train.checkpointing)


def _recover(step: Step) -> None:
    """Drop what a step that ran out of memory left behind."""
    step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
