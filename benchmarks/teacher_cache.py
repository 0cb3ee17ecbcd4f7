"""A training step that reads the teacher's hidden states from a cache, and one that computes them.

    python -m benchmarks teacher_cache [--model embedded] [--tokens 1024] [--folder FOLDER]

The cache is written to disk in every format and read as a run reads it: every row lies in a shard
of its own, whose SHA-256 is checked by a thread before the row is used. The embedded teacher reads
text that comes with the package. Other shapes have random weights and read random tokens: their
steps take as long, and their KL says nothing. `forward_kl` is that of the stored states'
predictions to the teacher's own, per token with a label.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from benchmarks.common import check, measure
from benchmarks.registry import Option, Result, benchmark
from benchmarks.steps import FIXED, Step, dense_model, make_step, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig, StatesFormat
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import training_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.cache_writer import write_shards
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.teacher.cache import Manifest, decoded
from tiny_onn.teacher.cache_reader import TeacherCache
from tiny_onn.teacher.load import load_dense

FORMATS: tuple[StatesFormat, ...] = get_args(StatesFormat)


def read_rows(model: str, config: RunConfig, vocab: int, num_rows: int) -> list[PackedRow]:
    """The first training rows, or rows of random documents of up to 2,048 tokens."""
    if model == "embedded":
        tokenizer = load_dense(config.teacher, torch.device("cpu"))[1]
        return list(itertools.islice(training_rows(config, tokenizer), num_rows))
    tokens = config.data.row_tokens
    lengths = (min(16, tokens), min(2048, tokens))
    rows = random_rows(vocab, tokens, documents=lengths, num_rows=num_rows)
    return [replace(row, number=number) for number, row in enumerate(rows)]


def write(
    folder: Path, rows: Sequence[PackedRow], teacher: PreTrainedModel, states_format: StatesFormat
) -> tuple[TeacherCache, float]:
    """A cache of these rows, and the seconds that it took to write."""
    folder.mkdir()
    manifest = Manifest(
        identity={},
        format=states_format,
        hidden_dim=head_of(teacher).weight.shape[1],
        row_tokens=rows[0].input_ids.numel(),
        num_rows=len(rows),
        rows_per_shard=1,
    )
    start = time.perf_counter()
    write_shards(folder, manifest, range(len(rows)), iter(rows), teacher, train=RunConfig().train)
    return TeacherCache(folder), time.perf_counter() - start


@torch.no_grad()
def divergence(cache: TeacherCache, rows: Sequence[PackedRow], teacher: PreTrainedModel) -> float:
    """KL(teacher || its stored states) in nats, the mean over tokens with a label."""
    total, tokens = 0.0, 0
    for row in rows:
        taught = cache.taught([row])[0].to(teacher.device)
        assert taught.teacher_states is not None
        live_TD = last_hidden_states(teacher, taught.input_ids, **packed_kwargs(taught))[0]
        stored_TD = decoded(taught.teacher_states, taught.teacher_scales, live_TD.dtype)
        values = distill(
            stored_TD,
            live_TD,
            head_of(teacher),
            head_of(teacher),
            taught.labels[0],
            divergence="forward_kl",
            temperature=1.0,
            jsd_beta=0.5,
            chunk_tokens=512,
        )
        mask_T = taught.loss_mask[0]
        total += float(values.forward_kl[mask_T].double().sum())
        tokens += int(mask_T.sum())
    return total / tokens


def reader(cache: TeacherCache, rows: Sequence[PackedRow], device: str) -> Iterator[PackedRow]:
    """The rows in turn, each read from the cache when a step asks for it."""
    while True:
        # A run compares each shard with its hash once, and reads it once.
        anew = TeacherCache(cache.folder)
        yield from (anew.taught([row])[0].to(device) for row in rows)


def first_loss(step: Step, state: dict[str, torch.Tensor]) -> float:
    """The loss of a step from the same weights."""
    step.student.load_state_dict(state)
    return float(step().loss)


@benchmark(
    "A training step with the teacher's states from a cache: time, size and the KL they cost.",
    model=Option("embedded", "embedded, or a bundled shape", smoke="tiny"),
    preset=Option("recommended", "the recipe"),
    tokens=Option(1024, "the tokens of a row", smoke=128),
    rows=Option(4, "rows in the cache", smoke=2),
    repeats=Option(8, "timed steps of each way", smoke=2),
    folder=Option("", "where the cache is written; default: a temporary folder"),
    set=Option([""], "further settings, as section.key=value"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Time the step with the live teacher and with a cache in each format, in turns."""
    smoke, device = arguments.model == "tiny", arguments.device
    overrides = [
        *FIXED,
        "teacher.path=embedded",
        'data.sources=["embedded"]',
        "loss.states_coef=0",
        f"data.row_tokens={arguments.tokens}",
        f"train.device={device}",
        f"train.compile={str(not smoke).lower()}",
        *filter(None, arguments.set),
    ]
    config = prepare_device(load_config(None, arguments.preset, overrides))[0]
    dense = dense_model(arguments.model, config, device)
    vocab = dense.config.get_text_config().vocab_size
    rows = read_rows(arguments.model, config, vocab, arguments.rows)
    live = make_step(dense, config, [row.to(device) for row in rows])
    state = {name: tensor.clone() for name, tensor in live.student.state_dict().items()}
    table: list[dict[str, Any]] = []
    steps: dict[str, Step] = {"live teacher": live}
    parity = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as temporary:
        expected = first_loss(live, state)
        for states_format in FORMATS:
            folder = Path(temporary) / states_format
            cache, seconds = write(folder, rows, live.teacher, states_format)
            size = sum(shard.bytes for shard in cache.manifest.shards)
            table.append(
                {
                    "way": f"cache, {states_format}",
                    "bytes_per_token": size / (len(rows) * arguments.tokens),
                    "forward_kl": divergence(cache, rows, live.teacher),
                    "write_tokens_per_s": len(rows) * arguments.tokens / seconds,
                }
            )
            step = replace(live, rows=reader(cache, rows, device), graphs={})
            gap = abs(first_loss(step, state) / expected - 1)
            parity[states_format] = check(f"loss, {states_format}", gap, 0.05)
            steps[f"cache, {states_format}"] = step
        timings = measure(steps, repeats=arguments.repeats, warmup=2, device=device)
    table.insert(0, {"way": "live teacher", "bytes_per_token": 0.0, "forward_kl": 0.0})
    for row in table:
        row.update(timings[row["way"]].columns())
    live_ms = timings["live teacher"].p50_ms
    return Result(
        rows=table,
        ratios={
            f"{name} / live teacher": timing.p50_ms / live_ms
            for name, timing in timings.items()
            if name != "live teacher"
        },
        settings={
            "model": arguments.model,
            "preset": arguments.preset,
            "tokens": arguments.tokens,
            "set": list(filter(None, arguments.set)),
            "dtype": config.teacher.dtype,
        },
        parity=parity,
    )
