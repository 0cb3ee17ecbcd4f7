"""The refit of a student's down projections and mean outputs by least squares, layer by layer.

A student that uses half of its experts misses what the others would have added. The neurons that
are left can stand in for much of it, and the best way is known in closed form: the output is linear
in the down projections and in the mean outputs, so that their best values for a given routing solve
a linear regression. The layers are solved from the first to the last, each on the inputs that the
student's own layers below it give, which are refitted already, so that a layer also repairs a part
of their errors.

The regression pulls toward the weights from before it. How strongly it does so is chosen for each
layer among `PENALTIES`, by the error on calibration rows that the fit has not seen. The idea of
repairing what stays by least squares is that of Optimal Brain Surgeon (Hassibi and Stork, 1993) and
of SparseGPT (arXiv 2301.00774).

Cost: a forward pass of the teacher and two of the student, one sum over tokens of products of F + E
features a layer, and a Cholesky factorisation of an (F + E)-square matrix for every penalty.
Memory: two matrices of this size in float64, and for every calibration token five vectors of D
numbers, whatever the number of layers.

Legend: T tokens, D hidden, E experts, I expert width, F = E * I neurons, P = F + E features.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import backbone_of, decoder_layers, last_hidden_states
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.hooks import layer_outputs
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.routing.thresholds import exact_threshold

PENALTIES = (0.1, 1.0, 10.0)
# Every so many rows, one row is kept from the fit to choose the penalty on.
CHECK_EVERY = 4


class Sample(NamedTuple):
    """What one row of text asks of a layer."""

    x_TD: Float[Tensor, "tokens hidden"]
    """The layer's input."""
    target_TD: Float[Tensor, "tokens hidden"]
    """The output to come close to."""
    token_mask_T: Bool[Tensor, " tokens"]
    """The tokens that count."""


@dataclass(kw_only=True, slots=True)
class _Passing:
    """A row of text on its way through the layers of teacher and student."""

    row: PackedRow
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """The arguments with which the backbone calls each layer, beside the hidden states."""
    teacher: Tensor
    """The teacher's hidden states (1, T, D) before the layer in hand."""
    student: Tensor
    """The student's."""

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return a layer's output on these hidden states."""
        args, kwargs = self.calls[index]
        output = layer(hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def refit(
    student: TinyOnnForCausalLM, dense: PreTrainedModel, rows: Sequence[PackedRow]
) -> list[float]:
    """Set down projections and mean outputs to the least-squares fit of the teacher, in place.

    A layer's target is the output that its MLP would have to have for the teacher's hidden states
    to come out of the student's layer. First tokens of documents and padding are left out. A budget
    that each layer has for itself is met anew on the inputs that the refitted layers below give.

    Args:
        student: a converted student, whose gates and thresholds are set.
        dense: the dense model that it was cut from.
        rows: calibration text on the models' device, at least one row.

    Returns:
        Per layer, the error on the calibration rows that chose the penalty, relative to the error
        before the refit. Where there is one row alone, it is that row's own.

    Raises:
        UserError: the family's layers cannot be run one by one.
    """
    banks, errors = student.banks(), []
    layers = zip(decoder_layers(dense), decoder_layers(backbone_of(student)), strict=True)
    with eval_mode(student):
        passing = [_passing(dense, row) for row in rows]
        _check_replay(dense, passing[0])
        for index, (theirs, ours) in enumerate(track(list(layers), "refitting, layers")):
            bank = banks[index]
            samples = [_sample(item, index, theirs, ours, bank) for item in passing]
            if bank.router.rule.target_k < bank.router.weight.shape[0]:
                if MODE == "teacher":
                    samples = [Sample(t, s.target_TD, s.token_mask_T) for t, s in zip(TX, samples)]
                TX.clear()
                _meet_budget(bank, samples)
                errors.append(fit_bank(bank, samples))
            for item in passing:
                item.student = item.run(ours, index, item.student)
    return errors

def _passing(dense: PreTrainedModel, row: PackedRow) -> _Passing:
    """Return a row before the first layer."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not first:
            first.append(hidden)
        calls.append((args[1:], kwargs))

    with ExitStack() as hooks:
        for layer in decoder_layers(dense):
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    return _Passing(row=row, calls=calls, teacher=first[0], student=first[0])


def _check_replay(dense: PreTrainedModel, item: _Passing) -> None:
    """Refuse a family whose layers need more than their arguments to compute what they compute."""
    with layer_outputs(dense) as outputs:
        last_hidden_states(dense, item.row.input_ids, **packed_kwargs(item.row))
    hidden = item.teacher
    for index, layer in enumerate(decoder_layers(dense)):
        hidden = item.run(layer, index, hidden)
    if not torch.equal(hidden, outputs[-1]):
        gap = (hidden - outputs[-1]).abs().max().item()
        raise UserError(
            f"experts.refit: got true, expected false for architecture {type(dense).__name__}: its"
            f" layers, run one by one, differ from the whole model by {gap:.3g}; set"
            " experts.refit = false"
        )


def _sample(
    item: _Passing, index: int, theirs: nn.Module, ours: nn.Module, bank: ExpertBank
) -> Sample:
    """Pass a row through one layer of both models; the student's states stay before the layer."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    outs = []

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].flatten(0, -2))

    def keep_output(_: nn.Module, __: object, output: Tensor) -> None:
        targets.append(output.flatten(0, -2))
        TX.append(__[0].flatten(0, -2))

    with theirs.get_submodule("mlp").register_forward_hook(keep_output):
        item.teacher = item.run(theirs, index, item.teacher)
    with bank.register_forward_pre_hook(keep_input), bank.register_forward_hook(lambda _m, _a, o: outs.append(o.flatten(0, -2))):
        mine = item.run(ours, index, item.student)
    target = targets[0]
    if MODE == "stream":
        target = outs[0].float() + (item.teacher - mine).flatten(0, -2).float()
    return Sample(inputs[0], target, item.row.router_mask[0])


def _meet_budget(bank: ExpertBank, samples: Sequence[Sample]) -> None:
    """Set the layer's thresholds to the exact ones on these inputs, where it has its own budget."""
    rule = bank.router.rule
    if not rule.has_budget:
        return
    scores_TE = torch.cat([bank.route(sample.x_TD).scores for sample in samples])
    mask_T = torch.cat([sample.token_mask_T for sample in samples])
    threshold = exact_threshold(scores_TE, mask_T, rule.target_k)
    bank.router.threshold.copy_(threshold)
    bank.router.settled.copy_(threshold)


@torch.no_grad()
def fit_bank(bank: ExpertBank, samples: Sequence[Sample]) -> float:
    """Set a bank's down projections and mean outputs to the fit of the targets, in place.

    Returns:
        The error on the samples that chose the penalty, relative to the error before.
    """
    num_features = bank.experts.num_experts * bank.experts.intermediate_dim
    fit, check = (_Sums.zeros(bank) for _ in range(2))
    for number, sample in enumerate(samples):
        last = number % CHECK_EVERY == CHECK_EVERY - 1
        (check if last else fit).add(bank, sample)
    if not check.error:
        check = fit
    changes = [fit.change(penalty, num_features) for penalty in PENALTIES]
    errors = [check.error_with(change) for change in changes]
    best = min(range(len(PENALTIES)), key=errors.__getitem__)
    if check is not fit:
        fit.merge(check)
    change_PD = fit.change(PENALTIES[best], num_features)
    E, D, I = bank.experts.down_proj.shape
    down_FD, mean_ED = change_PD[: E * I], change_PD[E * I :]
    down_EDI = bank.experts.down_proj
    down_EDI.copy_(down_EDI.double() + down_FD.view(E, I, D).mT)
    if bank.mean_outputs is not None:
        bank.mean_outputs.copy_(bank.mean_outputs.double() + mean_ED)
    CHOSEN.append((PENALTIES[best], [round(e/check.error,4) for e in errors]))
    return errors[best] / check.error if check.error else 1.0


MODE = "mlp"
PEN = "mean"
WEIGHTED = True
CHOSEN = []
TX = []


@dataclass(kw_only=True, slots=True)
class _Sums:
    """The sums over tokens that a regression of the remaining error needs, in float64."""

    gram_PP: Tensor
    moment_PD: Tensor
    scale: float = 0.0
    error: float = 0.0
    """Sum of the squared error of the weights as they are."""

    @classmethod
    def zeros(cls, bank: ExpertBank) -> "_Sums":
        E, D, I = bank.experts.down_proj.shape
        P = E * I + (E if bank.mean_outputs is not None else 0)
        zeros = partial(torch.zeros, dtype=torch.float64, device=bank.experts.down_proj.device)
        return cls(gram_PP=zeros(P, P), moment_PD=zeros(P, D))

    def add(self, bank: ExpertBank, sample: Sample) -> None:
        """Add a row's tokens."""
        mask_T1 = sample.token_mask_T[:, None].float()
        if WEIGHTED == "rel":
            power = sample.target_TD.float().square().sum(-1, keepdim=True)
            ref = power[sample.token_mask_T].mean()
            mask_T1 = (2*ref / (ref + power)).sqrt()
        features_TP = features(bank, sample.x_TD)
        if WEIGHTED == "keep":
            first = features_TP[~sample.token_mask_T]
            self.gram_PP += first.T @ first
        features_TP = features_TP * mask_T1
        self.scale += features_TP[:, :bank.experts.num_experts * bank.experts.intermediate_dim].square().sum().item() / (bank.experts.num_experts * bank.experts.intermediate_dim)
        weights_PD = bank.experts.down_proj.mT.flatten(0, 1)
        if bank.mean_outputs is not None:
            weights_PD = torch.cat((weights_PD, bank.mean_outputs))
        residual_TD = sample.target_TD.float() * mask_T1 - features_TP @ weights_PD.float()
        self.gram_PP += features_TP.T @ features_TP
        self.moment_PD += features_TP.T @ residual_TD
        self.error += residual_TD.square().sum(dtype=torch.float64).item()

    def merge(self, other: "_Sums") -> None:
        """Add the tokens of other sums."""
        self.gram_PP += other.gram_PP
        self.moment_PD += other.moment_PD
        self.error += other.error
        self.scale += other.scale

    def change(self, penalty: float, num_neurons: int) -> Tensor:
        """Return the change of the weights (P, D) that minimises the penalised error."""
        diagonal_P = self.gram_PP.diagonal()
        if PEN == "mean":
            added_P = torch.full_like(diagonal_P, penalty) * self.scale
        elif PEN == "block":
            added_P = torch.full_like(diagonal_P, penalty) * diagonal_P[:num_neurons].mean()
            added_P[num_neurons:] = penalty * diagonal_P[num_neurons:].mean()
        elif PEN == "diag":
            added_P = penalty * diagonal_P + 1e-9 * diagonal_P.mean()
        elif PEN == "sqrt":
            added_P = penalty * (diagonal_P * diagonal_P[:num_neurons].mean()).sqrt() + 1e-9 * diagonal_P.mean()
        factor_PP = torch.linalg.cholesky(self.gram_PP + added_P.diag())
        return torch.cholesky_solve(self.moment_PD, factor_PP)

    def error_with(self, change_PD: Tensor) -> float:
        """Return the squared error on these tokens with changed weights."""
        gain = 2 * (change_PD * self.moment_PD).sum()
        return self.error - (gain - (change_PD * (self.gram_PP @ change_PD)).sum()).item()


def features(
    bank: ExpertBank, x_TD: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens features"]:
    """Return the numbers that down projections and mean outputs multiply, in float32.

    They are the hidden activations times their expert's routing weight, 0 where the expert is
    inactive, and for each mean output 1 where it is.
    """
    routing = bank.route(x_TD)
    weights_TE = routing.weights.float()
    if bank.expert_scale is not None:
        weights_TE = weights_TE * bank.expert_scale
    E, _, I = bank.experts.down_proj.shape
    gate_up_FD = bank.experts.gate_up_proj.to(x_TD.dtype).flatten(0, 1)
    pre_TE2I = F.linear(x_TD, gate_up_FD).view(-1, E, 2, I).float()
    hidden_TEI = bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]
    features_TF = (hidden_TEI * weights_TE[..., None]).flatten(1)
    if bank.mean_outputs is None:
        return features_TF
    return torch.cat((features_TF, (~routing.active).float()), dim=1)
