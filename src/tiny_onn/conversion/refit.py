"""The refit of a student's down projections and mean outputs by least squares, layer by layer.

A student that uses half of its experts misses what the others would have added. What is left can
stand in for much of it, and the best way is known in closed form: a layer's output is linear in its
down projections and mean outputs, so that their best values under a given routing solve a linear
regression. The layers are solved from the first to the last, each on the inputs that the student's
own layers below it give, which are refitted already, and towards what the teacher's MLP makes of
the same inputs. The teacher's output on the teacher's own inputs would be a worse target: inputs
that carry the errors of the layers below predict it less well, so that the fit would shrink the
output, and each layer more than the one before.

The regression pulls toward the weights from before it. How strongly it does so is chosen for each
layer among `PENALTIES`, by the error on calibration text that the fit has not seen. First tokens of
documents are attention sinks with outputs a thousand times larger; they do not count in the error,
but the fit is charged for every change at them, so that the sinks stay what they are. The idea of
repairing by least squares what a cut leaves is that of Optimal Brain Surgeon (Hassibi and Stork,
1993) and SparseGPT (arXiv 2301.00774).

Cost: a forward pass of the teacher and two of the student, for each layer the products of P
features over all tokens and a Cholesky factorisation of a P-square matrix for every penalty.
Memory: six such matrices in float64, and for every calibration token four vectors of D numbers,
whatever the number of layers.

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

# Penalties on a change of the weights, in units of the neurons' mean energy.
PENALTIES = (0.01, 0.1, 1.0, 10.0)
# The last tokens of every row, this share of it, are kept from the fit to choose the penalty on.
CHECKED_SHARE = 0.25


class Sample(NamedTuple):
    """The inputs of a layer on one row of text, with the outputs to come close to."""

    x_TD: Float[Tensor, "tokens hidden"]
    """The layer's input."""
    target_TD: Float[Tensor, "tokens hidden"]
    """The output to come close to."""
    counted_T: Bool[Tensor, " tokens"]
    """The tokens at which the error counts."""
    kept_T: Bool[Tensor, " tokens"]
    """The tokens at which the output should stay as it is."""

    def parts(self) -> tuple["Sample", "Sample"]:
        """Return the row in two parts, to fit on and to choose the penalty on."""
        cut = round(len(self.x_TD) * (1 - CHECKED_SHARE))
        return Sample(*(t[:cut] for t in self)), Sample(*(t[cut:] for t in self))


@dataclass(kw_only=True, slots=True)
class Passing:
    """A row of text on its way through the layers of a student of a dense model."""

    row: PackedRow
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """The arguments with which the backbone calls each layer, beside the hidden states."""
    student: Tensor
    """The student's hidden states (1, T, D) before the layer in hand."""

    @classmethod
    def start(cls, dense: PreTrainedModel, row: PackedRow) -> "Passing":
        """Return a row before the first layer."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not first:
                first.append(hidden)
            calls.append((args[1:], kwargs))

        with ExitStack() as hooks:
            for layer in decoder_layers(dense):
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
        return cls(row=row, calls=calls, student=first[0])

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return a layer's output on these hidden states."""
        args, kwargs = self.calls[index]
        output = layer(hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def student_input(self, layer: nn.Module, index: int) -> Float[Tensor, "tokens hidden"]:
        """Return the input of the MLP of the student's layer; the row stays before the layer."""
        inputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].flatten(0, -2))

        with layer.get_submodule("mlp").register_forward_pre_hook(keep):
            self.run(layer, index, self.student)
        return inputs[0]

    def sample(self, theirs: nn.Module, ours: nn.Module, index: int) -> Sample:
        """Return what the row asks of the student's layer in place of the dense model's."""
        counted_T, x_TD = self.row.router_mask[0], self.student_input(ours, index)
        return Sample(
            x_TD=x_TD,
            target_TD=theirs.get_submodule("mlp")(x_TD[None])[0],
            counted_T=counted_T,
            kept_T=self.row.loss_mask[0] & ~counted_T,
        )


@torch.no_grad()
def refit(
    student: TinyOnnForCausalLM, dense: PreTrainedModel, rows: Sequence[PackedRow]
) -> list[float]:
    """Set down projections and mean outputs to the least-squares fit of the teacher, in place.

    A budget that each layer has for itself is met anew on the inputs that the refitted layers below
    give.

    Args:
        student: a converted student, whose gates and thresholds are set.
        dense: the dense model that it was cut from.
        rows: calibration text on the models' device, at least one row.

    Returns:
        Per layer, the error on the tokens that chose the penalty, relative to the error before.

    Raises:
        UserError: the family's layers cannot be run one by one.
    """
    ours, errors = decoder_layers(backbone_of(student)), []
    passing = [Passing.start(dense, row) for row in rows]
    _check_replay(dense, passing[0])
    with eval_mode(student):
        for index, theirs in enumerate(track(decoder_layers(dense), "refitting, layers")):
            bank, layer = student.banks()[index], ours[index]
            samples = [item.sample(theirs, layer, index) for item in passing]
            _meet_budget(bank, samples)
            errors.append(fit_bank(bank, samples))
            for item in passing:
                item.student = item.run(layer, index, item.student)
    return errors


def _check_replay(dense: PreTrainedModel, item: Passing) -> None:
    """Refuse a family whose layers need more than their arguments to compute what they compute."""
    with layer_outputs(dense) as outputs:
        last_hidden_states(dense, item.row.input_ids, **packed_kwargs(item.row))
    hidden = item.student
    for index, layer in enumerate(decoder_layers(dense)):
        hidden = item.run(layer, index, hidden)
    gap = (hidden - outputs[-1]).abs().max().item()
    if not gap <= 1e-3 * outputs[-1].abs().max().item():
        raise UserError(
            f"experts.refit: got true, expected false for architecture {type(dense).__name__}: its"
            f" layers, run one by one, differ from the whole model by {gap:.3g}; set"
            " experts.refit = false"
        )


def _meet_budget(bank: ExpertBank, samples: Sequence[Sample]) -> None:
    """Set the layer's thresholds to the exact ones on these inputs, where it has its own budget."""
    if not bank.router.rule.has_budget:
        return
    scores_TE = torch.cat([bank.route(sample.x_TD).scores for sample in samples])
    counted_T = torch.cat([sample.counted_T for sample in samples])
    threshold = exact_threshold(scores_TE, counted_T, bank.router.rule.target_k)
    bank.router.threshold.copy_(threshold)
    bank.router.settled.copy_(threshold)


@torch.no_grad()
def fit_bank(bank: ExpertBank, samples: Sequence[Sample]) -> float:
    """Set a bank's down projections and mean outputs to the fit of the targets, in place.

    Returns:
        The error on the tokens that chose the penalty, relative to the error before; 1 if no
        penalty lowers it, and nothing was changed.
    """
    fit, check = _Sums.zeros(bank), _Sums.zeros(bank)
    for sample in samples:
        for sums, part in zip((fit, check), sample.parts(), strict=True):
            sums.add(bank, part)
    errors = [check.error_with(fit.change(penalty)) for penalty in PENALTIES]
    best = min(range(len(PENALTIES)), key=errors.__getitem__)
    if not errors[best] < check.error:
        return 1.0
    fraction = errors[best] / check.error
    fit.merge(check)
    change_PD = fit.change(PENALTIES[best])
    E, D, I = bank.experts.down_proj.shape
    change_EDI = change_PD[: E * I].view(E, I, D).mT
    bank.experts.down_proj.copy_(bank.experts.down_proj.double() + change_EDI)
    if bank.mean_outputs is not None:
        bank.mean_outputs.copy_(bank.mean_outputs.double() + change_PD[E * I :])
    return fraction


@dataclass(kw_only=True, slots=True)
class _Sums:
    """The sums over tokens that the regression of what is missing needs, in float64."""

    gram_PP: Tensor
    kept_PP: Tensor
    """The products of features at the tokens whose output should stay."""
    moment_PD: Tensor
    energy: Tensor
    """Sum over counted tokens of the mean of the neurons' squared features."""
    error: float = 0.0
    """Sum of the squared error of the weights as they are."""

    @classmethod
    def zeros(cls, bank: ExpertBank) -> "_Sums":
        """Return the sums over no token."""
        E, D, I = bank.experts.down_proj.shape
        P = E * I + (0 if bank.mean_outputs is None else E)
        zeros = partial(torch.zeros, dtype=torch.float64, device=bank.experts.down_proj.device)
        return cls(
            gram_PP=zeros(P, P), kept_PP=zeros(P, P), moment_PD=zeros(P, D), energy=zeros(())
        )

    def add(self, bank: ExpertBank, sample: Sample) -> None:
        """Add a row's tokens."""
        E, _, I = bank.experts.down_proj.shape
        weights_PD = bank.experts.down_proj.mT.flatten(0, 1)
        if bank.mean_outputs is not None:
            weights_PD = torch.cat((weights_PD, bank.mean_outputs))
        features_TP = features(bank, sample.x_TD)
        # The few sinks are so large that the rounding of float32 products would be seen elsewhere.
        kept_TP, features_TP = features_TP[sample.kept_T].double(), features_TP[sample.counted_T]
        missing_TD = sample.target_TD[sample.counted_T].float() - features_TP @ weights_PD.float()
        self.gram_PP += features_TP.T @ features_TP
        self.kept_PP += kept_TP.T @ kept_TP
        self.moment_PD += features_TP.T @ missing_TD
        self.energy += features_TP[:, : E * I].square().mean(-1).double().sum()
        self.error += missing_TD.square().sum(dtype=torch.float64).item()

    def merge(self, other: "_Sums") -> None:
        """Add the tokens of other sums."""
        self.gram_PP += other.gram_PP
        self.kept_PP += other.kept_PP
        self.moment_PD += other.moment_PD
        self.energy += other.energy
        self.error += other.error

    def change(self, penalty: float) -> Float[Tensor, "features hidden"]:
        """Return the change of the weights that minimises the error and what the change costs."""
        cost_PP = self.gram_PP + self.kept_PP
        cost_PP.diagonal().add_(penalty * self.energy)
        return torch.cholesky_solve(self.moment_PD, torch.linalg.cholesky(cost_PP))

    def error_with(self, change_PD: Float[Tensor, "features hidden"]) -> float:
        """Return the squared error on the counted tokens with changed weights."""
        gained = 2 * self.moment_PD - self.gram_PP @ change_PD
        return self.error - (change_PD * gained).sum().item()


def features(
    bank: ExpertBank, x_TD: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens features"]:
    """Return the numbers that down projections and mean outputs multiply, in float32.

    They are the hidden activations times the routing weights of their experts, and for each mean
    output how much of its expert is missing.
    """
    routing = bank.route(x_TD)
    weights_TE = bank.scaled(routing.weights, x_TD)
    E, _, I = bank.experts.down_proj.shape
    gate_up_FD = bank.experts.gate_up_proj.to(x_TD.dtype).flatten(0, 1)
    pre_TE2I = F.linear(x_TD, gate_up_FD).view(-1, E, 2, I).float()
    hidden_TEI = bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]
    features_TF = (hidden_TEI * weights_TE[..., None]).flatten(1)
    if bank.mean_outputs is None:
        return features_TF
    return torch.cat((features_TF, bank.missing(routing)), dim=1)
