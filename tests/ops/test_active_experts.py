"""On a CPU only active experts are computed in evaluation, and the output is the definition's."""

import pytest
import torch
from torch.nn.functional import silu

from tiny import make_dense, make_ids, make_student
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import active_experts, reference

E, I, D = 8, 12, 20
# Of the output's norm; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
WAYS = ("_by_bags", "_by_expert", "_every")


def case(tokens, dtype, *, stored, share=0.5):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, gate_up, down = (v.to(dtype) for v in (draw(tokens, D), draw(E, 2 * I, D), draw(E, D, I)))
    if stored:
        gate_up, down = (weight.mT.contiguous().mT for weight in (gate_up, down))
    active = torch.rand(tokens, E, generator=generator) < share
    active[:, 2], active[:, 5] = True, False
    # What an inactive expert's weight is does not matter.
    weights = torch.rand(tokens, E, generator=generator)
    return x, gate_up, down, weights, active


def defined(x, gate_up, down, weights, active):
    x, gate_up, down, weights = (v.double() for v in (x, gate_up, down, weights * active))
    return reference.expert_layer(x, gate_up, down, weights, silu)


def gap(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("stored", [False, True], ids=["as saved", "for generation"])
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_output_is_the_definition_s(dtype, tokens, stored):
    x, gate_up, down, weights, active = case(tokens, dtype, stored=stored)
    with torch.no_grad():
        got = active_experts.expert_layer(
            x, gate_up, down, weights_TE=weights, active_TE=active, activation=silu
        )
    assert got.dtype == dtype
    assert gap(got, defined(x, gate_up, down, weights, active)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_definition_at_every_number_of_tokens(way, tokens, dtype):
    given = case(tokens, dtype, stored=True)
    with torch.no_grad():
        got = getattr(active_experts, way)(*given, silu)
        assert torch.equal(got, getattr(active_experts, way)(*given, silu))
    assert gap(got, defined(*given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("stored", [False, True], ids=["as saved", "for generation"])
def test_an_inactive_expert_s_weights_are_not_read(stored, tokens):
    x, gate_up, down, weights, active = case(tokens, torch.float32, stored=stored)
    gate_up[5], down[5] = float("nan"), float("nan")
    with torch.no_grad():
        got = active_experts.expert_layer(
            x, gate_up, down, weights_TE=weights, active_TE=active, activation=silu
        )
    assert got.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("even", [True, False], ids=["even loads", "uneven loads"])
def test_many_tokens_in_chunks_are_the_definition_with_even_and_uneven_loads(even, dtype, threads):
    tokens = active_experts.CHUNK_TOKENS + 90
    x, gate_up, down, weights, active = case(tokens, dtype, stored=True)
    if even:
        active = (torch.arange(tokens)[:, None] + torch.arange(E)) % 2 == 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got = active_experts.expert_layer(
                x, gate_up, down, weights_TE=weights, active_TE=active, activation=silu
            )
    finally:
        torch.set_num_threads(before)
    assert gap(got, defined(x, gate_up, down, weights, active)) < TOLERANCE[dtype]


def test_tokens_without_an_expert_get_zero():
    x, gate_up, down, weights, active = case(3, torch.float32, stored=True)
    with torch.no_grad():
        got = active_experts.expert_layer(
            x,
            gate_up,
            down,
            weights_TE=weights,
            active_TE=torch.zeros_like(active),
            activation=silu,
        )
    assert torch.equal(got, torch.zeros(3, D))


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_bank_computes_only_active_experts_in_evaluation_alone(tokens):
    bank = ExpertBank(D, E, I, "silu", RoutingRule(selection="top_k", target_k=3.0))
    bank.experts.reset(torch.Generator().manual_seed(0), 0.1)
    bank.router.reset(None)
    # A flat gate takes the first experts, so that the last one is never active.
    with torch.no_grad():
        bank.experts.gate_up_proj[-1] = float("nan")
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert bank.train(True)(x).isnan().any()
        assert bank.train(False)(x).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 12])
def test_storing_for_generation_keeps_shapes_values_and_logits(tokens):
    student = make_student(make_dense()).train(False)
    ids = make_ids(1, tokens)
    before = {name: p.clone() for name, p in student.named_parameters()}
    with torch.enable_grad():
        want = student(ids, use_cache=False).logits.detach()
    with torch.no_grad():
        student.round_experts()
        got = student(ids, use_cache=False).logits
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]), name
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
