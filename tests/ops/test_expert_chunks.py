"""An expert layer that runs in chunks of tokens gives what the definition and whole rows give."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_onn.ops import reference
from tiny_onn.ops.dense_masked import expert_layer
from tiny_onn.ops.router_gradient import SmkStep, SurpriseTally
from tiny_onn.ops.surprise import SmkRule, smk_loss, smk_targets

D, E, I = 7, 5, 3
KINDS = ("parameters", "input", "output", "gain", "magnitude", "relative")
TALLY = ("num_tokens", "num_targets", "num_agree", "chance", "surprise_E")


def make_leaves(num_tokens, dtype=torch.float64, sizes=(D, E, I)) -> list[Tensor]:
    """Return x, gate_up, down, weights (half of them 0) and logits, which want gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden, experts, width = sizes
    shapes = (
        (num_tokens, hidden),
        (experts, 2 * width, hidden),
        (experts, hidden, width),
        (num_tokens, experts),
        (num_tokens, experts),
    )
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves[3] = leaves[3].abs() * (torch.rand(shapes[3], generator=generator) < 0.5)
    narrow = dtype if dtype != torch.float64 else None
    return [
        leaf.to(narrow if i < 3 else torch.float32 if narrow else None).requires_grad_()
        for i, leaf in enumerate(leaves)
    ]


def chunked(leaves, chunk_tokens, rule=None, **options: Any):
    """Return output, five gradients, surprise of every token, and the tally."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, gate_up, down, weights, logits = leaves
    seen: list[Tensor] = []
    tally = SurpriseTally.of_layers(1, weights.shape[1], x.device)[0]
    smk = SmkStep(rule=rule or SmkRule(), grad_scale=0.1, loss_scale=3.0, tally=tally, capture=seen)
    mask = torch.arange(len(x)) % 4 != 3
    layer = {"activation": F.silu, "smk": smk, "token_mask_T": mask, "chunk_tokens": chunk_tokens}
    y = expert_layer(x, gate_up, down, weights, logits, **layer, **options)
    grad_y = torch.cos(torch.arange(y.numel()).view_as(y) * 1.3).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, grad_y)
    assert len(seen) == 1
    names = ("x", "gate_up", "down", "weights", "logits")
    return (
        {"y": y.detach(), "surprise": seen[0]}
        | dict(zip(names, grads, strict=True))
        | {name: getattr(tally, name) for name in TALLY}
    )


@pytest.mark.parametrize("chunk_tokens", [1, 4, 8, 23, 100])
def test_chunks_equal_the_definition_with_a_ragged_last_one(chunk_tokens):
    leaves = make_leaves(23)
    got = chunked(leaves, chunk_tokens)
    x, gate_up, down, weights, logits = leaves
    y = reference.expert_layer(x, gate_up, down, weights, F.silu)
    grad_y = torch.cos(torch.arange(y.numel()).view_as(y) * 1.3).double()
    grads = torch.autograd.grad(y, leaves[:4], grad_y)
    surprise = reference.surprise("parameters", x, gate_up, down, grad_y, F.silu)
    surprise = (3 * surprise * weights).detach()
    mask = torch.arange(23) % 4 != 3
    targets = smk_targets(surprise, weights != 0, mask, SmkRule())
    (of_logits,) = torch.autograd.grad(0.1 * smk_loss(logits, targets).sum(), logits)
    wanted = {"y": y.detach(), "surprise": surprise, "logits": of_logits}
    wanted |= dict(zip(("x", "gate_up", "down", "weights"), grads, strict=True))
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert got["num_tokens"] == mask.sum()
    assert got["num_targets"] == (targets.sum(-1) > 0).sum()
    torch.testing.assert_close(got["surprise_E"].double(), (surprise * mask[:, None]).sum(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_the_whole_row(kind, dtype):
    leaves = make_leaves(50, dtype)
    rule = SmkRule(surprise=kind, candidates="all")
    whole, parts = chunked(leaves, 0, rule), chunked(leaves, 16, rule)
    for name, tensor in whole.items():
        # The experts' gradients are float32 sums of the four chunks' rounded sums.
        loose = dtype == torch.bfloat16 and name in ("gate_up", "down")
        rtol = 2.0**-7 if loose else 1e-5
        atol = (2.0**-7 if loose else 1e-6) * tensor.abs().max().item()
        torch.testing.assert_close(parts[name], tensor, rtol=rtol, atol=atol, msg=name)


def test_bf16_chunks_sum_the_experts_gradients_more_exactly_than_bf16_does():
    # Gradients of float32 weights are not rounded again: each chunk's product alone is.
    leaves = make_leaves(4096, torch.bfloat16, sizes=(4, 2, 2))
    exact = chunked([leaf.double() for leaf in leaves], 0)
    masters = [leaf if i not in (1, 2) else leaf.float() for i, leaf in enumerate(leaves)]
    parts = chunked(masters, 64)
    for name in ("gate_up", "down"):
        assert parts[name].dtype == torch.float32
        error = (parts[name] - exact[name]).norm() / exact[name].norm()
        assert error < 2.0**-8, name


# torch 2.13's inductor warns about torch itself when it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.compiled
def test_compiled_chunks_equal_plain_ones():
    leaves = make_leaves(50)
    for chunk_tokens in (16, 20):
        plain, compiled = (
            chunked(leaves, chunk_tokens),
            chunked(leaves, chunk_tokens, compiled=True),
        )
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_working_set_of_chunks_does_not_grow_with_the_row(kind):
    hidden, experts, width, chunk = sizes = (4, 8, 4, 16)
    for num_tokens in (64, 256):
        leaves = make_leaves(num_tokens, sizes=sizes[:3])
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved=saved) -> Tensor:
            saved.append(tensor)
            return tensor

        x, gate_up, down, weights, logits = leaves
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            layer = {"activation": F.silu, "chunk_tokens": chunk}
            expert_layer(x, gate_up, down, weights, logits, **layer)
        with Largest() as watch:
            chunked(leaves, chunk, SmkRule(surprise=kind))
        neurons = experts * width
        largest = max(num_tokens * max(hidden, experts), 2 * neurons * max(hidden, chunk))
        assert watch.elements <= largest
        assert largest < num_tokens * 2 * neurons
        assert len(saved) == 7
        assert max(tensor.numel() for tensor in saved) == max(
            2 * neurons * hidden, len(weights) * 8
        )
