"""Everything a GPU has to say about this package, in sections, each printed as soon as it is known.

    python benchmarks/gpu.py [--sections correctness card experts decode loss determinism plan]

correctness: expert layer, losses and attention in float32 and bfloat16 against float64 on the CPU.
card: the model card's step (Qwen3-0.6B's shape, 1 x 32,768 tokens, NF4 shared and separate, 8-bit
AdamW, checkpointing): time with SMK and with the gate frozen, for packed rows and whole ones, time
and share of the roofline by phase, memory with the process capped at 24 and 12 GiB. experts:
`expert_layer.py` at growing numbers of tokens, the crossover written down at the largest. decode:
`decode.py`, one token at a time. loss: `distill_loss.py` at growing numbers of tokens.
determinism: two runs of some steps, compared bit for bit. plan: `plan_memory.py`,
predicted against measured.

Times come only after the correctness section passed, if it was asked for. Each section has a time
budget, checked between its measurements. Every record is a JSON line, appended to
`results/gpu_NAME.jsonl` as soon as it is known.
Imports neither text nor command line: torch, transformers and jaxtyping are enough.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

import decode as decoding
import distill_loss
import gpu_card
from common import Deadline, environment, parser, relative_gap, results_folder
from steps import make_step, perturb, random_dense, random_rows, settings
from tiny_onn.attention import loop_attention, varlen_attention, varlen_supported
from tiny_onn.device import ask_for_same_bits
from tiny_onn.losses import Head, distill
from tiny_onn.ops import dense_masked, grouped
from tiny_onn.ops.teaching import SmkStep
from tiny_onn.surprise import SmkRule

# Seconds after which a section starts nothing new.
BUDGETS = {
    "correctness": 60,
    "card": 200,
    "experts": 120,
    "decode": 180,
    "loss": 60,
    "determinism": 45,
    "plan": 60,
}
# Of the largest value's rounding error: float32's products are summed in another order, bfloat16
# keeps 8 bits.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Run:
    """The options that sections read."""

    def __init__(self, device: str, smoke: bool) -> None:
        # Some of torch's functions want an index.
        self.device = "cuda:0" if device == "cuda" else device
        self.smoke = smoke
        self.bnb = importlib.util.find_spec("bitsandbytes") is not None


def correctness(run: Run, deadline: Deadline) -> Iterator[dict]:
    """Relative gaps to float64 on the CPU; `ok` says whether each is within its limit."""
    del deadline
    for dtype, limit in LIMITS.items():
        gaps = {
            **_expert_gaps(run, dtype),
            **_loss_gaps(run, dtype),
            **_attention_gaps(run, dtype),
        }
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "gaps": gaps,
            "limit": limit,
            "ok": all(gap <= limit for gap in gaps.values()),
        }


def _expert_gaps(run: Run, dtype: torch.dtype) -> dict[str, float]:
    T, D, E, I = (48, 32, 8, 16) if run.smoke else (1024, 1024, 32, 96)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # Values that bfloat16 holds: every format then starts from the same numbers.
        return torch.randn(*shape, generator=generator).bfloat16().double()

    tensors = {
        "x": draw(T, D),
        "gate_up": draw(E, 2 * I, D) / D**0.5,
        "down": draw(E, D, I) / (E * I) ** 0.5,
    }
    tensors = {name: value.bfloat16().double() for name, value in tensors.items()}
    logits, grad_y = draw(T, E), draw(T, D)
    active = logits > logits.median()
    layers: dict[str, Callable[..., Tensor]] = {
        "dense": dense_masked.expert_layer,
        "dense compiled": lambda *a, **k: dense_masked.expert_layer(*a, compiled=True, **k),
        "dense chunked": lambda *a, **k: dense_masked.expert_layer(*a, chunk_tokens=T // 3, **k),
        "grouped": grouped.expert_layer,
    }
    if run.smoke:
        del layers["dense compiled"]

    def values(layer: Callable[..., Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: leaf(value, device, dtype) for name, value in tensors.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gate = leaf(logits, device, wide)
        # Candidates are the active experts: the grouped path knows no others.
        rule = SmkRule(surprise="parameters", direction="max", candidates="active")
        smk = SmkStep(rule=rule, grad_scale=1.0, capture=[])
        y = layer(
            *leaves.values(),
            active.to(device, wide),
            gate,
            activation=silu,
            active_TE=active.to(device),
            smk=smk,
        )
        y.backward(grad_y.to(device, dtype))
        assert smk.capture
        surprise = smk.capture[0] * active.to(device)
        grads = {f"grad {name}": grad_of(value) for name, value in leaves.items()}
        return {"y": y, "surprise": surprise, **grads}

    expected = values(dense_masked.expert_layer, "cpu", torch.float64)
    return {
        f"{name}, {key}": relative_gap(value, expected[key])
        for name, layer in layers.items()
        for key, value in values(layer, run.device, dtype).items()
    }


def _loss_gaps(run: Run, dtype: torch.dtype) -> dict[str, float]:
    T, D, V = (24, 32, 500) if run.smoke else (600, 1024, 32_000)
    inputs = distill_loss.make_inputs(T, V, D, "bfloat16", "cpu")
    labels_T = torch.arange(T) % V
    gaps = {}
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        results = []
        for device, kind in (("cpu", torch.float64), (run.device, dtype)):
            moved = {n: getattr(inputs, n).to(device, kind) for n in inputs.__slots__}
            hidden = leaf(inputs.student_TD, device, kind)
            loss = distill(
                hidden,
                moved["teacher_TD"],
                Head(weight=moved["student_VD"]),
                Head(weight=moved["teacher_VD"]),
                labels_T.to(device),
                divergence=divergence,
                temperature=2.0,
                jsd_beta=0.3,
                chunk_tokens=256,
            ).loss
            loss.mean().backward()
            results.append((loss, grad_of(hidden)))
        (expected, expected_grad), (got, got_grad) = results
        gaps[f"{divergence}"] = relative_gap(got, expected)
        gaps[f"{divergence}, grad"] = relative_gap(got_grad, expected_grad)
    return gaps


def _attention_gaps(run: Run, dtype: torch.dtype) -> dict[str, float]:
    bounds = (0, 5, 40, 64) if run.smoke else (0, 7, 300, 1500, 2048)
    H, G, C = (2, 1, 16) if run.smoke else (16, 8, 128)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, bounds[-1], C, generator=generator).bfloat16().double()
        for heads in (H, G, G)
    ]
    grad = torch.randn(1, bounds[-1], H, C, generator=generator).bfloat16().double()

    def values(device: str, dtype: torch.dtype, *, varlen: bool) -> list[Tensor]:
        q, k, v = (leaf(tensor, device, dtype) for tensor in tensors)
        if varlen:
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
            longest = max(stop - start for start, stop in pairwise(bounds))
            out = varlen_attention(q, k, v, cu_seqlens, longest)
        else:
            out = loop_attention(q, k, v, bounds)
        out.backward(grad.to(device, dtype))
        return [out, *map(grad_of, (q, k, v))]

    expected = values("cpu", torch.float64, varlen=False)
    kinds = {"loop": False}
    q, v = (tensors[i].to(run.device, dtype) for i in (0, 2))
    if varlen_supported(q, v):
        kinds["varlen"] = True
    return {
        f"attention {kind}, {name}": relative_gap(got, want)
        for kind, varlen in kinds.items()
        for name, got, want in zip(
            ("out", "grad q", "grad k", "grad v"),
            values(run.device, dtype, varlen=varlen),
            expected,
            strict=True,
        )
    }


def leaf(values: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A copy that wants a gradient."""
    return values.detach().to(device, dtype, copy=True).requires_grad_()


def grad_of(tensor: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def card(run: Run, deadline: Deadline) -> Iterator[dict]:
    """See `gpu_card.py`."""
    yield from gpu_card.run(run.device, deadline, smoke=run.smoke, bnb=run.bnb)


def experts(run: Run, deadline: Deadline) -> Iterator[dict]:
    """`expert_layer.py` in a process of its own for every number of tokens; its last line."""
    script = Path(__file__).with_name("expert_layer.py")
    every = (2, 4, 8, 16, 32)
    # The largest first: it is the one that decides the path.
    ks = {64: ()} if run.smoke else {32_768: every, 2048: every, 8192: (4, 16)}
    for tokens, k in ks.items():
        if not deadline.left():
            yield {"tokens": tokens, "skipped": "time budget"}
            continue
        command = [sys.executable, str(script), "--device", run.device]
        if run.smoke:
            command.append("--smoke")
        else:
            command += ["--tokens", str(tokens), "--dtype", "bfloat16", "--k", *map(str, k)]
            command += ["--write-crossover"] if tokens == max(ks) else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        if done.returncode:
            yield {"tokens": tokens, "error": done.stderr[-2000:]}
        else:
            yield {"tokens": tokens, **json.loads(done.stdout.splitlines()[-1])}


def decode(run: Run, deadline: Deadline) -> Iterator[dict]:
    """See `decode.py`."""
    yield from decoding.run(run.device, deadline, smoke=run.smoke)


def loss(run: Run, deadline: Deadline) -> Iterator[dict]:
    """`distill_loss.py` at growing numbers of tokens."""
    vocab, hidden = (2048, 64) if run.smoke else (151_936, 1024)
    for tokens in (96,) if run.smoke else (4096, 8192, 16_384, 32_768):
        if not deadline.left():
            yield {"tokens": tokens, "skipped": "time budget"}
            continue
        yield distill_loss.compare(
            tokens=tokens,
            vocab=vocab,
            hidden=hidden,
            dtype="bfloat16",
            device=run.device,
            repeats=2 if run.smoke else 5,
            own_process=False,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plan(run: Run, deadline: Deadline) -> Iterator[dict]:
    """`plan_memory.py` in a process of its own; its last line."""
    del deadline
    if run.smoke:
        # It has a smoke run of its own, of six processes.
        yield {"skipped": "smoke"}
        return
    script = Path(__file__).with_name("plan_memory.py")
    command = [sys.executable, str(script), "--device", torch.device(run.device).type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    yield json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:]}


def determinism(run: Run, deadline: Deadline) -> Iterator[dict]:
    """Whether two runs end in the same bits, without `train.deterministic` and with it."""
    for asked in (False, True):
        if not deadline.left():
            yield {"deterministic_algorithms": asked, "skipped": "time budget"}
            continue
        if asked:
            ask_for_same_bits(torch.device(run.device))
        _train(run)
        start = time.perf_counter()
        first, second = (_train(run) for _ in range(2))
        seconds = time.perf_counter() - start
        torch.use_deterministic_algorithms(False)
        differ = [name for name in first if not torch.equal(first[name], second[name])]
        yield {
            "deterministic_algorithms": asked,
            "equal": not differ,
            "seconds": seconds,
            "tensors": len(first),
            "different": len(differ),
            "largest_difference": max(
                ((first[n] - second[n]).abs().max().item() for n in differ), default=0.0
            ),
        }


def _train(run: Run) -> dict[str, Tensor]:
    config = settings(
        f"train.compile={str(not run.smoke).lower()}",
        f"optim.name={'adamw8bit' if run.bnb else 'adamw'}",
    )
    name, tokens = ("tiny", 96) if run.smoke else ("SmolLM2-135M", 4096)
    dense = random_dense(name, config, run.device)
    vocab = dense.config.get_text_config().vocab_size
    rows = random_rows(vocab, tokens, documents=(tokens // 8, tokens // 4), num_rows=3)
    step = make_step(dense, config, rows)
    if run.smoke:
        perturb(step.student)
    for _ in range(3):
        step()
    return {name: p.detach().clone() for name, p in step.student.trainable().items()}


SECTIONS: dict[str, Callable[[Run, Deadline], Iterator[dict]]] = {
    "correctness": correctness,
    "card": card,
    "experts": experts,
    "decode": decode,
    "loss": loss,
    "determinism": determinism,
    "plan": plan,
}


def main() -> None:
    """Run the sections; every record at once, all of them at the end."""
    options = parser(__doc__)
    options.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options.add_argument("--seconds", type=float, help="time budget of each section")
    arguments = options.parse_args()
    # Before the GPU is first used; without deterministic kernels it changes nothing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = Run(arguments.device, arguments.smoke)
    device = environment(arguments.device)
    folder = results_folder(arguments)
    name = re.sub(r"[^a-z0-9]+", "_", str(device.get("gpu", "cpu")).lower())
    passed = True

    def record(section: str, values: dict) -> None:
        line = json.dumps({"section": section, **values})
        print(line, flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"gpu_{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    record("environment", {**device, "sections": arguments.sections, "smoke": arguments.smoke})
    for section in sorted(arguments.sections, key=list(SECTIONS).index):
        seconds = arguments.seconds or BUDGETS[section]
        for values in _records(section, run, Deadline(seconds)):
            record(section, values)
            passed &= section != "correctness" or bool(values.get("ok"))
        if not passed:
            raise SystemExit("correctness failed; no time is reported")


def _records(name: str, run: Run, deadline: Deadline) -> Iterator[dict]:
    """A section's records; one with the error if it breaks, so that the others still run."""
    try:
        yield from SECTIONS[name](run, deadline)
    except (RuntimeError, ValueError, SystemExit, subprocess.TimeoutExpired) as error:
        yield {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}


if __name__ == "__main__":
    main()
