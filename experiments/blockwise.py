"""What the blockwise stage is worth: two stages against the global one alone, at equal wall time.

One student learns from N tokens blockwise and then from M by the distillation loss; another one, of
the same start, text and optimizer, from as many tokens by the distillation loss alone as take the
same time. The time of a step is the median of its stage, so that compiling does not count.

    python -m experiments.blockwise [--preset demo] [--blockwise-tokens 65536] [--tokens 65536]
        [--seeds 0] [--set smk.surprise=gain ...] [--device cuda] [--smoke]

Parity: both students start from the same held-out KL, and with all experts on they are the teacher.
The KL, the agreement and the error are those of held-out text; the error is the mean of the layers'
squared errors on the teacher's own inputs, in units of the output's power. Ends in one JSON line.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.common import check, environment, report
from benchmarks.steps import TINY
from experiments.options import parser, results_folder
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.stages import step_tokens
from tiny_onn.runs.metrics import METRICS_NAME, read_metrics
from tiny_onn.teacher.embedded import embedded_teacher

SMOKE = (
    "teacher.dtype=float32",
    "train.compile=false",
    "data.row_tokens=64",
    "data.eval_tokens=64",
    "experts.num_experts=8",
    "experts.calibration_tokens=128",
    "router.target_k=4",
)


def tiny_teacher(folder: Path) -> Path:
    """A small random teacher that reads the embedded tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher())
    torch.manual_seed(0)
    config = Qwen3Config(**{**TINY, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(config: RunConfig, folder: Path, title: str) -> dict[str, Any]:
    """One run: what it was before and after, its records, its seconds by stage."""
    result = run_distill(config, out=folder, title=title)
    assert not result.interrupted
    records: list[dict[str, Any]] = [*read_metrics(folder / METRICS_NAME)]
    size = step_tokens(config)
    step_s = {
        stage: [size / record["tokens_per_s"] for record in records if record["kind"] == kind]
        for stage, kind in (("blockwise", "blockwise"), ("global", "step"))
    }
    return {
        "result": result,
        "records": records,
        "step_s": {stage: median(times) if times else 0.0 for stage, times in step_s.items()},
        "seconds": sum(median(times) * len(times) for times in step_s.values() if times),
        "blockwise_s": median(step_s["blockwise"] or [0.0]) * len(step_s["blockwise"]),
    }


def point(name: str, seed: int, seconds: float, tokens: int, found: dict[str, Any]) -> dict:
    """One line of the table."""
    errors = found.get("errors")
    return {
        "student": name,
        "seed": seed,
        "tokens": tokens,
        "seconds": seconds,
        "forward_kl": found["forward_kl"],
        "top1_agreement": found["top1_agreement"],
        "perplexity": found["student_perplexity"],
        "mean_k": found["mean_k"],
        "block_error": sum(errors) / len(errors) if errors else None,
    }


def compare(arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[list[dict], float]:
    """The table's lines of one seed, and the gap between the two arms' starts."""
    base = [*arguments.set, f"train.seed={seed}", f"train.device={arguments.device}"]
    base += ["train.eval_every_tokens=0", "train.save_every_tokens=0", "train.log_every_steps=1"]
    both = load_config(
        None,
        arguments.preset,
        [
            *base,
            f"train.blockwise_tokens={arguments.blockwise_tokens}",
            f"train.tokens={arguments.tokens}",
        ],
    )
    staged = train(both, folder / f"{seed}-staged", "blockwise, then global")
    size = step_tokens(both)
    num_steps = max(1, round(staged["seconds"] / staged["step_s"]["global"]))
    alone_config = load_config(None, arguments.preset, [*base, f"train.tokens={num_steps * size}"])
    alone = train(alone_config, folder / f"{seed}-alone", "global alone")
    blocks = [r for r in staged["records"] if r["kind"] == "blocks"]
    (switch,) = [r for r in staged["records"] if r["kind"] == "eval"]
    first, last = staged["result"].before.as_dict(), staged["result"].after.as_dict()
    only = alone["result"]
    lines = [
        point("initial", seed, 0.0, 0, {**first, "errors": blocks[0]["errors"]}),
        point(
            "after blockwise",
            seed,
            staged["blockwise_s"],
            switch["tokens"],
            {**switch, "errors": blocks[1]["errors"]},
        ),
        point("blockwise, then global", seed, staged["seconds"], staged["result"].tokens, {**last}),
        point("global alone", seed, alone["seconds"], only.tokens, only.after.as_dict()),
    ]
    start, other = first["forward_kl"], only.before.forward_kl
    return lines, abs(start - other) / max(start, 1e-12)


def main() -> None:
    """Train, compare, report."""
    options = parser(__doc__)
    options.add_argument("--preset", default="demo")
    options.add_argument("--blockwise-tokens", type=int, default=65_536)
    options.add_argument("--tokens", type=int, default=65_536, help="of the global stage")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.smoke:
            arguments.blockwise_tokens, arguments.tokens = 128, 128
            teacher = tiny_teacher(folder / "teacher")
            arguments.set = [*SMOKE, f"teacher.path={teacher}", *arguments.set]
        found = [compare(arguments, seed, folder) for seed in arguments.seeds]
    gate = check("the arms' starts", max(gap for _, gap in found), 0.0)
    rows = [line for lines, _ in found for line in lines]
    mean = {
        name: sum(row["forward_kl"] for row in rows if row["student"] == name) / len(found)
        for name in dict.fromkeys(row["student"] for row in rows)
    }
    pairs = (("blockwise, then global", "global alone"), ("after blockwise", "initial"))
    report(
        "blockwise",
        rows,
        {f"{one} / {other}, KL": mean[one] / mean[other] for one, other in pairs},
        results_folder(arguments),
        goal={"blockwise, then global / global alone, KL": 1.0},
        parity=gate,
        settings={
            "preset": arguments.preset,
            "blockwise_tokens": arguments.blockwise_tokens,
            "tokens": arguments.tokens,
            "seeds": arguments.seeds,
            "set": arguments.set,
            "smoke": arguments.smoke,
        },
        environment=environment(arguments.device),
    )


if __name__ == "__main__":
    main()
