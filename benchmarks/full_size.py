"""One complete distillation step at Qwen3-0.6B's exact shape, on a CPU within 20 GB.

Random weights, vocabulary 151,936, one row of 2,048 tokens in packed documents, NF4 teacher (shared
and separate), 8-bit AdamW, gradient checkpointing, SMK. Each placement runs in a process of its
own: peak resident memory is the whole process', interpreter and model building included.

    python benchmarks/full_size.py [--tokens 2048] [--placement shared separate] [--smoke]

The first step is reported, which compiles and makes the optimizer's state, and the second. Its peer
is the limit of 20 GB, and the shared placement for the separate one. Parity: the loss is finite,
every expert and gate moved, nothing of the backbone did. Ends in one JSON line.
"""

import json
import math
import time

import torch

from common import environment, in_subprocess, parser, report, resident_bytes, results_folder
from steps import Step, make_step, random_dense, random_rows, settings
from tiny_onn.convert import backbone_hash

LIMIT_BYTES = 20e9


def measure_placement(case: dict) -> dict:
    """Two steps in this process."""
    start = time.perf_counter()
    config = settings(
        f"train.compile={str(case['compiled']).lower()}",
        f"teacher.placement={case['placement']}",
        "teacher.quantization=nf4",
        "optim.name=adamw8bit",
        f"data.row_tokens={case['tokens']}",
    )
    dense = random_dense(case["model"], config, "cpu")
    vocab = dense.config.get_text_config().vocab_size
    lengths = (max(2, case["tokens"] // 8), case["tokens"] // 2)
    step = make_step(dense, config, random_rows(vocab, case["tokens"], documents=lengths))
    del dense
    made_s = time.perf_counter() - start
    still = backbone_hash(step.student)
    before = {name: _sum(p) for name, p in step.student.trainable().items()}
    held = resident_bytes("VmRSS")
    seconds, losses, phases = [], [], {}
    for _ in range(2):
        start = time.perf_counter()
        result = step()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss.item())
        phases = result.seconds
    _verify(step, before, still, losses)
    return {
        "placement": case["placement"],
        "tokens": case["tokens"],
        "make_s": made_s,
        "first_step_s": seconds[0],
        "step_s": seconds[1],
        "tokens_per_s": case["tokens"] / seconds[1],
        "held_bytes": held,
        "peak_bytes": resident_bytes("VmHWM"),
        "loss": losses[-1],
        "phases_s": phases,
    }


def _verify(step: Step, before: dict[str, float], still: str, losses: list[float]) -> None:
    unmoved = [name for name, p in step.student.trainable().items() if _sum(p) == before[name]]
    if unmoved or backbone_hash(step.student) != still or not all(map(math.isfinite, losses)):
        raise SystemExit(f"losses {losses}, unmoved {unmoved}; no time is reported")


def _sum(parameter: torch.Tensor) -> float:
    return parameter.detach().double().abs().sum().item()


def main() -> None:
    """Step, check, report."""
    options = parser(__doc__)
    options.add_argument("--model", default="Qwen3-0.6B", help="a bundled shape")
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--placement", nargs="+", default=["shared", "separate"])
    options.add_argument("--no-compile", action="store_true")
    options.add_argument("--case", type=json.loads, help="internal: one placement")
    arguments = options.parse_args()
    if arguments.case:
        print(json.dumps(measure_placement(arguments.case)))
        return
    if arguments.smoke:
        arguments.model, arguments.tokens, arguments.placement = "tiny", 64, ["separate"]
    case = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "compiled": not (arguments.no_compile or arguments.smoke),
    }
    rows = [in_subprocess(__file__, {**case, "placement": name}) for name in arguments.placement]
    phases = {row["placement"]: row.pop("phases_s") for row in rows}
    ratios: dict[str, float | None] = {
        f"{row['placement']}: peak / 20 GB": row["peak_bytes"] / LIMIT_BYTES for row in rows
    }
    if len(rows) == 2:
        ratios["separate / shared, time"] = rows[1]["step_s"] / rows[0]["step_s"]
    report(
        "full_size",
        rows,
        ratios,
        results_folder(arguments),
        goal={"peak / 20 GB": 1.0},
        parity="loss finite, all experts and gates moved, backbone unchanged (SHA-256)",
        phases_s=phases,
        settings={**case, "smoke": arguments.smoke},
        environment=environment(),
    )


if __name__ == "__main__":
    main()
