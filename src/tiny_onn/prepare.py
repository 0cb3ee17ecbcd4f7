"""From settings to a student, its teacher and its text, ready for the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.calibrate import fit_gates, importance_order, neuron_importance, settle_budgets
from tiny_onn.config import RunConfig
from tiny_onn.convert import convert
from tiny_onn.data import TokenStream, check_vocabulary
from tiny_onn.experts import ExpertBank
from tiny_onn.modeling import TinyOnnForCausalLM
from tiny_onn.packing import PackedRow
from tiny_onn.teacher import load_dense, pick_device, teacher_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a run starts from."""

    teacher: PreTrainedModel
    student: TinyOnnForCausalLM
    tokenizer: PreTrainedTokenizerBase


def prepare(config: RunConfig) -> Prepared:
    """Load the teacher, convert it, and calibrate the student on the first training rows.

    Raises:
        UserError: whatever is wrong with the teacher, the text or the sizes.
    """
    device = pick_device(config.train.device)
    dense, tokenizer = load_dense(config.teacher, device)
    check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
    student = make_student(config, dense, calibration_rows(config, tokenizer, device))
    return Prepared(
        teacher=teacher_for(dense, config.teacher),
        student=student,
        tokenizer=tokenizer,
    )


def calibration_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[PackedRow]:
    """The first training rows, `experts.calibration_tokens` or more, if conversion reads any."""
    stream = training_rows(config, tokenizer)
    num_rows = -(-config.experts.calibration_tokens // config.data.row_tokens)
    return [next(stream).to(device) for _ in range(num_rows)] if needs_text(config) else []


def training_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """The endless stream of training rows."""
    return TokenStream(
        config.data,
        tokenizer,
        split="train",
        seed=config.train.seed,
        row_tokens=config.data.row_tokens,
    )


def needs_text(config: RunConfig) -> bool:
    """Whether conversion reads calibration text."""
    return (
        config.experts.init == "importance"
        or config.experts.gate_init == "ridge"
        or config.router.selection in ("static", "budget")
    )


def make_student(
    config: RunConfig, dense: PreTrainedModel, rows: Sequence[PackedRow]
) -> TinyOnnForCausalLM:
    """Convert the dense model and set experts, gates and budgets as the settings say."""
    order = None
    if config.experts.init == "importance":
        order = importance_order(neuron_importance(dense, rows))
    student = convert(
        dense,
        config.experts,
        config.router,
        generator=torch.Generator().manual_seed(config.train.seed),
        neuron_order=order,
    )
    student.config.teacher = config.teacher.path
    student.config.teacher_revision = config.teacher.revision
    banks = student.banks()
    selection = config.router.selection
    if selection == "static" or (config.experts.gate_init == "ridge" and selection != "random"):
        fit_gates(dense, banks, rows)
    if selection == "static":
        make_static(banks)
    if selection == "budget":
        settle_budgets(dense, banks, rows)
    set_objective(banks, config)
    return student


@torch.no_grad()
def make_static(banks: Sequence[ExpertBank]) -> None:
    """The static control: keep of each fitted gate only its bias, one choice for every token."""
    for bank in banks:
        bank.router.weight.zero_()


def set_objective(banks: Sequence[ExpertBank], config: RunConfig) -> None:
    """Tell each bank how its gate learns: coupled to the main loss, by SMK alone, or not at all."""
    for bank in banks:
        bank.coupled = config.router.objective == "task"
        bank.compiled = config.train.compile
        bank.requires_grad_(True)
        bank.router.requires_grad_(config.router.objective != "none")


def with_router(config: RunConfig, **changes: object) -> RunConfig:
    """The same settings with another router: how controls are made from a recipe."""
    return replace(config, router=replace(config.router, **changes))  # pyright: ignore[reportArgumentType]


def frozen_names(student: TinyOnnForCausalLM) -> list[str]:
    """Names of the parameters that must never change in a run."""
    parameters: dict[str, nn.Parameter] = dict(student.named_parameters())
    return [name for name, p in parameters.items() if not p.requires_grad]
