"""Exports that any program with transformers opens: a folder with its own modelling file.

The file is `standalone.py` with the dense model's class names in it, and with the functions that it
imports from this package written out, so that the routing has one source.
"""

import inspect
import json
import math
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from tiny_onn.console import status
from tiny_onn.deploy import standalone
from tiny_onn.deploy.exporting import (
    OF_FILES,
    ExportError,
    Job,
    backbone_config,
    backbone_tensors,
    gated_rule,
    mlp_prefix,
)
from tiny_onn.model import router
from tiny_onn.model.backbone import activation_name, generation_attention
from tiny_onn.ops import shared_experts

CODE_FILE = "modeling_tiny_onn.py"
AUTO_MAP = MappingProxyType(
    {
        auto: f"{CODE_FILE.removesuffix('.py')}.{name}"
        for auto, name in (
            ("AutoConfig", "TinyOnnConfig"),
            ("AutoModel", "TinyOnnModel"),
            ("AutoModelForCausalLM", "TinyOnnForCausalLM"),
        )
    }
)
EXACT = (
    "the same experts, weights and number of experts per token as in this package; training and the"
    " kernels for decoding on a GPU are left out, and a program must trust the folder's code"
    " (trust_remote_code=True)"
)


def write(job: Job, folder: Path) -> str:
    """Write the student with its own modelling file, and return what that loses.

    Raises:
        ExportError: the student's rule or architecture cannot be written so.
    """
    # `transformers serve` looks this name up among transformers' own classes, and finds this one,
    # which reads auto_map.
    _write(job, folder, architecture="AutoModelForCausalLM")
    return f"for transformers, {EXACT}"


def _write(job: Job, folder: Path, *, architecture: str) -> None:
    gated_rule(job)
    code = modelling_code(job)
    with status("Writing the weights"):
        save_torch_state_dict(tensors(job), folder)
    (folder / CODE_FILE).write_text(code, encoding="utf-8")
    table = {**config_table(job), "architectures": [architecture]}
    text = json.dumps(table, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if job.student.generation_config is not None:
        job.student.generation_config.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)


def write_for_vllm(job: Job, folder: Path) -> str:
    """Write the same folder after checks of what vLLM's transformers backend computes.

    Raises:
        ExportError: the backend would compute something else.
    """
    activation = activation_name(job.backbone.config)
    if activation not in ("silu", "swish"):
        # Its mixture of experts applies SiLU whatever the configuration says.
        raise ExportError(
            f"got a student with the activation {activation!r}, expected silu, which is the only"
            " one of vLLM's transformers backend; export it with --to transformers"
        )
    _write(job, folder, architecture="TinyOnnForCausalLM")
    return (
        f"for vLLM's transformers backend, {EXACT}; every token computes"
        f" {largest_k(job)} experts there, those that it does not activate at weight 0"
    )


def largest_k(job: Job) -> int:
    """Return the largest number of experts that a token can activate, shared ones included.

    Probabilities above a threshold t are fewer than 1 / t.
    """
    rule, num_experts = job.rule, job.student.config.num_experts
    if rule.num_active is not None:
        return rule.num_active
    lowest = min(bank.router.settled.item() for bank in job.banks)
    if rule.budget_form != "threshold" or lowest <= 0:
        return num_experts
    # The first choice is active without a threshold. One more makes up for rounded probabilities.
    return min(num_experts, rule.num_shared + math.floor(1 / lowest) + 1)


def config_table(job: Job) -> dict[str, Any]:
    """Return the content of config.json: the dense model's fields and those of the experts."""
    config, rule = job.student.config, job.rule
    table = backbone_config(job).to_diff_dict()
    for name in OF_FILES:
        table.pop(name, None)
    bank = job.banks[0]
    return {
        **table,
        "auto_map": dict(AUTO_MAP),
        "dtype": str(job.dtype).removeprefix("torch."),
        "model_type": f"tiny_onn_{table['model_type']}",
        "num_experts": config.num_experts,
        "num_experts_per_tok": largest_k(job),
        "moe_intermediate_size": config.moe_intermediate_size,
        "expert_activation": activation_name(job.backbone.config),
        "has_mean_outputs": bank.mean_outputs is not None,
        "has_expert_scale": bank.expert_scale is not None,
        "routing": {
            "selection": "budget" if rule.has_budget else "top_k",
            "budget_form": rule.budget_form,
            "weighting": rule.weighting,
            "num_shared": rule.num_shared,
        },
    }


def tensors(job: Job) -> dict[str, Tensor]:
    """Return the exported model's tensors by name.

    Experts are rounded to the number format in which the student computes, which every call of ours
    does too. Routers stay float32.
    """
    state = backbone_tensors(job)
    for layer, bank in enumerate(job.banks):
        prefix = mlp_prefix(job, layer)
        for kind, weight in bank.experts.named_parameters():
            state[f"{prefix}experts.{kind}"] = weight.detach().to(job.dtype)
        gate = bank.router
        for name in ("weight", "bias", "selection_bias"):
            state[f"{prefix}router.{name}"] = getattr(gate, name).detach().float()
        state[f"{prefix}router.threshold"] = gate.settled.detach().float().reshape(1)
        if bank.mean_outputs is not None:
            state[f"{prefix}mean_outputs"] = bank.mean_outputs.detach().to(job.dtype)
        if bank.expert_scale is not None:
            state[f"{prefix}expert_scale"] = bank.expert_scale.detach().float()
    # The file's writer drops tensors that share memory, as those of a checkpoint may.
    return {name: torch.clone(tensor).contiguous() for name, tensor in state.items()}


def modelling_code(job: Job) -> str:
    """Return the source of the exported model's classes.

    Raises:
        ExportError: transformers has no public classes for the architecture.
    """
    config, backbone = job.backbone.config, job.backbone
    classes = {
        "LlamaConfig": type(config).__name__,
        "LlamaForCausalLM": type(backbone).__name__,
        "LlamaModel": type(backbone.base_model).__name__,
    }
    if missing := [name for name in classes.values() if not hasattr(transformers, name)]:
        raise ExportError(
            f"got a student whose backbone has the class {missing[0]}, expected one that"
            " transformers exports; use it with this package"
        )
    source = inspect.getsource(standalone)
    for name, own in classes.items():
        source = re.sub(rf"\b{name}\b", own, source)
    source = source.replace("tiny_onn_llama", f"tiny_onn_{config.model_type}")
    if generation_attention(backbone) == "eager":
        # Some versions of transformers would take torch's attention, which has no softcap.
        source = re.sub(
            r"(\n    _keep_in_fp32_modules_strict)", r"\n    _supports_sdpa = False\1", source
        )
    names = sorted(classes.values())
    source = re.sub(
        r"from transformers import .*\n", f"from transformers import {', '.join(names)}\n", source
    )
    source = re.sub(r" {2}# (noqa|pyright):.*", "", source)
    source = re.sub(r"\nfrom tiny_onn\.[^\n]*", "", source).rstrip() + "\n"
    copied = [f"TIE_BREAK = {router.TIE_BREAK!r}", *map(_copied, COPIED)]
    head, first_class, classes_code = source.partition("\n\n\nclass ")
    return "\n\n\n".join([head.rstrip(), *copied, f"class {classes_code}"]) if first_class else head


COPIED = (
    shared_experts.routed,
    shared_experts.with_shared,
    router.budget_scores,
    router.routing_weights,
)


def _copied(function: Any) -> str:  # noqa: ANN401 - any function
    """Return a function's source with plain types in the place of this package's."""
    source = re.sub(r" {2}# noqa:.*", "", inspect.getsource(function).rstrip())
    source = re.sub(r"\b(Float|Bool|Int)\[Tensor, \"[^\"]*\"\]", "Tensor", source)
    return re.sub(r"\bLiteral\[[^\]]*\]|\b(Weighting|StraightThrough)\b", "str", source)
