"""Which learning rate, in units of the weights' own scale, suits every family of teachers?

Each teacher is converted once by a preset; short runs from that student, on the same text, then
differ in their rates alone, which are the preset's times a factor. A preset carries to a family if
its rates, factor 1, improve the student there and no other factor is much better.

    python -m experiments.learning_rates --teacher embedded gemma-3-270m \
        --text embedded documentation
    python -m experiments.learning_rates --teacher random:qwen3 random:llama --tokens 4096
    python -m experiments.learning_rates --device cuda --teacher embedded gemma-3-270m \
        --text embedded documentation --tokens 262144 --row-tokens 4096 --eval-tokens 32768

`experiments/gemma_teacher.py` makes the folder `gemma-3-270m`, `experiments/documentation.py` the
folder `documentation`. `random:qwen3` and `random:llama` are four layers with random weights at the
scale that these families begin with. A line per run goes to `learning_rates.jsonl`; a run that has
its line is not made again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import environment
from experiments.arms_table import read_records
from experiments.options import parser, results_folder
from tiny_onn.config.read import load_config, override
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared, prepare
from tiny_onn.data.rows import training_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.schedule import lr_factor, set_learning_rates
from tiny_onn.distill.stages import step_tokens
from tiny_onn.distill.step import distill_step
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.routing.steering import fitted_eval_thresholds
from tiny_onn.runs.trained_tensors import student_tensors
from tiny_onn.teacher.embedded import embedded_teacher

NAME = "learning_rates.jsonl"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
RATES = ("expert_lr", "gate_lr")
SMOKE = ("experts.num_experts=8", "router.target_k=4", "train.compile=false")


def random_teacher(family: str, folder: Path) -> Path:
    """Write four layers of a family with random weights, which read the embedded tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher())
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(teacher: str, text: str, arguments: argparse.Namespace) -> RunConfig:
    """The settings of a teacher's and a text's runs at factor 1."""
    overrides = [
        f"teacher.path={json.dumps(teacher)}",
        f"data.sources={json.dumps([text])}",
        f"data.row_tokens={arguments.row_tokens}",
        f"data.eval_tokens={arguments.eval_tokens}",
        f"train.tokens={arguments.tokens}",
        f"train.device={arguments.device}",
        f"train.seed={arguments.seed}",
        *(SMOKE if arguments.smoke else ()),
        *arguments.set,
    ]
    config = load_config(None, arguments.preset, overrides)
    return prepare_device(config)[0]


def runs(config: RunConfig, factors: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Convert the teacher, then train the same student at each factor; yield what it became."""
    prepared = prepare(config)
    rows = threshold_rows(config, prepared.tokenizer, prepared.student.device)
    start = {name: tensor.clone() for name, tensor in student_tensors(prepared.student).items()}
    for factor in factors:
        with torch.no_grad():
            for name, tensor in student_tensors(prepared.student).items():
                tensor.copy_(start[name])
        rates = {name: getattr(config.optim, name) * factor for name in RATES}
        changed = override(config, [f"optim.{name}={rate}" for name, rate in rates.items()])
        began = time.perf_counter()
        yield {"factor": factor, **rates, **one_run(changed, prepared, rows)} | {
            "seconds": time.perf_counter() - began
        }


def one_run(config: RunConfig, prepared: Prepared, rows: list[Any]) -> dict[str, Any]:
    """Train the prepared student, and evaluate it before and after."""
    training = assemble(config, prepared.student, prepared.teacher)
    config, student, scope = training.config, training.student, training.config.router.budget_scope
    held_out = prepared.held_out
    with fitted_eval_thresholds(student, rows, scope):
        before = evaluate(student, held_out, config.loss)
    stream, losses = training_rows(config, prepared.tokenizer), []
    for step, done in enumerate(range(0, config.train.tokens, step_tokens(config))):
        progress = (done + step_tokens(config) / 2) / config.train.tokens
        set_learning_rates(training.optimizer, lr_factor(min(1.0, progress), config.optim))
        batch = [next(stream) for _ in range(config.train.rows_per_step)]
        models = (student, training.teacher, training.optimizer)
        losses.append(distill_step(*models, batch, config, step=step).loss.item())
    with fitted_eval_thresholds(student, rows, scope):
        after = evaluate(student, held_out, config.loss)
    return {
        "kl_before": before.forward_kl,
        "kl_after": after.forward_kl,
        "teacher_perplexity": after.teacher_perplexity,
        "mean_k": after.mean_k,
        "losses": losses,
    }


def main() -> int:
    """Make the runs that have no line yet."""
    options = parser(__doc__)
    options.add_argument("--teacher", nargs="+", default=["embedded"], help="or random:FAMILY")
    options.add_argument("--text", nargs="+", default=["embedded"], help="files or folders")
    options.add_argument("--factors", nargs="+", type=float, default=FACTORS)
    options.add_argument("--preset", default="demo")
    options.add_argument("--tokens", type=int, default=6144)
    options.add_argument("--row-tokens", type=int, default=1024)
    options.add_argument("--eval-tokens", type=int, default=4096)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.row_tokens, arguments.eval_tokens = 128, 64, 128
        arguments.teacher, arguments.text = ["random:llama"], ["embedded"]
        arguments.set.append("experts.calibration_tokens=128")
    with tempfile.TemporaryDirectory() as temporary:
        folder = results_folder(arguments) or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for teacher in arguments.teacher:
            family = teacher.partition("random:")[2]
            path = str(random_teacher(family, Path(temporary) / family)) if family else teacher
            for text in arguments.text:
                bracket(path, teacher, text, folder / NAME, arguments)
    return 0


def bracket(
    path: str, teacher: str, text: str, record: Path, arguments: argparse.Namespace
) -> None:
    """Run the factors that have no line yet; print and append their lines."""
    config = settings(path, text, arguments)
    subject = {
        "teacher": Path(teacher).name,
        "text": Path(text).name,
        "preset": arguments.preset,
        "tokens": config.train.tokens,
        "row_tokens": config.data.row_tokens,
        "seed": config.train.seed,
        "dtype": config.teacher.dtype,
        "set": arguments.set,
    }
    made = read_records(record)
    done = [line["factor"] for line in made if all(line[k] == v for k, v in subject.items())]
    left = [factor for factor in arguments.factors if factor not in done]
    if not left:
        return
    where = environment(arguments.device)
    for run in runs(config, left):
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**subject, **run, "environment": where}) + "\n")
        print(
            f"{subject['teacher']}, {subject['text']}: {run['factor']:g} x"
            f" ({run['expert_lr']:.3g}, {run['gate_lr']:.3g}):"
            f" KL {run['kl_before']:.4f} -> {run['kl_after']:.4f}, k {run['mean_k']:.2f},"
            f" first loss {run['losses'][0]:.3f}, last {run['losses'][-1]:.3f},"
            f" {run['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
