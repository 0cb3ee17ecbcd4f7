"""The sparse expert layer's kernels against the definition.

`triton_cases` says where they run.
"""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from expert_cases import PATTERNS, Case, by_definition, make_case, smk_step
from tiny import CONFIG, change, make_dense, make_rows
from tiny_onn.config.schema import Checkpointing, RunConfig
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.expert_path import choose_path
from tiny_onn.model.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import dense_masked, reference, sparse
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.ops.sparse_launches import Launches, Lists, Options, Tiles
from tiny_onn.ops.surprise import SmkRule, lesson_tokens
from triton_cases import (
    DEVICE,
    RUNS,
    assert_passes_in_the_interpreter,
    gpu,
    kernels,
    outside_the_interpreter,
)

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# The shapes (T, E, I, D) cover odd sizes, several tiles and chunks of each, and one neuron.
SHAPES = [(70, 5, 96, 40), (300, 3, 20, 33), (20, 2, 200, 24), (1, 3, 1, 17), (65, 33, 48, 16)]
sums = pytest.mark.parametrize("dense_sums", [True, False], ids=["dense sums", "rows"])


@outside_the_interpreter
def test_the_kernels_pass_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(RUNS, reason="a CPU's torch takes the other paths")
def test_a_cpu_takes_the_other_paths():
    assert "need a GPU" in str(sparse.obstacle("cpu", torch.float32, 5, "silu"))


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
    rules = [SmkRule(surprise="gain", direction="max", candidates=c) for c in ("all", "active")]
    tallies = [SurpriseTally.of_layers(1, 5, torch.device(d))[0] for d in (DEVICE, "cpu", "cpu")]
    sampled = replace(rules[0], lesson_share=1 / 8)
    step = smk_step(50, sampled, tally=tallies[0], lesson_shift=3)
    *got, of_logits = results(leaves_of(case), case.grad_y, smk=step, dense_sums=dense_sums)
    lesson = lesson_tokens(50, 1 / 8, 3)
    parts = [
        by_dense_path(case, smk=smk_step(50, rule, tally=tally), token_mask_T=tokens)
        for rule, tally, tokens in zip(rules, tallies[1:], (lesson, ~lesson), strict=True)
    ]
    close([*got, of_logits], [*parts[0][:-1], parts[0][-1] + parts[1][-1]])
    assert of_logits[lesson].any() and of_logits[~lesson].any()
    assert_close(tallies[0].counts_4.cpu(), tallies[1].counts_4 + tallies[2].counts_4)


@kernels
@pytest.mark.parametrize("num_active", [1, 3])
def test_the_number_of_pairs_follows_from_that_of_active_experts(num_active):
    case = fast_case((50, 5, 24, 32))
    weights = torch.zeros_like(case.weights).index_fill_(1, torch.arange(num_active), 1.5)
    case = case._replace(weights=weights)
    rule = SmkRule(surprise="gain", direction="max", candidates="all", lesson_share=1 / 8)
    for smk in (smk_step(50), smk_step(50, rule, lesson_shift=3)):
        got = results(
            leaves_of(case), case.grad_y, smk=smk, num_active=num_active, dense_sums=False
        )
        close(got, by_dense_path(case, smk=smk))


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


@pytest.mark.parametrize(("depth", "widths"), [(40, (32, 0)), (64, (32, 0)), (65, (64, 32))])
def test_two_products_never_stand_outside_of_a_loop(depth, widths):
    x, down = torch.zeros(4, depth), torch.zeros(2, depth, 96)
    options = Options(activation="silu", smk=None, compiled=False, num_pairs=None, tiles=Tiles())
    launches = Launches(options, x, down, Lists(*[torch.zeros(0)] * 5))
    assert tuple(launches.chunk.values()) == widths


@kernels
def test_the_sums_are_chosen_by_the_share_of_active_pairs():
    case = fast_case((64, 4, 16, 16))
    for share in (0.05, 0.9):
        weights = (torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) < share).double()
        sparser = case._replace(weights=weights)
        close(results(leaves_of(sparser), case.grad_y), by_dense_path(sparser))


@kernels
@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {"activation": "relu"}, "not relu; use another path"),
        (torch.float64, {"activation": "silu"}, "input is torch.float64"),
        (
            torch.float32,
            {"activation": "silu", "smk": smk_step(4, SmkRule(surprise="input"))},
            "surprise: got 'input'",
        ),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(dtype, options, message):
    with pytest.raises(ValueError, match=message):
        sparse.expert_layer(*leaves_of(make_case(4), dtype), **options)


BANKS = {
    "default": {},
    "low k": {"target_k": 2.0},
    "weighted": {"weighting": "softmax"},
    "shared": {"target_k": 3.0, "num_shared": 1},
    "budget": {"selection": "budget"},
}


def bank_of(name: str) -> ExpertBank:
    """A bank with mean outputs and scales, stored neuron after neuron."""
    rule = RoutingRule(**{"selection": "top_k", "target_k": 3.0} | BANKS[name])
    bank = ExpertBank(16, 12, 4, "silu", rule, compensated=True, scaled=True)
    generator = torch.Generator().manual_seed(0)
    bank.experts.reset(generator, std=0.3)
    bank.router.reset(generator, std=0.3)
    bank.router.threshold.fill_(0.08)
    assert bank.mean_outputs is not None and bank.expert_scale is not None
    bank.mean_outputs.data.normal_(generator=generator)
    bank.expert_scale.data.uniform_(0.5, 1.5, generator=generator)
    bank.experts.store_by_neuron()
    return bank.to(DEVICE)


def learnt(bank: ExpertBank, rule: SmkRule, *, again=False) -> dict[str, Tensor]:
    """Output and gradients of a bank, and the tally, with masked tokens."""
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x.requires_grad_()
    tally = SurpriseTally.of_layers(1, 12, x.device)[0]
    num_shared = bank.router.rule.num_shared
    smk = smk_step(40, rule, tally=tally, num_shared=num_shared, lesson_shift=3)
    mask = torch.arange(40, device=DEVICE) % 5 != 0
    bank.zero_grad()
    with row_context([bank], [RowState(token_mask=mask, smk=smk)]):
        y: Any = checkpoint(bank, x, use_reentrant=False) if again else bank(x)
        (y.square().sum() / 40).backward()
    grads: dict[str, Any] = {name: p.grad for name, p in bank.named_parameters()}
    grads |= {"x": x.grad, "y": y.detach()}
    assert all(bool(grad.any()) for grad in grads.values())
    return grads | tally._asdict()


@kernels
@pytest.mark.parametrize("lesson_share", [None, 1.0, 0.25])
@pytest.mark.parametrize("name", BANKS)
def test_a_bank_learns_as_on_the_dense_path(name, lesson_share):
    rule = SmkRule(surprise="gain", direction="max")
    if lesson_share is not None:
        rule = replace(rule, candidates="all", lesson_share=lesson_share)
    bank = bank_of(name)
    dense = learnt(bank, rule)
    bank.set_execution(Execution(path="sparse"))
    got = learnt(bank, rule)
    for key, values in dense.items():
        close([got[key].double().cpu()], [values.double().cpu()])
    assert_close(learnt(bank, rule, again=True), got, rtol=0, atol=0)
    bank.eval()
    with torch.no_grad():
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        y = bank(x)
        bank.set_execution(Execution())
        close([y.double().cpu()], [bank(x).double().cpu()])


MODES: tuple[Any, ...] = get_args(Checkpointing)


@kernels
def test_steps_repeat_in_every_checkpointing_mode_and_follow_the_dense_path():
    rows = make_rows((20, 11, 30, 28), 32)
    states = {}
    for mode, path in (*((m, "sparse") for m in MODES), ("layer", "dense")):
        train: Any = {"expert_path": path, "compile": False, "device": DEVICE}
        config = change(CONFIG, train=train, smk={"candidates": "all", "lesson_share": 0.5})
        dense: Any = make_dense()
        dense.to(DEVICE)
        student = make_student(config, MlpInputs(dense, [row.to(DEVICE) for row in rows]))
        assert {bank.execution.path for bank in student.banks()} == {path}
        checkpointing: Any = mode
        checkpoint_layers(student, checkpointing)
        optimizer = build_optimizer(student, config.optim)
        for step in range(2):
            distill_step(student, dense, optimizer, rows[:2], config, step=step)
        states[mode, path] = student.state_dict()
    first, compared = states["none", "sparse"], states.pop(("layer", "dense"))
    for key, state in states.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, first[name]), (key, name)
    for name, tensor in compared.items():
        assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)


@kernels
def test_a_traced_bank_takes_the_dense_path(monkeypatch):
    bank = bank_of("default")
    bank.set_execution(Execution(path="sparse"))
    layer: Any = bank._layer()
    assert layer.func is sparse.expert_layer
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer = bank._layer()
    assert layer.func is dense_masked.expert_layer


@kernels
def test_the_sparse_path_is_taken_where_it_is_asked_for_and_computes():
    config = change(RunConfig(), train={"expert_path": "sparse"}, teacher={"dtype": "float32"})
    assert choose_path(config, torch.device(DEVICE), "silu").path == "sparse"
    with pytest.raises(UserError, match=r"know the activations .* not relu; set train.expert_path"):
        choose_path(config, torch.device(DEVICE), "relu")
    many = change(config, experts={"num_experts": 256})
    with pytest.raises(UserError, match="at most 128 experts, and there are 256"):
        choose_path(many, torch.device(DEVICE), "silu")


@gpu
@sums
# Sums of several steps, and of one.
@pytest.mark.parametrize(("seed", "depth"), [(0, 256), (1, 256), (2, 256), (3, 64), (4, 40)])
def test_bf16_is_within_its_rounding(seed, depth, dense_sums):
    exact_case = fast_case((777, 8, 96, depth), seed)
    case = rounded(exact_case, torch.bfloat16)._replace(weights=exact_case.weights)
    got = results(leaves_of(case, torch.bfloat16), case.grad_y, dense_sums=dense_sums)
    # Where two surprises tie within their rounding, another expert becomes the target.
    for values, exact in zip(got[:-1], by_dense_path(case)[:-1], strict=True):
        assert (values - exact).norm() <= 6e-3 * exact.norm()
