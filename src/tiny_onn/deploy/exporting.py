"""The student to export, its rule, and text to measure on, which all exports share."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import text_rows, training_rows
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.students import LoadedStudent

# Numbers of an export are measured on so many tokens.
MEASURED_TOKENS = 8192
# These entries of a configuration describe the files that it was read from.
OF_FILES = ("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype")
WITH_GATE = ("budget", "top_k", "static", "random")


class ExportError(Exception):
    """A property of a student that the target cannot hold: got, expected, and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A student to export."""

    loaded: LoadedStudent
    keep: int | None = None
    """Number of experts that each layer of a dense export keeps; None: all."""
    fixed_k: bool = False
    """True if a GGUF gives every token the same number of experts."""
    text: Path | None = None
    """Text to measure on; None: the run's own."""

    @property
    def student(self) -> TinyOnnForCausalLM:
        """The student itself."""
        return self.loaded.student

    @property
    def backbone(self) -> PreTrainedModel:
        """The dense architecture around the student's experts."""
        return self.loaded.student.backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.loaded.tokenizer

    @property
    def banks(self) -> list[ExpertBank]:
        """The expert banks, first layer first."""
        return self.loaded.student.banks()

    @property
    def rule(self) -> RoutingRule:
        """The rule that selects experts, the same in every layer."""
        return self.banks[0].router.rule

    @property
    def dtype(self) -> torch.dtype:
        """The number format in which the student computes."""
        return self.loaded.student.dtype


def refuse_what_no_export_has(job: Job) -> None:
    """Refuse a student with parts that only this package computes.

    Raises:
        ExportError: the student has such a part.
    """
    if job.banks[0].token_scale is not None:
        raise ExportError(
            "got a student with experts.token_scale, expected one without; its weights depend on"
            " the token, so use it with this package"
        )
    if job.student.routing_controller != "none":
        raise ExportError(
            f"got a student with routing_controller = {job.student.routing_controller!r}, expected"
            " 'none'; set student.routing_controller = 'none', save the student, and export that"
        )


def gated_rule(job: Job) -> RoutingRule:
    """Return the student's rule if a linear gate alone selects the experts.

    Raises:
        ExportError: something else selects.
    """
    if job.rule.weighting == "ramp":
        raise ExportError(
            "got a student with experts.weighting = 'ramp', expected another one; its weights need"
            " the distance from the threshold, so use it with this package"
        )
    if job.rule.selection not in WITH_GATE:
        raise ExportError(
            f"got a student with router.selection = {job.rule.selection!r}, expected"
            f" {', '.join(WITH_GATE)}; this one has no linear gate that selects its experts, so"
            " export it with --to dense"
        )
    return job.rule


def backbone_config(job: Job) -> PretrainedConfig:
    """Return a copy of the dense model's configuration in the student's number format."""
    config = copy.deepcopy(job.backbone.config)
    config.dtype = job.dtype
    return config


def backbone_tensors(job: Job) -> dict[str, Tensor]:
    """Return the tensors of embeddings, attention, norms and head by the dense model's names.

    A head that is tied to the embeddings is left out.
    """
    state = job.backbone.state_dict()
    tied = getattr(job.backbone, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state.items() if not in_mlp(name) and name not in tied}


def mlp_prefix(job: Job, layer: int) -> str:
    """Return the dense model's name of a layer's MLP, with a dot at its end."""
    return f"{job.backbone.base_model_prefix}.layers.{layer}.mlp."


@contextmanager
def reading_documents(student: TinyOnnForCausalLM) -> Iterator[None]:
    """Let the student read packed rows within the context."""
    before = student.config._attn_implementation
    student.set_attn_implementation(DOCUMENT_ATTENTION)
    try:
        yield
    finally:
        student.set_attn_implementation(before or "eager")


def measured_rows(job: Job, what: str) -> list[PackedRow]:
    """Return text to measure on: that of --text, or the run's training text.

    Args:
        job: the student.
        what: the quantity that is measured, for the message.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    config, tokenizer = job.loaded.config, job.tokenizer
    if job.text is not None:
        return text_rows(job.text, tokenizer, config.data, MEASURED_TOKENS)
    if not job.loaded.of_run:
        raise UserError(
            f"--text: got none, expected a file or folder of text, on which {what} measured; name"
            " one, or export from the run's folder, which knows its text"
        )
    num_rows = -(-MEASURED_TOKENS // config.data.row_tokens)
    return list(islice(training_rows(config, tokenizer), num_rows))
