"""Under `torch.autocast` a student is what it is without, to the rounding of autocast's format."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tiny import FAMILIES, make_dense, make_ids, make_rows, make_student
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import Execution, recorded_routings
from tiny_onn.ops import dense_masked, grouped
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.ops.precision import in_autocast_format
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule

pytestmark = pytest.mark.usefixtures("quiet")

FORMATS = (torch.bfloat16, torch.float16)
# Relative to the largest number, layers add up a few roundings to 8 and to 11 bits.
BOUND = {torch.bfloat16: 0.06, torch.float16: 0.008}
PATHS = {
    "dense": Execution(),
    "chunks": Execution(chunk_tokens=5),
    "grouped": Execution(path="grouped"),
}


def make_awake(path="dense", *, dense=None, **changes) -> Any:
    """Return a student as another training loop would train it, with mean outputs."""
    options = {"compensation": "mean", "learn_scale": True, **changes}
    student: Any = make_student(make_dense() if dense is None else dense, **options)
    for bank in student.banks():
        bank.set_execution(PATHS[path])
        generator = torch.Generator().manual_seed(0)
        if bank.mean_outputs is not None:
            bank.mean_outputs.data.normal_(std=0.1, generator=generator)
        if bank.expert_scale is not None:
            bank.expert_scale.data.uniform_(0.5, 1.5, generator=generator)
    return student.requires_grad_(True)


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def loss_and_gradients(student, dtype, *, backward_inside=False):
    student.zero_grad()
    ids = make_ids()
    with autocast(dtype):
        loss = student(input_ids=ids, labels=ids, use_cache=False).loss
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    named = student.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if ".router." not in name}


def assert_near(got, expected, bound, name=""):
    gap = (got.float() - expected.float()).abs().max()
    assert gap <= bound * expected.float().abs().max(), (name, gap)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loss_and_gradients_are_those_without_autocast_to_rounding(stored, path, dtype):
    # All experts are active, so that no token's choice hangs on a rounding.
    student = make_awake(path, dense=make_dense(dtype=stored), selection="top_k", target_k=8.0)
    loss, gradients = loss_and_gradients(student, None)
    bound = max(BOUND[dtype], BOUND[torch.bfloat16] * (stored == "bfloat16"))
    for inside in (False, True):
        got, got_gradients = loss_and_gradients(student, dtype, backward_inside=inside)
        assert_near(got, loss, bound)
        for name, parameter in student.named_parameters():
            if ".router." in name:
                continue
            gradient = got_gradients[name]
            assert gradient.dtype == parameter.dtype, name
            if gradients[name].any():
                assert_near(gradient, gradients[name], 4 * bound, name)
            else:
                # Mean outputs get no gradient where every expert is active.
                assert not gradient.any(), name


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget_form": "cumulative"},
        {"selection": "top_k", "weighting": "softmax"},
        {"selection": "top_any"},
        {"selection": "oracle"},
        {"num_shared": 2, "weighting": "sigmoid"},
    ],
    ids=str,
)
def test_every_selection_trains_under_autocast(changes, dtype):
    for path in PATHS:
        student = make_awake(path, **changes).train()
        loss, gradients = loss_and_gradients(student, dtype)
        assert loss.isfinite()
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("changes", [{}, {"budget_form": "cumulative"}, {"selection": "oracle"}])
def test_autocast_does_not_change_the_routing_of_an_input(changes):
    bank = make_awake(**changes).banks()[0]
    x_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    expected = bank.route(x_TD)
    with autocast(torch.bfloat16), recorded_routings([bank]) as routings:
        got = bank.route(x_TD)
        y_TD = bank(x_TD)
    assert got.router_logits.dtype == torch.float32
    assert torch.equal(got.router_logits, expected.router_logits)
    assert torch.equal(got.active, expected.active)
    assert torch.equal(routings[0].active, expected.active)
    assert_near(y_TD, bank(x_TD), BOUND[torch.bfloat16])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_layers_output_has_autocasts_format_as_a_linear_layers(dtype):
    bank, x_TD = make_awake().banks()[0], torch.randn(8, 32)
    for stored in (torch.float32, torch.bfloat16, torch.float64):
        linear = torch.nn.Linear(32, 32, dtype=stored)
        with autocast(dtype):
            assert bank(x_TD.to(stored)).dtype == linear(x_TD.to(stored)).dtype
        assert bank(x_TD.to(stored)).dtype == stored


@pytest.mark.parametrize("kind", ["parameters", "magnitude", "input", "gain"])
@pytest.mark.parametrize("layer", [dense_masked.expert_layer, grouped.expert_layer])
def test_surprise_under_autocast_is_that_of_an_input_in_its_format(kind, layer):
    generator = torch.Generator().manual_seed(0)
    rule = SmkRule(surprise=kind, direction="min", candidates="active", targets="single")

    def gradients(dtype, x_TD):
        generator.manual_seed(1)
        leaves = [torch.randn(s, generator=generator) for s in ((8, 12, 32), (8, 32, 6))]
        leaves += [torch.rand(16, 8, generator=generator), torch.randn(16, 8, generator=generator)]
        for leaf in leaves:
            leaf.requires_grad_(True)
        smk = SmkStep(rule=rule, grad_scale=1.0)
        with autocast(dtype):
            y_TD = layer(x_TD, *leaves, activation=torch.nn.functional.silu, smk=smk)
            y_TD.float().square().sum().backward()
        return [y_TD, *(leaf.grad for leaf in leaves)]

    x_TD = torch.randn(16, 32, generator=generator)
    ours = gradients(torch.bfloat16, x_TD)
    theirs = gradients(None, x_TD.bfloat16())
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_and_the_distillation_loss_run_under_autocast(family):
    dense = make_dense(family)
    student = make_student(dense)
    row = make_rows((5, 17, 3, 11), 40)[0]

    def run(dtype):
        student.zero_grad()
        with autocast(dtype), all_experts_on(student.banks()):
            kwargs = packed_kwargs(row)
            ours, theirs = (
                last_hidden_states(model, row.input_ids, **kwargs)[0] for model in (student, dense)
            )
            values = distill(
                ours,
                theirs,
                head_of(student),
                head_of(dense),
                row.labels[0],
                divergence="forward_kl",
                temperature=1.0,
                jsd_beta=0.5,
                chunk_tokens=16,
            )
            (values.student_nll.mean() + values.loss.mean()).backward()
        return values

    expected, got = run(None), run(torch.bfloat16)
    mask_T = row.loss_mask[0]
    assert_near(got.student_nll[mask_T], expected.student_nll[mask_T], BOUND[torch.bfloat16])
    # The student equals its teacher, in whatever format both compute.
    assert got.loss.abs().max() < 1e-2
    assert all(p.grad.isfinite().all() for p in student.trainable().values() if p.grad is not None)


def test_generation_under_autocast_is_that_without():
    student: Any = make_student(make_dense())
    student.set_attn_implementation("sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 6}
    ids = make_ids(1, 12)
    with autocast(torch.bfloat16):
        got = student.generate(ids, **options)
    expected = student.generate(ids, **options)
    assert_near(got.logits[0], expected.logits[0], BOUND[torch.bfloat16])
    assert got.sequences.shape == expected.sequences.shape


def test_a_tensor_without_autocast_keeps_its_format():
    meta = torch.empty(2, 3, device="meta")
    with autocast(torch.bfloat16):
        assert in_autocast_format(meta) is meta
