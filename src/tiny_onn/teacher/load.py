"""Loading of the dense model, which is the embedded one, a local folder or a hub id."""

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tiny_onn.config.schema import TeacherConfig
from tiny_onn.console import track
from tiny_onn.data.tokens import fit_tokenizer
from tiny_onn.device import number_format
from tiny_onn.errors import LoadErrors, UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.student import TinyOnnConfig
from tiny_onn.teacher.embedded import embedded_teacher
from tiny_onn.teacher.model_files import check_loaded, check_model_config, check_runs, check_weights
from tiny_onn.teacher.model_paths import find_model, no_folder
from tiny_onn.teacher.multimodal import dense_skeleton
from tiny_onn.teacher.packed_check import check_packing
from tiny_onn.teacher.quantize import quantize_nf4

_TRUST_IT = "if you trust its author, set teacher.trust_remote_code = true"
_NAME_ITS_RUN = "if it is an export of a student, name the student or its run"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def load_model(
    config: TeacherConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense model that a user names as MODEL, as `load_dense` does.

    Raises:
        UserError: `load_dense` refuses the model; the message begins with MODEL.
    """
    try:
        return load_dense(config, device)
    except UserError as error:
        text = str(error).replace("teacher.path: ", "MODEL: ", 1)
        raise UserError(text.replace(_TRUST_IT, _NAME_ITS_RUN)) from error


def load_dense(
    config: TeacherConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense model, frozen and ready for packed rows, and its tokenizer.

    The architecture is checked before any weight is read.

    Raises:
        UserError: there is no such model, it is no supported one, or there is no network.
    """
    if config.path == "embedded":
        source = str(embedded_teacher())
    else:
        source = find_model(config.path, "teacher.path", config.revision)
    revision = None if Path(source).is_dir() else config.revision
    trust = {"trust_remote_code": config.trust_remote_code}

    def explain(reason: str) -> str:
        if "custom code" in reason and not config.trust_remote_code:
            return (
                f"teacher.path: got {config.path}, which needs code that comes with it, expected a "
                f"model that transformers knows; {_TRUST_IT}"
            )
        remedy = (
            "a folder needs config.json, model.safetensors and tokenizer.json"
            if revision is None
            else f"a hub id needs a network or a local cache ({no_folder(source)})"
        )
        return (
            f"teacher.path: got {config.path}, expected a causal language model in safetensors "
            f"format with its tokenizer ({reason}); {remedy}"
        )

    with LoadErrors(explain):
        commit = _checked(config, check_model_config, source, revision)
        # Everything must come from one commit, even if another is pushed meanwhile.
        revision = commit or revision
        hub = {} if revision is None else {"revision": revision}
        settings = AutoConfig.from_pretrained(source, **trust, **hub)
        if isinstance(settings, TinyOnnConfig):
            raise UserError(
                f"teacher.path: got {config.path}, a Tiny-ONN student, expected a dense model; "
                "name the model it was converted from"
            )
        skeleton = _checked(config, dense_skeleton, settings, **trust)
        _checked(config, check_weights, source, revision, skeleton)
        # The annotation does not say that `from_pretrained` returns a pair with loading info.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, number_format(config.dtype, device)),
            use_safetensors=True,
            output_loading_info=True,
            **trust,
            **hub,
        )
        model, loading = loaded
        _checked(config, check_loaded, model, loading)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust, **hub)
        fit_tokenizer(tokenizer, model)
    # transformers stores the commit or None here, which depends on its version.
    model.config._commit_hash = commit
    model.requires_grad_(False)
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    model = model.to(device).train(False)
    _checked(config, check_packing, model)
    _checked(config, check_runs, model)
    return model, tokenizer


def _checked(
    config: TeacherConfig,
    check: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Return the result of a check, and put the teacher's name before its refusal."""
    try:
        return check(*args, **kwargs)
    except UserError as error:
        raise UserError(f"teacher.path: got {config.path}: {error}") from error


def teacher_for(dense: PreTrainedModel, config: TeacherConfig) -> PreTrainedModel:
    """Return the model that teaches, made from the dense model after students were cut from it.

    The placement `shared` returns the dense model itself, its MLPs quantised in place if the
    settings say so. The placement `separate` returns a copy: without quantisation all its tensors
    are copies, with quantisation its other tensors stay shared.

    Raises:
        UserError: bitsandbytes is missing, or a layer's width cannot be quantised.
    """
    if config.placement == "separate":
        quantised = config.quantization != "none"
        shared = {id(p): p for p in dense.parameters()} if quantised else {}
        dense = copy.deepcopy(dense, shared)
    if config.quantization == "nf4":
        only_mlps = config.placement == "shared"
        quantize_nf4(dense, only_mlps=only_mlps, double_quant=config.double_quant)
    return dense


def quiet_transformers() -> None:
    """Silence transformers' notices in this process, and show loading by our own bar.

    Programs call this once at their start. A program that uses the package as a library decides for
    itself.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_tqdm_hook(_own_bar)


def _own_bar(
    factory: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    """Return our bar in place of transformers' bar over weights that are read or written."""
    if args and isinstance(args[0], Collection):
        return track(args[0], str(kwargs.get("desc", "Loading")))
    return factory(*args, **kwargs)
