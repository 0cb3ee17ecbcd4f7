"""`distill` against its definition: all logits at once, log_softmax, autograd, in float64.

Low precision follows one criterion: with gt the float64 result of the same rounded inputs,
|gt - distill| <= c |gt - plain| + tol, where plain is the definition at the same low precision,
c is 3 for the maximum and 1.25 for the mean, and tol 1e-7 of the largest value. Beyond plain's
roundings distill has one more, of the saved gradient rows: over 20 seeds and all divergences the
ratio of the gradient's errors came to at most 2.4 (maximum) and 1.16 (mean), that of bf16 values
to 1.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loss_cases import BETA, DIVERGENCES, Case, V, assert_same, make_case, naive_logits, run
from tiny_onn.ops import distillation_loss as losses
from tiny_onn.ops.distillation_loss import DistillValues, Head, distill


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use a single thread: tensors this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call_with(case: Case, **changes) -> DistillValues:
    options = {"divergence": "jsd", "temperature": 1.0, "jsd_beta": BETA, "chunk_tokens": 4}
    return distill(*case, **{**options, **changes})


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(
    "head",
    [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 8.0, "bias": True}],
    ids=["plain", "scale", "softcap", "scale-softcap-bias"],
)
@pytest.mark.parametrize("label_coef", [0.0, 0.3])
def test_values_and_gradients_match_the_definition(
    divergence, temperature, head, label_coef, monkeypatch
):
    monkeypatch.setattr(losses, "CPU_TILE_BYTES", 20 * V * 8)  # 20 rows: chunks of several tiles.
    options = {"divergence": divergence, "temperature": temperature, "label_coef": label_coef}
    for tokens, chunks in {1: (1, 7), 63: (1, 7, 500), 123: (7, 123)}.items():
        case = make_case(tokens, **head)
        weights = torch.linspace(-1, 2, tokens)
        expected, expected_grad = run(case, weights=weights, chunk_tokens=None, **options)
        for chunk_tokens in chunks:
            values, grad = run(case, weights=weights, chunk_tokens=chunk_tokens, **options)
            assert_same(values, expected)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 12),
    chunk_tokens=st.integers(1, 15),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.floats(0.3, 4.0),
    label_coef=st.just(0.0) | st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_any_size_matches_the_definition(tokens, chunk_tokens, seed, **options):
    case = make_case(tokens, seed, softcap=20.0, scale=1.5)
    expected, expected_grad = run(case, chunk_tokens=None, **options)
    values, grad = run(case, chunk_tokens=chunk_tokens, **options)
    assert_same(values, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("label_coef", [0.0, 0.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, label_coef):
    case = make_case(4, softcap=4.0, scale=1.3, bias=True)

    def loss(x: Tensor) -> Tensor:
        options = {"divergence": divergence, "temperature": 1.7, "label_coef": label_coef}
        return call_with(case._replace(student_hidden=x), **options).loss

    assert torch.autograd.gradcheck(loss, case.student_hidden.requires_grad_())


def head_to_float64(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.double()
    return replace(head, weight=head.weight.double(), bias=bias)


def errors_against_float64(case: Case, **options) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return errors of distill and of the plain definition, and the largest true value, by name."""
    hidden = case.student_hidden.double(), case.teacher_hidden.double()
    heads = head_to_float64(case.student_head), head_to_float64(case.teacher_head)
    exact_case = Case(*hidden, *heads, case.labels)
    gt, gt_grad = run(exact_case, chunk_tokens=None, **options)
    plain, plain_grad = run(case, chunk_tokens=None, **options)
    values, grad = run(case, **options)
    rows = {"grad": (grad, plain_grad, gt_grad)}
    for name in ("loss", "forward_kl", "teacher_entropy", "student_nll", "teacher_nll"):
        rows[name] = (getattr(values, name), getattr(plain, name), getattr(gt, name))
    return {
        name: ((actual.double() - true).abs(), (low.double() - true).abs(), true.abs().max())
        for name, (actual, low, true) in rows.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("label_coef", [0.0, 0.1])
def test_low_precision_loses_no_more_than_the_plain_definition(
    dtype, divergence, temperature, label_coef
):
    case = make_case(123, dtype=dtype, softcap=10.0, bias=True)
    options = {"divergence": divergence, "temperature": temperature, "label_coef": label_coef}
    errors = errors_against_float64(case, weights=torch.linspace(0.5, 2, 123), **options)
    for name, (actual, plain, size) in errors.items():
        assert actual.max() <= 3 * plain.max() + 1e-7 * size, name
        assert actual.mean() <= 1.25 * plain.mean() + 1e-7 * size, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_exactly_no_loss_and_no_gradient(divergence):
    hidden, _, head, _, labels = make_case(20, dtype=torch.float32)
    values, grad = run(Case(hidden, hidden, head, head, labels), divergence=divergence)
    tolerance = 1e-6 if divergence == "jsd" else 0.0  # The mixture is rounded on its own.
    assert values.loss.abs().max() <= tolerance
    assert grad.abs().max() <= tolerance
    assert values.agrees.all()


def test_soft_label_cross_entropy_is_forward_kl_plus_teacher_entropy():
    case = make_case(20)
    values = call_with(case, divergence="reverse_kl", temperature=3.0)
    probs = naive_logits(case.teacher_hidden, case.teacher_head).softmax(-1)
    student_logits = naive_logits(case.student_hidden, case.student_head)
    cross_entropy = F.cross_entropy(student_logits, probs, reduction="none")
    torch.testing.assert_close(values.forward_kl + values.teacher_entropy, cross_entropy)


def test_jsd_divided_by_beta_tends_to_the_forward_kl():
    case = make_case(20)
    values = call_with(case._replace(student_hidden=case.student_hidden / 4), jsd_beta=1e-7)
    torch.testing.assert_close(values.loss / 1e-7, values.forward_kl, rtol=1e-3, atol=0)


def test_only_the_loss_carries_a_gradient_and_only_to_the_student():
    case = make_case(9)
    leaves = [case.teacher_hidden, case.student_head.weight, case.teacher_head.weight]
    for leaf in (case.student_hidden, *leaves):
        leaf.requires_grad_()
    values = call_with(case)
    for name in ("forward_kl", "teacher_entropy", "student_nll", "teacher_nll", "agrees"):
        assert not getattr(values, name).requires_grad, name
    values.loss.sum().backward()
    assert case.student_hidden.grad is not None
    assert all(leaf.grad is None for leaf in leaves)


def test_values_are_the_same_bits_with_and_without_gradient():
    case = make_case(40, dtype=torch.float32, softcap=5.0)
    values = call_with(case, temperature=2.0, label_coef=0.3)
    assert not values.loss.requires_grad
    case.student_hidden.requires_grad_()
    again = call_with(case, temperature=2.0, label_coef=0.3)
    assert_same(values, again, rtol=0, atol=0)


@pytest.mark.parametrize("label_coef", [0.0, 0.3])
def test_metrics_left_out_are_nan_and_the_rest_is_unchanged(label_coef):
    expected = call_with(make_case(10), label_coef=label_coef)
    values = call_with(make_case(10), need_metrics=False, label_coef=label_coef)
    for name in ("loss", "forward_kl"):
        assert torch.equal(getattr(values, name), getattr(expected, name)), name
    for name in ("teacher_entropy", "student_entropy", "student_nll", "teacher_nll"):
        assert getattr(values, name).isnan().all(), name


def test_masked_labels_have_no_nll_and_do_not_mask_the_loss():
    case = make_case(12)
    values, grad = run(case._replace(labels=torch.full_like(case.labels, -100)))
    assert not values.student_nll.any()
    assert not values.teacher_nll.any()
    assert grad.abs().sum(-1).gt(0).all()


def test_tokens_without_a_label_have_the_divergence_alone():
    case = make_case(12)
    case = case._replace(labels=torch.full_like(case.labels, -100))
    expected, expected_grad = run(case)
    values, grad = run(case, label_coef=0.5)
    assert_same(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cross_entropy_teaches_a_student_that_equals_its_teacher(divergence):
    hidden, _, head, _, labels = make_case(20)
    options: dict[str, Any] = {"divergence": divergence, "label_coef": 0.25}
    values, grad = run(Case(hidden, hidden, head, head, labels), **options)
    torch.testing.assert_close(values.loss, 0.25 * values.student_nll)
    assert torch.equal(grad.abs().sum(-1) > 1e-9, labels != -100)


def test_a_nan_token_shows_in_its_own_values_only():
    case = make_case(12)
    case.student_hidden[5, 3] = math.nan
    values, grad = run(case, label_coef=0.3)
    bad = torch.arange(12) == 5
    assert torch.equal(values.loss.isnan(), bad)
    assert torch.equal(values.forward_kl.isnan(), bad)
    assert torch.equal(grad.isnan().all(-1), bad)


def test_no_tokens_give_no_values():
    values, grad = run(make_case(0))
    assert values.loss.shape == (0,)
    assert grad.shape == (0, 16)


def test_head_logits_are_the_definition_in_fp32():
    case = make_case(9, dtype=torch.bfloat16, scale=0.5, softcap=6.0, bias=True)
    logits = case.student_head.logits(case.student_hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, naive_logits(case.student_hidden, case.student_head))


class Recorder(TorchDispatchMode):
    """Counts matrix products and the elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest_numel = 0
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.largest_numel = max(self.largest_numel, output.numel())
        self.num_products += func.overloadpacket == torch.ops.aten.mm
        return output


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(divergence):
    case = make_case(123, softcap=5.0, bias=True)
    with Recorder() as naive:
        run(case, divergence=divergence, chunk_tokens=None)
    with Recorder() as chunked:
        run(case, divergence=divergence, temperature=2.0, label_coef=0.3, chunk_tokens=32)
    assert naive.largest_numel == 123 * V
    assert chunked.largest_numel == 32 * V


def test_gradient_work_is_skipped_where_no_gradient_is_needed():
    case = make_case(9)
    case.student_hidden.requires_grad_()
    with Recorder() as with_grad:
        call_with(case, chunk_tokens=3)
    with Recorder() as without_grad, torch.no_grad():
        call_with(case, chunk_tokens=3)
    assert (with_grad.num_products, without_grad.num_products) == (9, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"temperature": x}, "a finite number above 0") for x in (0.0, -1.0, math.nan, math.inf)),
        *(({"jsd_beta": x}, "a number between 0 and 1") for x in (0.0, 1.0, -0.5, math.nan)),
        *(({"label_coef": x}, "a number from 0 to below 1") for x in (-0.1, 1.0, math.nan)),
        *(({"chunk_tokens": x}, "at least 1") for x in (0, -4)),
    ],
)
def test_refuses_settings_out_of_range(changes, message):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name}: got {value}, expected {message}"):
        call_with(make_case(3), **changes)


def test_refuses_another_vocabulary():
    case = make_case(3)
    weight = case.teacher_head.weight
    larger = Head(weight=torch.cat([weight, weight[:2]]))
    with pytest.raises(ValueError, match=rf"vocabulary: got {V + 2}, expected {V}"):
        call_with(case._replace(teacher_head=larger))


def test_refuses_the_head_of_another_model_or_dtype():
    case = make_case(3)
    with pytest.raises(ValueError, match=r"student head: got .*24\), expected .*16\)"):
        call_with(case._replace(student_head=case.teacher_head))
    with pytest.raises(ValueError, match=r"teacher head: got .*float64.*, expected .*float32"):
        call_with(case._replace(teacher_hidden=case.teacher_hidden.float()))


@pytest.mark.parametrize("label", [-1, V])
def test_refuses_labels_outside_the_vocabulary(label):
    case = make_case(3)
    case.labels[1] = label
    with pytest.raises(ValueError, match=rf"labels: got values .*, expected -100 or 0 to {V - 1}"):
        call_with(case)
