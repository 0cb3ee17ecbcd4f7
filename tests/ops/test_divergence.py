"""The loss' elementwise region, as written and compiled, against the definition of every value."""

import pytest
import torch

from loss_cases import BETA, DIVERGENCES, assert_same, make_case, run
from tiny_onn.ops.distillation_loss import Head, distill
from tiny_onn.ops.divergence import DivergenceChoice, divergence_region

HEADS = pytest.mark.parametrize(
    "head",
    [{}, {"scale": 3.0, "softcap": 8.0, "bias": True}],
    ids=["plain", "scale-softcap-bias"],
)


def product(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, head.weight, head.bias)


@HEADS
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("label_coef", [0.0, 0.3])
def test_region_is_the_definition(divergence, temperature, label_coef, head):
    case = make_case(63, **head)
    options = {"divergence": divergence, "temperature": temperature, "label_coef": label_coef}
    expected, expected_grad = run(case, chunk_tokens=None, **options)
    s_CV = product(case.student_hidden, case.student_head)
    values = divergence_region(
        s_CV,
        product(case.teacher_hidden, case.teacher_head),
        case.labels,
        (case.student_head.map(), case.teacher_head.map()),
        DivergenceChoice(divergence, temperature, BETA, label_coef),
    )
    assert_same(values, expected)
    grad = s_CV @ case.student_head.weight * temperature * case.student_head.scale
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.compiled
@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label_coef", [0.0, 0.3])
def test_compiled_chunks_give_what_tiles_give(head, dtype, label_coef):
    # A function has at most 8 compiled forms.
    torch._dynamo.reset()
    case = make_case(63, dtype=dtype, **head)
    results = []
    for compiled in (False, True):
        x = case.student_hidden.clone().requires_grad_()
        values = distill(
            *case._replace(student_hidden=x),
            divergence="forward_kl",
            temperature=1.0,
            jsd_beta=BETA,
            label_coef=label_coef,
            chunk_tokens=17,
            compiled=compiled,
        )
        (grad,) = torch.autograd.grad(values.loss.sum(), x)
        results.append((values, grad))
    (plain, plain_grad), (compiled, compiled_grad) = results
    assert_same(compiled, plain, rtol=2e-5, atol=2e-5)
    # Gradients at the logits are rounded to their format, where two near ones may differ by a step.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(compiled_grad, plain_grad, rtol=tolerance, atol=tolerance)
