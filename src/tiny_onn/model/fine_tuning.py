"""Which parameters of a student learn in training loops other than this package's."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from tiny_onn.errors import UserError
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.experts import ExpertBank

# These selections do not read a gate that training could change.
WITHOUT_GATE = ("static", "random", "oracle")


def kind_of(name: str) -> str:
    """Return what a parameter belongs to: `experts`, `gates` or `backbone`."""
    if not in_mlp(name):
        return "backbone"
    return "gates" if ".router." in f"{name}." else "experts"


@torch.no_grad()
def set_learning(
    banks: Sequence[ExpertBank], named: Iterable[tuple[str, nn.Parameter]], kinds: set[str]
) -> None:
    """Let the parameters of some kinds learn, and freeze all others.

    Gates that learn get the main loss' gradient; see `TinyOnnForCausalLM.fine_tune`.

    Args:
        banks: the student's banks.
        named: the student's parameters by name.
        kinds: some of `experts`, `gates` and `backbone`.

    Raises:
        UserError: the gates shall learn, and the student's selection does not read them.
    """
    selection = banks[0].router.rule.selection
    if "gates" in kinds and selection in WITHOUT_GATE:
        raise UserError(
            f"gates: got True with router.selection = {selection!r}, expected a selection that"
            " reads a trained gate, as budget or top_k; leave gates at False"
        )
    for name, parameter in named:
        parameter.requires_grad_(kind_of(name) in kinds)
    for bank in banks:
        bank.set_execution(replace(bank.execution, coupled="gates" in kinds))
        # Distillation leaves a threshold of its own for training, which a budget that was chosen
        # since does not move.
        bank.router.threshold.copy_(bank.router.settled)


def describe_learning(
    banks: Sequence[ExpertBank], named: Iterable[tuple[str, nn.Parameter]]
) -> str:
    """Return a line on the parameters that learn, of each kind, and on what the gates do."""
    learning, all_of = ({"experts": 0, "gates": 0, "backbone": 0} for _ in range(2))
    for name, parameter in named:
        kind = kind_of(name)
        all_of[kind] += parameter.numel()
        learning[kind] += parameter.numel() * parameter.requires_grad
    trained = [_part(kind, count, all_of[kind]) for kind, count in learning.items() if count]
    frozen = [_part(kind, all_of[kind]) for kind, count in learning.items() if not count]
    if learning["gates"] and banks[0].execution.coupled:
        gates = "the gates learn from the loss, and nothing holds the mean number of experts"
    elif learning["gates"]:
        gates = "no gradient reaches the gates; fine_tune(gates=True) lets them learn"
    else:
        gates = "the gates choose as before"
    return (
        f"parameters that train: {', '.join(trained) or 'none'};"
        f" frozen: {', '.join(frozen) or 'none'}; {gates}"
    )


def _part(kind: str, *counts: int) -> str:
    """Return a kind of parameters with their number, or with two numbers if these differ."""
    return f"{kind} ({' of '.join(_shown(count) for count in dict.fromkeys(counts))})"


def _shown(count: int) -> str:
    """Return a number of parameters."""
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
