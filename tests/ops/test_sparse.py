"""The sparse expert layer's kernels against the definition.

On a GPU they run as they are, elsewhere in Triton's interpreter, in a process of its own, because
triton reads TRITON_INTERPRET when it is imported. The interpreter's bfloat16 is silently wrong.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from expert_cases import PATTERNS, Case, by_definition, make_case, smk_step
from repository import ROOT
from tiny_onn.ops import decode, dense_masked, reference, sparse
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.ops.surprise import SmkRule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = decode.triton_runs_on(DEVICE)
kernels = pytest.mark.skipif(not RUNS, reason="needs triton and a GPU, or its interpreter")
gpu = pytest.mark.skipif(not (RUNS and DEVICE == "cuda"), reason="needs a GPU and triton")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# The shapes (T, E, I, D) cover odd sizes, several tiles and chunks of each, and one neuron.
SHAPES = [(70, 5, 96, 40), (300, 3, 20, 33), (20, 2, 200, 24), (1, 3, 1, 17), (65, 33, 48, 16)]
sums = pytest.mark.parametrize("dense_sums", [True, False], ids=["dense sums", "rows"])


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_pass_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    variables = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=variables,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(RUNS, reason="a CPU's torch takes the other paths")
def test_a_cpu_takes_the_other_paths():
    assert not sparse.can_compute(torch.zeros(4, 8), 5, "silu", None)


def leaves_of(case: Case, dtype=torch.float32) -> list[Tensor]:
    """Return the call's tensors on the device, which want gradients."""
    formats = (dtype, dtype, dtype, torch.float32, torch.float32)
    return [t.detach().to(DEVICE, f).requires_grad_() for t, f in zip(case, formats, strict=False)]


def results(leaves, grad_y, **options: Any) -> list[Tensor]:
    """Return output and all five gradients."""
    options = {"activation": "silu", "smk": smk_step(len(grad_y)), **options}
    y = sparse.expert_layer(*leaves, **options)
    grads = torch.autograd.grad(y, leaves, grad_y.to(DEVICE, y.dtype))
    return [t.double().cpu() for t in (y.detach(), *grads)]


def defined(case: Case, activation=F.silu, rule=None) -> list[Tensor]:
    """Return the definition's results, with gradients of 0 for inactive experts' weights."""
    *others, of_weights, of_logits = by_definition(case, activation, rule or SmkRule())
    return [*others, of_weights * (case.weights != 0), of_logits]


def rounded(case: Case, dtype=torch.float32) -> Case:
    """Return the tensors with values that the number format holds."""
    return Case(*(t.to(dtype).double() for t in case))


def fast_case(shape, seed=0) -> Case:
    """Return random tensors of a shape; about half of the experts are active, and one is never."""
    T, E, I, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weights = 2 * torch.rand(T, E, generator=generator, dtype=torch.float64)
    weights *= torch.rand(T, E, generator=generator) < 0.5
    weights[:, 1] = 0
    gate_up, down = normal(E, 2 * I, D) / D**0.5, normal(E, D, I) / (E * I) ** 0.5
    case = Case(normal(T, D), gate_up, down, weights, normal(T, E), normal(T, D))
    return rounded(case)


def by_dense_path(case: Case, activation=F.silu, **options: Any) -> list[Tensor]:
    """Return the dense path's float64 results, which are tested against the definition."""
    leaves = [t.clone().requires_grad_() for t in case[:5]]
    options = {"smk": smk_step(len(case.x)), **options}
    y = dense_masked.expert_layer(*leaves, activation=activation, **options)
    grads = list(torch.autograd.grad(y, leaves, case.grad_y))
    grads[3] = grads[3] * (case.weights != 0)
    return [y.detach(), *grads]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    """Check equality up to float32's sums, relative to each tensor's largest value."""
    for values, exact in zip(got, expected, strict=True):
        limit = 2e-5 * float(exact.abs().max()) + 1e-30
        assert_close(values, exact.cpu().double(), rtol=0, atol=limit)


@kernels
@sums
@pytest.mark.parametrize("routing", PATTERNS)
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_equals_the_definition_in_output_and_every_gradient(num_tokens, routing, dense_sums):
    case = rounded(make_case(num_tokens, routing))
    close(results(leaves_of(case), case.grad_y, dense_sums=dense_sums), defined(case))


@kernels
@sums
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_no_tile_divides(shape, dense_sums):
    case = fast_case(shape)
    close(results(leaves_of(case), case.grad_y, dense_sums=dense_sums), by_dense_path(case))


@kernels
@sums
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name, dense_sums):
    case = fast_case((40, 3, 24, 32))
    got = results(leaves_of(case), case.grad_y, activation=name, dense_sums=dense_sums)
    close(got, by_dense_path(case, ACTIVATIONS[name]))


@kernels
@sums
@pytest.mark.parametrize("kind", sparse.KINDS)
def test_surprise_of_active_experts_is_the_definition_and_of_others_zero(kind, dense_sums):
    case, seen = rounded(make_case(23)), []
    step = smk_step(23, SmkRule(surprise=kind), loss_scale=3.0, capture=seen)
    results(leaves_of(case), case.grad_y, smk=step, dense_sums=dense_sums)
    exact = 3 * case.weights * reference.surprise(kind, *case[:3], case.grad_y, F.silu)
    close([seen[0].cpu().double()], [exact])


@kernels
@sums
def test_all_candidates_are_taught_as_in_the_dense_path(dense_sums):
    case = fast_case((50, 5, 24, 32))
    step = smk_step(50, SmkRule(surprise="gain", direction="max", candidates="all"))
    got = results(leaves_of(case), case.grad_y, smk=step, dense_sums=dense_sums)
    close(got, by_dense_path(case, smk=step))


@kernels
@sums
def test_tokens_outside_the_lesson_are_taught_among_their_active_experts(dense_sums):
    case = fast_case((50, 5, 24, 32))
    lesson = torch.arange(50) % 8 == 0
    rules = [SmkRule(surprise="gain", direction="max", candidates=c) for c in ("all", "active")]
    tallies = [SurpriseTally.of_layers(1, 5, torch.device(d))[0] for d in (DEVICE, "cpu", "cpu")]
    options = {"dense_sums": dense_sums, "lesson_T": lesson.to(DEVICE)}
    step = smk_step(50, rules[0], tally=tallies[0])
    *got, of_logits = results(leaves_of(case), case.grad_y, smk=step, **options)
    parts = [
        by_dense_path(case, smk=smk_step(50, rule, tally=tally), token_mask_T=tokens)
        for rule, tally, tokens in zip(rules, tallies[1:], (lesson, ~lesson), strict=True)
    ]
    close([*got, of_logits], [*parts[0][:-1], parts[0][-1] + parts[1][-1]])
    assert of_logits[lesson].any() and of_logits[~lesson].any()
    assert_close(tallies[0].counts_4.cpu(), tallies[1].counts_4 + tallies[2].counts_4)


@kernels
@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("kind", sparse.KINDS)
def test_the_lesson_with_ties_and_masked_tokens_is_that_of_the_dense_path(kind, direction):
    # Experts 0 and 2 are equal and have equal weights, so that both are targets if one is.
    case = fast_case((50, 5, 24, 32))
    for tensor in (case.gate_up, case.down):
        tensor[2] = tensor[0]
    case.weights[:, 2] = case.weights[:, 0]
    # A token without experts and a token with one expert have nothing to choose.
    case.weights[3] = 0
    case.weights[4, 1:] = 0
    mask, rule = torch.arange(50) % 3 != 0, SmkRule(surprise=kind, direction=direction)
    tallies = [SurpriseTally.of_layers(1, 5, torch.device(d))[0] for d in (DEVICE, "cpu")]
    steps = [smk_step(50, rule, loss_scale=3.0, tally=tally) for tally in tallies]
    got = results(leaves_of(case), case.grad_y, smk=steps[0], token_mask_T=mask.to(DEVICE))
    expected = by_dense_path(case, smk=steps[1], token_mask_T=mask)
    close(got, expected)
    assert not got[-1][~mask].any() and not got[-1][3:5].any()
    for values, exact in zip(tallies[0], tallies[1], strict=True):
        close([values.double().cpu()], [exact.double()])


@kernels
@pytest.mark.parametrize("targets", ["set", "regress"])
def test_other_targets_are_taught_as_in_the_dense_path(targets):
    case = fast_case((50, 5, 24, 32))
    rule = SmkRule(surprise="gain", direction="max", targets=targets)
    got = results(leaves_of(case), case.grad_y, smk=smk_step(50, rule))
    close(got, by_dense_path(case, smk=smk_step(50, rule)))


@kernels
@sums
def test_an_active_expert_of_weight_zero_is_still_taught(dense_sums):
    case = rounded(make_case(9))
    leaves = leaves_of(case._replace(weights=torch.zeros_like(case.weights)))
    active = torch.ones_like(case.weights, dtype=torch.bool).to(DEVICE)
    *_, of_weights, _ = results(leaves, case.grad_y, active_TE=active, dense_sums=dense_sums)
    close([of_weights], [by_definition(case, F.silu, SmkRule())[4]])


@kernels
@sums
def test_weights_stored_a_row_per_neuron(dense_sums):
    case = fast_case((40, 3, 24, 32))
    leaves = leaves_of(case)
    leaves[2] = leaves[2].detach().mT.contiguous().mT.requires_grad_()
    close(results(leaves, case.grad_y, dense_sums=dense_sums), by_dense_path(case))


@kernels
@sums
def test_results_repeat_bit_for_bit(dense_sums):
    case = fast_case((150, 5, 24, 32))
    first, second = (results(leaves_of(case), case.grad_y, dense_sums=dense_sums) for _ in range(2))
    assert_close(second, first, rtol=0, atol=0)


@kernels
def test_the_sums_are_chosen_by_the_share_of_active_pairs():
    case = fast_case((64, 4, 16, 16))
    for share in (0.05, 0.9):
        weights = (torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) < share).double()
        sparser = case._replace(weights=weights)
        close(results(leaves_of(sparser), case.grad_y), by_dense_path(sparser))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation: got 'relu'"),
        (
            {"activation": "silu", "smk": smk_step(4, SmkRule(surprise="input"))},
            "surprise: got 'input'",
        ),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(options, message):
    case = make_case(4)
    with pytest.raises(ValueError, match=message):
        sparse.expert_layer(*case[:5], **options)


@gpu
@sums
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_within_its_rounding(seed, dense_sums):
    case = rounded(fast_case((777, 8, 96, 256), seed), torch.bfloat16)
    case = case._replace(weights=fast_case((777, 8, 96, 256), seed).weights)
    got = results(leaves_of(case, torch.bfloat16), case.grad_y, dense_sums=dense_sums)
    # Where two surprises tie within their rounding, another expert becomes the target.
    for values, exact in zip(got[:-1], by_dense_path(case)[:-1], strict=True):
        assert (values - exact).norm() <= 6e-3 * exact.norm()
