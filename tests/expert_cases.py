"""Cases of the expert layer, and what its definition gives for them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tiny_onn.model.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import reference
from tiny_onn.ops.router_gradient import SmkStep, SurpriseTally
from tiny_onn.ops.surprise import SmkRule, smk_loss, smk_targets

D, E, I = 7, 5, 3


COEF = 0.7


KINDS = ("parameters", "input", "output", "gain", "magnitude", "relative")


PATTERNS = ("mixed", "empty_expert", "one_expert", "none_active", "unit", "zero_rows")


class Case(NamedTuple):
    """The tensors of one call and the gradient of its output."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    logits: Tensor
    grad_y: Tensor

    def leaves(self, dtype=None) -> list[Tensor]:
        """Fresh copies that want a gradient, logits and weights never below float32."""
        return [
            t.detach().to(dtype if i < 3 else None).clone().requires_grad_()
            for i, t in enumerate(self[:5])
        ]


def make_case(num_tokens, pattern="mixed", seed=0) -> Case:
    """Random tensors; about half of the experts are active, with weights between 0 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = 2 * torch.rand(num_tokens, E, generator=generator, dtype=torch.float64)
    weights *= torch.rand(num_tokens, E, generator=generator) < 0.5
    x, gate_up, down = normal(num_tokens, D), normal(E, 2 * I, D), normal(E, D, I)
    if pattern == "empty_expert":
        weights[:, 1] = 0
    if pattern == "one_expert":
        weights = torch.zeros_like(weights).index_fill_(1, torch.tensor([2]), 1.5)
    if pattern == "none_active":
        weights[::2] = 0
    if pattern == "unit":
        weights = torch.ones_like(weights)
    grad_y = normal(num_tokens, D)
    if pattern == "zero_rows":
        x[::2], grad_y[::3] = 0, 0
    return Case(x, gate_up, down, weights, normal(num_tokens, E), grad_y)


def smk_step(num_tokens, rule=None, **options: Any) -> SmkStep:
    """A step whose SMK loss is a mean over these tokens."""
    return SmkStep(rule=rule or SmkRule(), grad_scale=COEF / num_tokens, **options)


def by_definition(case: Case, activation, rule: SmkRule) -> list[Tensor]:
    """Output and all five gradients: autograd of the loops and of the explicit SMK loss."""
    leaves = case.leaves()
    x, gate_up, down, weights, logits = leaves
    y = reference.expert_layer(x, gate_up, down, weights, activation)
    surprise = reference.surprise(
        rule.surprise, case.x, case.gate_up, case.down, case.grad_y, activation
    )
    active = case.weights != 0
    everyone = torch.ones(len(case.x), dtype=torch.bool)
    targets = smk_targets(surprise * case.weights, active, everyone, rule)
    main = torch.autograd.grad(y, leaves[:4], case.grad_y)
    (of_logits,) = torch.autograd.grad(smk_loss(logits, targets).mean() * COEF, logits)
    return [y.detach(), *main, of_logits]


class Watch(TorchDispatchMode):
    """Counts operations and keeps the size of the largest tensor they return."""

    calls = 0
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


RULES = {
    "top_k": RoutingRule(selection="top_k", weighting="softmax", target_k=3.0),
    "budget": RoutingRule(selection="budget", budget_form="cumulative", target_k=3.0),
}


def make_bank(rule="budget", *, coupled=False, seed=0) -> ExpertBank:
    bank = ExpertBank(16, 6, 4, "silu", RULES[rule])
    generator = torch.Generator().manual_seed(seed)
    bank.experts.reset(generator, std=0.3)
    bank.router.reset(generator, std=0.3)
    bank.router.threshold.fill_(0.3)
    bank.set_execution(Execution(coupled=coupled))
    return bank


def batch(num_tokens=20, seed=1) -> Tensor:
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed))


def bank_gradients(bank: ExpertBank, x: Tensor, parts=1, use_checkpoint=False, **options: Any):
    """Gradients of the mean squared output over the batch, in parts; the tally; the input's."""
    num_tokens = len(x)
    tally = SurpriseTally.of_layers(1, 6, x.device)[0]
    smk = smk_step(num_tokens, loss_scale=float(num_tokens), tally=tally, **options)
    bank.zero_grad()
    x = x.clone().requires_grad_()
    for part in x.chunk(parts):
        row = RowState(token_mask=torch.arange(len(part)) % 5 != 0, smk=smk)
        with row_context([bank], [row]):
            y = checkpoint(bank, part, use_reentrant=False) if use_checkpoint else bank(part)
            assert isinstance(y, Tensor)
            (y.square().sum() / num_tokens).backward()
    grads = {name: p.grad for name, p in bank.named_parameters()} | {"x": x.grad}
    assert all(g is not None and bool(g.any()) for g in grads.values())
    sums = {name: getattr(tally, name) for name in tally._fields}
    return grads, sums
