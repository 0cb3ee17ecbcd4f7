"""The README of a student's folder, in the hub's format, made from the records of its run.

The hub reads the block of YAML at its beginning: licence, base model, data and results
(https://huggingface.co/docs/hub/model-cards). The same run gives the same bytes.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    metadata_load,
    metadata_save,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError

from tiny_onn.config.schema import HUB_PREFIX, RunConfig, TeacherConfig
from tiny_onn.runs.files import read_object, write_atomically

EMBEDDED, EMBEDDED_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
README = "README.md"
EXAMPLE = """```python
from tiny_onn import TinyOnnForCausalLM  # https://github.com/tiny-onn/tiny-onn
from transformers import AutoTokenizer

student = TinyOnnForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def write_model_card(
    folder: Path,
    config: RunConfig,
    run: Path,
    *,
    step: int | None,
    summary: dict[str, Any] | None = None,
) -> None:
    """Write the README of a student that its run's folder describes.

    Args:
        folder: the student's folder, or that of an export.
        config: the settings of the run.
        run: the run's folder.
        step: the number of updates that trained the student; numbers are left out where the run's
            summary is that of another step.
        summary: the run's summary; None: it is in the run's folder.

    Raises:
        UserError: the disk refuses, or a record of the run cannot be read.
    """
    environment = read_object(run / "environment.json") or {}
    if summary is None:
        summary = read_object(run / "summary.json") or {}
    if summary.get("steps") != step:
        summary = {}
    data = _metadata(config, summary.get("after"))
    lines = [*_about(config), *_measured(summary), *_recipe(config, summary, environment)]
    text = "\n".join(lines)
    write_atomically(folder / README, f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def write_export_card(
    folder: Path, source: Path, *, to: str, example: str, lost: str, budget: float | None
) -> None:
    """Write the README of an export: that of its student, with what the export changes in front.

    The student's example is left out, because this package does not open an export. A student
    without a README, saved before there was one, gives a README without numbers.

    Args:
        folder: the export's folder, which may hold the student's README already.
        source: the README of the student.
        to: the target of the export.
        example: a block of code that runs the export from within its folder.
        lost: what the export loses, a line.
        budget: the mean number of experts that was asked for; None: as in training.

    Raises:
        UserError: the disk refuses.
    """
    known = source.read_text(encoding="utf-8") if source.is_file() else ""
    metadata = (metadata_load(source) or {}) if known else {}
    body = ModelCard(known, ignore_metadata_errors=True).text.lstrip()
    body = re.sub(r"```python\nfrom tiny_onn import .*?\n```\n\n", "", body, flags=re.DOTALL)
    # These results are the student's, and an export may compute something else.
    metadata.pop("model-index", None)
    metadata["tags"] = [*dict.fromkeys([*metadata.get("tags", []), to])]
    metadata["library_name"] = "gguf" if to == "gguf" else "transformers"
    at = "" if budget is None else f" at a mean of {budget:g} experts per token"
    lines = [
        f"# An export for {to}",
        "",
        f"`tiny-onn export --to {to}` wrote this folder{at}: {lost}.",
        "",
        "Run this in the folder:",
        "",
        example,
        "",
        "What follows describes the student that was exported." if body else "",
    ]
    text = "\n".join(lines).rstrip() + "\n\n" + body
    target = folder / README
    write_atomically(target, text.rstrip() + "\n")
    metadata_save(target, metadata)


def licence_of(teacher: TeacherConfig) -> str | None:
    """Return the licence that the teacher's own README states; None if there is none at hand.

    The file is looked for in the teacher's folder or in the hub's local cache.
    """
    if teacher.path == "embedded":
        return EMBEDDED_LICENCE
    found = Path(teacher.path) / README
    if not os.path.isdir(teacher.path):  # noqa: PTH112 - a hub id may be no valid path
        try:
            cached = try_to_load_from_cache(teacher.path, README, revision=teacher.revision)
        except HFValidationError:
            # The teacher's folder is no longer there, and its path is no hub id.
            return None
        if not isinstance(cached, str):
            return None
        found = Path(cached)
    stated = (metadata_load(found) or {}).get("license") if found.is_file() else None
    return str(stated) if stated else None


def _base_model(teacher: TeacherConfig) -> str:
    """Return the teacher's hub id, or the last part of its folder's name."""
    if teacher.path == "embedded":
        return EMBEDDED
    is_folder = os.path.isdir(teacher.path)  # noqa: PTH112 - a hub id may be no valid path
    return Path(teacher.path).name if is_folder else teacher.path


def _metadata(config: RunConfig, after: dict[str, Any] | None) -> ModelCardData:
    """Return what the hub reads."""
    hub = [s.removeprefix(HUB_PREFIX) for s in config.data.sources if s.startswith(HUB_PREFIX)]
    teacher, results = _base_model(config.teacher), []
    if after is not None:
        numbers = {"perplexity": "student_perplexity", "kl": "forward_kl"}
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="held-out documents of the training text",
                metric_type=kind,
                metric_value=round(after[key], 4),
            )
            for kind, key in numbers.items()
        ]
    return ModelCardData(
        base_model=teacher if "/" in teacher else None,
        license=licence_of(config.teacher),
        datasets=hub or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "distillation", "tiny-onn"],
        model_name=f"{teacher.rpartition('/')[2]}, Hyper-SMoE" if results else None,
        eval_results=results or None,
    )


def _about(config: RunConfig) -> Iterator[str]:
    teacher, experts = _base_model(config.teacher), config.experts.num_experts
    norms = bool(config.optim.norm_lr)
    trained = "Experts, gates and the gains of norms" if norms else "Experts and gates"
    kept = "embeddings and attention" if norms else "embeddings, attention and norms"
    yield f"# {teacher.rpartition('/')[2]} as a Hyper-SMoE"
    yield ""
    yield (
        f"This is {teacher} with every MLP cut into {experts} experts, of which a gate activates"
        f" {config.router.target_k:g} for a token (`router.selection ="
        f' "{config.router.selection}"`). {trained} were trained by distillation from that'
        f" model; {kept} are its own."
    )
    yield ""
    licence = licence_of(config.teacher)
    if licence is None:
        yield (
            "The teacher's licence holds for this model too. It could not be read where this file"
            " was written: see the teacher's page."
        )
    else:
        yield f"The teacher's licence, {licence}, holds for this model too."
    yield ""
    yield EXAMPLE


def _measured(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the run's evaluations, if it has some of this student."""
    yield ""
    if not summary:
        yield "No numbers of this student are recorded; `tiny-onn eval` measures them."
        return
    after = summary["after"]
    yield (
        f"Measured on {after['num_tokens']:,} tokens of held-out documents of the training text,"
        " KL in nats per token, FLOPs of a token's forward pass through all MLPs:"
    )
    yield ""
    yield "| | KL to the teacher | agreement | perplexity | experts per token | MLP MFLOPs |"
    yield "|---|---|---|---|---|---|"
    dense = after["dense_ffn_flops"] / 1e6
    yield f"| teacher | 0 | 100 % | {after['teacher_perplexity']:.2f} | all | {dense:,.1f} |"
    for name, key in (("student, untrained", "before"), ("student", "after")):
        if (row := summary[key]) is not None:
            yield (
                f"| {name} | {row['forward_kl']:.4f} | {row['top1_agreement']:.1%} |"
                f" {row['student_perplexity']:.2f} | {row['mean_k']:.2f} |"
                f" {row['ffn_flops'] / 1e6:,.1f} |"
            )


def _recipe(
    config: RunConfig, summary: dict[str, Any], environment: dict[str, Any]
) -> Iterator[str]:
    """Yield how the student was made."""
    yield ""
    yield "## How it was made"
    yield ""
    # Folders of the machine that trained it tell a reader nothing.
    sources = [s if s.startswith(HUB_PREFIX) else Path(s).name for s in config.data.sources]
    yield f"- Text: {', '.join(sources)}; rows of {config.data.row_tokens:,} tokens."
    if summary:
        rows = config.train.rows_per_step
        said = f"{rows} rows" if rows > 1 else "one row"
        yield f"- {summary['tokens']:,} tokens in {summary['steps']:,} steps of {said}."
    optim = config.optim
    rates = f"{optim.expert_lr:g} (experts) and {optim.gate_lr:g} (gates)"
    if optim.norm_lr:
        rates = f"{optim.expert_lr:g} (experts), {optim.gate_lr:g} (gates) and {optim.norm_lr:g}"
        rates += " (norms)"
    yield (
        f"- Partition `{config.experts.init}`, gates' objective `{config.router.objective}`,"
        f" {optim.name} with rates {rates}, seed {config.train.seed}."
    )
    if config.loss.label_coef:
        yield f"- Share of cross-entropy to the text in the loss: {config.loss.label_coef:g}."
    if environment:
        commit = environment.get("git_commit")
        yield (
            f"- tiny-onn {environment['tiny_onn']}{f' at commit {commit}' if commit else ''}, torch"
            f" {environment['torch']}, transformers {environment['transformers']}, on"
            f" {environment['device']}."
        )
