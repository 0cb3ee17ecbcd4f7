"""Exports for llama.cpp: GGUF files of the architecture `glm4moe`, whose gate has a sigmoid.

llama.cpp gives every token the same number of places for experts, k. Its graph for GLM-4-MoE is

    p_e = sigmoid(g_e x)
    chosen: the k largest p_e + c_e
    y = shared(x) + scale * sum_chosen p_e E_e(x)

without a bias in the sigmoid. A student's rule is written in one of two ways.

**Threshold** (a budget in its threshold form, unit weights): steep gates whose logits are positive
for the experts that the student activates and negative for others, so that p is nearly 1 or 0, and
as many places as 99 of 100 tokens need. The number of experts stays dynamic in its effect, and the
places that a token does not need are computed for nothing. Fitted on text (`gguf_fits.py`).

**Fixed** (all others, and where it is asked for): near 0 the sigmoid is a line, so gates that are
scaled by a small s give weights 2 p_e of 1 + s g_e x / 2, which are 1 to a thousandth, and with
c_e = s b_e / 4 the order of g_e x + b_e: the k largest logits at equal weights.

Mean outputs m_e of inactive experts need constants, which this graph has not: the sum over inactive
experts is that over all minus that over active ones. One more neuron per expert adds -c(x) m_e, one
in the shared expert adds c(x) sum_e m_e, and c(x) is nearly 1 (`gguf_fits.Constant`).

Legend: T tokens, D hidden, E experts, S of them shared, R = E - S routed, I expert width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import ExpertGatingFuncType
from torch import Tensor

from tiny_onn.console import track
from tiny_onn.deploy.exporting import (
    ExportError,
    Job,
    backbone_config,
    backbone_tensors,
    gated_rule,
)
from tiny_onn.deploy.gguf_files import FORMATS, check_backbone, decoder_tensors, write_gguf
from tiny_onn.deploy.gguf_fits import (
    Constant,
    SignGate,
    fit_constant,
    fit_sign_gate,
    layer_inputs,
    places,
)
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule

ARCH = gguf.MODEL_ARCH.GLM4_MOE
FLAT = 2.0**-11
"""The scale s of fixed gates. Weights are off by s / 2 per unit of a logit, and the order of logits
that differ by less than 2**-22 / s may change, because float32 near 1/2 has steps of 2**-24."""
STEEP = 32.0
"""The scale of threshold gates. A weight is within 1 % of 1 or 0 for logits that are 0.14 from the
threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fits:
    """The fits on text that an export needs, one entry per layer or none."""

    gates: list[SignGate]
    """Threshold gates; empty for fixed ones."""
    constants: list[Constant]
    """Neurons that carry mean outputs; empty for a student without mean outputs."""


def fixed_rule(rule: RoutingRule) -> RoutingRule:
    """Return the rule with a fixed number of experts per token, the nearest to the mean."""
    k = max(rule.num_shared + 1, round(rule.target_k))
    return replace(rule, selection="top_k", target_k=float(k))


def has_threshold(job: Job) -> bool:
    """Return whether the export keeps the threshold, rather than a fixed number of experts."""
    rule = job.rule
    representable = rule.budget_form == "threshold" and rule.weighting == "unit"
    return rule.has_budget and representable and not job.fixed_k


def write(job: Job, folder: Path) -> str:
    """Write the student in every format of `FORMATS`, and return what that loses.

    Raises:
        ExportError: llama.cpp cannot represent a part of the student.
        UserError: there is no text to fit to.
    """
    rule = gated_rule(job)
    if rule.weighting not in ("unit", "mean"):
        raise ExportError(
            f"got a student with experts.weighting = {rule.weighting!r}, expected unit or mean;"
            " llama.cpp has no such weights beside a gate with a bias, so export it with"
            " --to transformers"
        )
    config = backbone_config(job)
    check_backbone(config)
    tensors = decoder_tensors(ARCH, config, backbone_tensors(job))
    fits = fit(job)
    for layer, bank in enumerate(job.banks):
        constant = fits.constants[layer] if fits.constants else None
        own = gate_tensors(bank, fits.gates[layer] if fits.gates else None)
        own |= expert_tensors(bank, constant)
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in own.items()}
    fields = expert_fields(job, fits)
    for form in FORMATS:
        path = folder / f"model-{form}.gguf"
        name = gguf.MODEL_ARCH_NAMES[ARCH]
        write_gguf(path, name, config, job.tokenizer, tensors, fields=fields, form=form)
    return _lost(job, fits, fields["expert_used_count"] + rule.num_shared)


def fit(job: Job) -> Fits:
    """Return what the student needs fitted on text; nothing is read where it needs nothing.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    threshold, means = has_threshold(job), job.banks[0].mean_outputs is not None
    if not (threshold or means):
        return Fits(gates=[], constants=[])
    inputs = layer_inputs(job, "gates and mean outputs for llama.cpp are")
    gates, constants = [], []
    for bank, x_TD in track(list(zip(job.banks, inputs, strict=True)), "fitting gates, layers"):
        if threshold:
            gates.append(fit_sign_gate(bank, x_TD))
        if means:
            constants.append(fit_constant(x_TD))
    return Fits(gates=gates, constants=constants)


def expert_fields(job: Job, fits: Fits) -> dict[str, Any]:
    """Return the fields of the experts, by the names of the writer's methods."""
    rule, config = fixed_rule(job.rule), job.student.config
    num_shared, k = rule.num_shared, int(rule.target_k)
    scale = 1.0 if fits.gates else 2.0 / (k - num_shared if rule.weighting == "mean" else 1)
    return {
        "expert_count": config.num_experts - num_shared,
        "expert_used_count": places(fits.gates) if fits.gates else k - num_shared,
        "expert_shared_count": max(1, num_shared),
        "expert_feed_forward_length": config.moe_intermediate_size + bool(fits.constants),
        "expert_gating_func": ExpertGatingFuncType.SIGMOID,
        "expert_weights_norm": False,
        "expert_weights_scale": scale,
        "leading_dense_block_count": 0,
    }


@torch.no_grad()
def gate_tensors(bank: ExpertBank, gate: SignGate | None) -> dict[str, Tensor]:
    """Return a layer's gate by its names in GGUF.

    Args:
        bank: the layer's experts and router.
        gate: the threshold gate; None: the router's logits decide for a fixed number of experts.
    """
    router, num_shared = bank.router, bank.router.rule.num_shared
    if gate is not None:
        weight_RD, bias_R = STEEP * gate.weight, torch.zeros(len(gate.weight))
    else:
        # A part that all experts share moves none past another.
        logits_RD = router.weight.float()[num_shared:]
        weight_RD = FLAT * (logits_RD - logits_RD.mean(0))
        bias_R = (router.bias + router.selection_bias).float()[num_shared:]
        bias_R = FLAT / 4 * (bias_R - bias_R.mean())
    return {"ffn_gate_inp.weight": weight_RD, "exp_probs_b.bias": bias_R}


@torch.no_grad()
def expert_tensors(bank: ExpertBank, constant: Constant | None) -> dict[str, Tensor]:
    """Return a layer's experts by their names in GGUF.

    Args:
        bank: the layer's experts.
        constant: the neuron that carries the mean outputs; None: there are none.
    """
    num_shared = bank.router.rule.num_shared
    gate_EID, up_EID = bank.experts.gate_up_proj.float().chunk(2, dim=1)
    down_EDI = bank.experts.down_proj.float()
    if bank.expert_scale is not None:
        down_EDI = down_EDI * bank.expert_scale.float()[:, None, None]
    if constant is not None:
        assert bank.mean_outputs is not None
        E = len(gate_EID)
        gate_EID = torch.cat((gate_EID, constant.u.expand(E, 1, -1)), dim=1)
        up_EID = torch.cat((up_EID, constant.v.expand(E, 1, -1)), dim=1)
        # The weight 1 / k of routed experts is none of their mean outputs'.
        k = fixed_rule(bank.router.rule).target_k - num_shared
        factor = k if bank.router.rule.weighting == "mean" else 1
        down_EDI = torch.cat((down_EDI, -factor * bank.mean_outputs.float()[..., None]), dim=2)
    shared = _shared_tensors(bank, constant, gate_EID, up_EID, down_EDI)
    return {
        "ffn_gate_exps.weight": gate_EID[num_shared:],
        "ffn_up_exps.weight": up_EID[num_shared:],
        "ffn_down_exps.weight": down_EDI[num_shared:],
        **shared,
    }


def _shared_tensors(
    bank: ExpertBank,
    constant: Constant | None,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
) -> dict[str, Tensor]:
    """Return the shared expert's tensors; a student without one gets one of zeros.

    llama.cpp's graph needs one. The neuron of the constant is that of the first shared expert.
    """
    num_shared = bank.router.rule.num_shared
    gate_SID, up_SID, down_SDI = (
        t[: max(1, num_shared)].clone() for t in (gate_EID, up_EID, down_EDI)
    )
    if not num_shared:
        for tensor in (gate_SID, up_SID, down_SDI):
            tensor.zero_()
    if constant is not None:
        assert bank.mean_outputs is not None
        down_SDI[..., -1] = 0
        gate_SID[0, -1], up_SID[0, -1] = constant.u, constant.v
        down_SDI[0, :, -1] = bank.mean_outputs.float()[num_shared:].sum(0)
    return {
        "ffn_gate_shexp.weight": gate_SID.flatten(0, 1),
        "ffn_up_shexp.weight": up_SID.flatten(0, 1),
        "ffn_down_shexp.weight": down_SDI.transpose(0, 1).flatten(1),
    }


def _lost(job: Job, fits: Fits, k: int) -> str:
    rule = job.rule
    lines = [f"for llama.cpp ({', '.join(FORMATS)})"]
    if fits.gates:
        agreement = sum(gate.agreement for gate in fits.gates) / len(fits.gates)
        lines.append(
            f"every token computes {k} experts, and those that it does not activate get a weight"
            f" near 0; a fitted gate agrees with the router about {agreement:.1%} of all experts on"
            " text that it was not fitted to"
        )
    else:
        if rule.has_budget:
            lines.append(
                f"every token uses {k} experts, where the student uses {rule.target_k:g} on average"
                " and more or fewer by need"
            )
        lines.append("weights are equal to about a thousandth instead of exactly")
    if fits.constants:
        error = sum(constant.error for constant in fits.constants) / len(fits.constants)
        lines.append(
            f"mean outputs of inactive experts are off by {error:.1%} (root mean square on text)"
        )
    lines.append("weights are rounded to the file's format")
    return "; ".join(lines)
