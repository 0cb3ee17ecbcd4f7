"""Exports in the teacher's own architecture: experts folded back into one MLP per layer.

With all experts the result is exact. With `--keep K` every layer keeps the K experts that it
activates most often on text, for every token, and the MLP has K * I neurons.

Legend: E experts, K of them kept, I expert width, D hidden, J = 2 * I rows.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiny_onn.console import status, track
from tiny_onn.deploy.exporting import (
    ExportError,
    Job,
    backbone_config,
    backbone_tensors,
    measured_rows,
    mlp_prefix,
    reading_documents,
)
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import ExpertBank, recorded_routings

MLP_BIASES = ("gate_proj.bias", "up_proj.bias")


def write(job: Job, folder: Path) -> str:
    """Write a dense model with the experts that are kept, and return what that loses.

    Raises:
        ExportError: the experts' weights differ from token to token.
        UserError: the number of experts to keep is impossible, or there is no text to choose by.
    """
    num_experts = job.student.config.num_experts
    keep = num_experts if job.keep is None else job.keep
    if not max(1, job.rule.num_shared) <= keep <= num_experts:
        raise UserError(
            f"--keep: got {keep}, expected {max(1, job.rule.num_shared)} to {num_experts}, the"
            " experts of a layer; choose one in between"
        )
    if job.rule.weighting not in ("unit", "mean"):
        raise ExportError(
            f"got a student with experts.weighting = {job.rule.weighting!r}, expected unit or mean;"
            " weights that differ from token to token fit no dense MLP, so export it with"
            " --to transformers"
        )
    kept = [list(range(num_experts))] * len(job.banks)
    if keep < num_experts:
        kept = [most_used(usage_E, keep) for usage_E in usage(job)]
    config = backbone_config(job)
    config.get_text_config().intermediate_size = keep * job.student.config.moe_intermediate_size
    means = keep < num_experts and job.banks[0].mean_outputs is not None
    has_bias = means and hasattr(config, "mlp_bias")
    if has_bias:
        config.mlp_bias = True
    with status("Writing the weights"):
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(config, dtype=job.dtype)
        tensors = backbone_tensors(job)
        for layer, (bank, experts) in enumerate(zip(job.banks, kept, strict=True)):
            prefix = mlp_prefix(job, layer)
            own = mlp_tensors(bank, experts, mean=job.rule.weighting == "mean", bias=has_bias)
            tensors |= {f"{prefix}{name}": tensor.to(job.dtype) for name, tensor in own.items()}
        _fill(dense, tensors)
        dense.generation_config = job.student.generation_config
        dense.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
    return _lost(job, keep, means=means, has_bias=has_bias)


def _fill(dense: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Give a model on no device its weights; buffers, which files do not hold, stay without."""
    missing, unexpected = dense.load_state_dict(tensors, strict=False, assign=True)
    dense.tie_weights()
    left = [name for name, parameter in dense.named_parameters() if parameter.is_meta]
    assert not left, left
    assert not unexpected, unexpected
    assert all("." in name for name in missing), missing


def _lost(job: Job, keep: int, *, means: bool, has_bias: bool) -> str:
    num_experts, width = job.student.config.num_experts, job.student.config.moe_intermediate_size
    kind = job.backbone.config.model_type
    dense = f"a dense {kind} model with MLPs of {keep * width} neurons"
    if keep == num_experts:
        return f"{dense}, all experts on for every token: the sparsity is lost, and nothing else"
    line = (
        f"{dense}, the same {keep} of {num_experts} experts for every token: the router is lost,"
        " which chose them for each token"
    )
    if not means:
        return line
    if has_bias:
        return f"{line}; the other experts' mean outputs are the bias of down_proj"
    return f"{line}, and so are the other experts' mean outputs, since {kind} has no MLP bias"


def mlp_tensors(
    bank: ExpertBank, experts: Sequence[int], *, mean: bool, bias: bool
) -> dict[str, Tensor]:
    """Return a dense MLP's tensors that compute the sum of these experts.

    Args:
        bank: the layer's experts.
        experts: the experts to keep.
        mean: whether the weight of routed experts is 1 over their number instead of 1.
        bias: whether the mean outputs of all other experts become a bias.
    """
    gate_up_KJD = bank.experts.gate_up_proj.detach()[experts].float()
    down_KDI = bank.experts.down_proj.detach()[experts].float()
    if bank.expert_scale is not None:
        down_KDI = down_KDI * bank.expert_scale.detach()[experts, None, None]
    if mean:
        num_shared = bank.router.rule.num_shared
        routed_K = torch.tensor(experts) >= num_shared
        down_KDI[routed_K] /= max(1, int(routed_K.sum()))
    gate_KID, up_KID = gate_up_KJD.chunk(2, dim=1)
    gate_FD = gate_KID.flatten(0, 1)
    tensors = {
        "gate_proj.weight": gate_FD,
        "up_proj.weight": up_KID.flatten(0, 1),
        "down_proj.weight": down_KDI.transpose(0, 1).flatten(1),
    }
    if bias:
        assert bank.mean_outputs is not None
        others = [e for e in range(bank.experts.num_experts) if e not in experts]
        tensors |= {name: torch.zeros(len(gate_FD)) for name in MLP_BIASES}
        tensors["down_proj.bias"] = bank.mean_outputs.detach()[others].float().sum(0)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def most_used(usage_E: Float[Tensor, " experts"], keep: int) -> list[int]:
    """Return the numbers of the most used experts in ascending order."""
    return sorted(usage_E.argsort(descending=True, stable=True)[:keep].tolist())


@torch.no_grad()
def usage(job: Job) -> list[Float[Tensor, " experts"]]:
    """Return each layer's share of tokens that activate each expert, on text.

    The tokens that count in training count here. A millionth of the experts' mean
    probabilities is added, which orders equal shares.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    rows = measured_rows(job, "the usage of experts is")
    sums = [torch.zeros(bank.experts.num_experts) for bank in job.banks]
    num_tokens = 0
    with reading_documents(job.student):
        for row in track(rows, "usage of experts, rows"):
            with recorded_routings(job.banks) as routings:
                last_hidden_states(job.student, row.input_ids, **packed_kwargs(row))
            counted_T = row.router_mask[0]
            num_tokens += int(counted_T.sum())
            for layer, routing in enumerate(routings):
                sums[layer] += routing.active[counted_T].float().sum(0)
                sums[layer] += 1e-6 * routing.router_logits[counted_T].softmax(-1).sum(0)
    return [sum_E / max(1, num_tokens) for sum_E in sums]
