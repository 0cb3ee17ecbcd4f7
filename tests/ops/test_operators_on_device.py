"""The expert layer and the loss on this machine's device, against float64 on the CPU."""

from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from tiny import normal
from tiny_onn.ops import dense_masked, grouped
from tiny_onn.ops.distillation_loss import Divergence, Head, distill
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule

pytestmark = [
    pytest.mark.gpu,
    # Some products on a GPU cannot be repeated bit for bit, and raise if they must.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EXACT = ("cpu", torch.float64)
# Tolerances as shares of the norm: float32 sums in another order, bfloat16 keeps 8 bits.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def draw(*shape, seed, scale=1.0):
    """Return numbers that bfloat16 holds, so that every format starts from the same ones."""
    return (normal(*shape, seed=seed) * scale).bfloat16().double()


def leaf(values, device, dtype):
    """Return a copy that wants a gradient."""
    return values.detach().to(device, dtype, copy=True).requires_grad_()


def assert_close(got, expected, limit):
    """Check that every value is near the exact one, as a share of the norm."""
    for name, exact in expected.items():
        gap = (got[name].detach().double().cpu() - exact).norm() / exact.norm()
        assert gap <= limit, name


def layer_values(layer, device, dtype):
    """Return output, surprise of the active experts and gradients of an expert layer."""
    T, D, E, I = (512, 512, 32, 48) if GPU else (48, 32, 8, 16)
    inputs = {
        "x": draw(T, D, seed=0),
        "gate_up": draw(E, 2 * I, D, seed=1, scale=D**-0.5),
        "down": draw(E, D, I, seed=2, scale=(E * I) ** -0.5),
    }
    leaves = {name: leaf(value, device, dtype) for name, value in inputs.items()}
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    logits = draw(T, E, seed=3)
    active = (logits > logits.median()).to(device)
    # The grouped path knows active experts alone.
    rule = SmkRule(surprise="parameters", direction="max", candidates="active")
    smk = SmkStep(rule=rule, grad_scale=1.0, capture=[])
    gate = leaf(logits, device, math_dtype)
    options = {"activation": silu, "active_TE": active, "smk": smk}
    y = layer(*leaves.values(), active.to(math_dtype), gate, **options)
    y.backward(draw(T, D, seed=4).to(device, dtype))
    assert smk.capture
    grads = {f"grad {name}": value.grad for name, value in leaves.items()}
    return {"y": y, "surprise": smk.capture[0] * active, **grads}


LAYERS = {
    "dense": dense_masked.expert_layer,
    "dense, chunked": partial(dense_masked.expert_layer, chunk_tokens=17),
    "grouped": grouped.expert_layer,
}


@each_dtype
@pytest.mark.parametrize("name", LAYERS)
def test_expert_layer_is_that_of_exact_arithmetic(name, dtype):
    expected = layer_values(dense_masked.expert_layer, *EXACT)
    assert_close(layer_values(LAYERS[name], DEVICE, dtype), expected, LIMITS[dtype])


def loss_values(divergence, device, dtype):
    """Return the loss of every token and its gradient at the student's hidden states."""
    T, D, V = (300, 512, 8_000) if GPU else (24, 32, 500)
    hidden = leaf(draw(T, D, seed=0), device, dtype)
    # The logits have a standard deviation of 2.
    teacher, student_head, teacher_head = (
        draw(rows, D, seed=seed, scale=scale).to(device, dtype)
        for rows, seed, scale in ((T, 1, 1.0), (V, 2, 2 * D**-0.5), (V, 3, 2 * D**-0.5))
    )
    values = distill(
        hidden,
        teacher,
        Head(weight=student_head),
        Head(weight=teacher_head),
        (torch.arange(T) % V).to(device),
        divergence=divergence,
        temperature=2.0,
        jsd_beta=0.3,
        chunk_tokens=256,
    )
    values.loss.mean().backward()
    return {"loss": values.loss, "grad": hidden.grad}


DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")


@each_dtype
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_is_that_of_exact_arithmetic(divergence, dtype):
    expected = loss_values(divergence, *EXACT)
    assert_close(loss_values(divergence, DEVICE, dtype), expected, LIMITS[dtype])
