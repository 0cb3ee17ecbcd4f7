"""Partitions are balanced, repeatable, exact with all experts on, and find planted structure."""

import copy
import itertools
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import WIDTH, change, make_dense, make_ids, make_rows, make_student
from tiny_onn.config.schema import ExpertInit, ExpertsConfig, RunConfig
from tiny_onn.conversion import partition
from tiny_onn.conversion.assignment import balanced_assignment
from tiny_onn.conversion.partition import (
    balanced_kmeans,
    by_importance,
    coactivation,
    learn_partition,
    neuron_energy,
    partition_neurons,
    sample_inputs,
)
from tiny_onn.conversion.verify import identity_gap
from tiny_onn.data.rows import needs_text
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps, last_hidden_states
from tiny_onn.model.hooks import MlpInputs

ROWS = make_rows((20, 13, 30, 64, 9, 40, 17, 22, 33, 64, 12, 50), 64)
FROM_TEXT: tuple[ExpertInit, ...] = ("coactivation", "learned")
NEW: tuple[ExpertInit, ...] = ("cluster", *FROM_TEXT)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orders_of(dense, init: ExpertInit, *, seed=0, rows=ROWS):
    experts = ExpertsConfig(num_experts=8, init=init)
    orders = partition_neurons(MlpInputs(dense, rows), experts, 4.0, generator(seed))
    assert orders is not None
    return orders


def same_parts(ours, theirs):
    """Whether two assignments put the same neurons together."""
    pairs = set(zip(ours.tolist(), theirs.tolist(), strict=True))
    return len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist()))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 1), (1, 4)]), st.booleans()
)
def test_assignments_are_balanced_and_the_best_of_all(seed, shape, ties):
    E, I = shape
    F = E * I
    scores = torch.randn(F, E, generator=generator(seed))
    scores = scores.round() if ties else scores
    got = balanced_assignment(scores)
    assert got.bincount(minlength=E).tolist() == [I] * E
    best = max(
        sum(scores[f, e // I].item() for e, f in enumerate(chosen))
        for chosen in itertools.permutations(range(F))
    )
    assert scores[torch.arange(F), got].sum().item() == pytest.approx(best, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([(2, 48), (8, 12), (32, 6), (24, 1), (1, 24)]),
    st.sampled_from(["plain", "ties", "heavy tails", "dead neurons", "twins"]),
)
def test_prices_prove_assignments_and_where_the_search_starts_does_not_matter(seed, shape, kind):
    E, I = shape
    F = E * I
    scores = torch.randn(F, E, generator=generator(seed), dtype=torch.float64)
    if kind == "ties":
        scores = scores.round()
    elif kind == "heavy tails":
        scores = scores * torch.randn(F, 1, generator=generator(seed + 1)).mul(4).exp()
    elif kind == "dead neurons":
        scores[F // 3 :] = 0
    elif kind == "twins":
        scores[:, E // 2 :] = scores[:, :1]
    tolerance = 1e-9 * (1 + scores.abs().sum().item())
    totals = []
    prices = torch.zeros(E, dtype=torch.float64)
    for _ in range(3):
        got = balanced_assignment(scores, prices)
        assert got.bincount(minlength=E).tolist() == [I] * E
        total = scores[torch.arange(F), got].sum().item()
        # No balanced assignment has a larger total than this, whatever the prices.
        cost = prices + scores.mean(0)
        bound = ((scores - cost).amax(1).sum() + I * cost.sum()).item()
        assert total == pytest.approx(bound, abs=tolerance)
        totals.append(total)
        prices = prices + torch.randn(E, generator=generator(seed)) * scores.std()
    assert totals[0] == pytest.approx(balanced_total(scores), abs=tolerance)
    assert max(totals) - min(totals) <= tolerance


def balanced_total(scores):
    """The total of an assignment whose search starts from nothing."""
    return scores[torch.arange(len(scores)), balanced_assignment(scores)].sum().item()


def test_assignments_of_equal_scores_end():
    scores = torch.randn(60, 1, generator=generator()).expand(60, 6)
    assert balanced_assignment(scores).bincount().tolist() == [10] * 6
    twins = torch.rand(60, 2, generator=generator()).repeat_interleave(3, 1)
    assert balanced_assignment(twins).bincount().tolist() == [10] * 6
    assert balanced_assignment(torch.zeros(60, 6)).bincount().tolist() == [10] * 6


def test_assignments_repeat_bit_for_bit():
    scores = torch.randn(192, 16, generator=generator()).round()
    first, second = (torch.zeros(16, dtype=torch.float64) for _ in range(2))
    for _ in range(2):
        assert torch.equal(balanced_assignment(scores, first), balanced_assignment(scores, second))
        assert torch.equal(first, second)


def test_kmeans_finds_planted_clusters():
    centres = torch.eye(16)[:6]
    planted = torch.arange(48) % 6
    points = centres[planted] + 0.1 * torch.randn(48, 16, generator=generator(1))
    points = torch.nn.functional.normalize(points, dim=1)
    found = [balanced_kmeans(points, 6, generator(seed)) for seed in range(8)]
    assert all(part.bincount().tolist() == [8] * 6 for part in found)
    assert any(same_parts(part, planted) for part in found)


@pytest.mark.parametrize("num_tokens", [64, 2048])
def test_coactivation_joins_neurons_that_are_large_together(num_tokens):
    planted = torch.arange(24) % 4
    active = torch.rand(num_tokens, 4, generator=generator(2)) < 0.3
    energy = active[:, planted].float() * torch.rand(num_tokens, 24, generator=generator(3))
    found = [coactivation(energy + 1e-6, 4, generator(seed)) for seed in range(8)]
    assert any(same_parts(part, planted) for part in found)


def test_a_learned_partition_holds_more_of_the_energy_than_its_start():
    planted = torch.arange(32) % 8
    x = torch.randn(512, 8, generator=generator(4))
    # Neurons of a group are large where one input is: a linear gate can tell.
    energy = x[:, planted].exp() * torch.rand(512, 32, generator=generator(5))
    start = by_importance(energy, 8)
    learned = learn_partition(energy, x, start, 8, 4.0)
    assert learned.bincount().tolist() == [4] * 8

    def captured(part):
        share = energy / energy.sum(1, keepdim=True)
        experts = share @ torch.nn.functional.one_hot(part, 8).float()
        return experts.topk(4, dim=1).values.sum(1).mean()

    assert captured(learned) > captured(start) + 0.05
    assert captured(learned) > 0.95 * captured(planted)


def test_energies_of_more_tokens_than_a_chunk_are_those_of_each_token():
    mlp = gated_mlps(make_dense("llama"))[0]
    x = torch.randn(partition.CHUNK_TOKENS + 7, 32, generator=generator())
    got = neuron_energy(mlp, x, torch.nn.SiLU())
    last = neuron_energy(mlp, x[-9:], torch.nn.SiLU())
    torch.testing.assert_close(got[-9:], last)
    torch.testing.assert_close(got[:3], neuron_energy(mlp, x[:3], torch.nn.SiLU()))


def test_energy_is_the_squared_output_of_a_neuron():
    dense = make_dense("llama")
    mlp = gated_mlps(dense)[0]
    x = torch.randn(5, 32, generator=generator())
    got = neuron_energy(mlp, x, torch.nn.SiLU())
    hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    expected = (hidden[..., None] * mlp.down_proj.weight.T).square().sum(-1)
    torch.testing.assert_close(got, expected)


def test_energy_of_a_bfloat16_layer_is_computed_in_float32():
    dense = make_dense("llama")
    mlps = [gated_mlps(model)[0] for model in (dense.bfloat16(), copy.deepcopy(dense).float())]
    x = torch.randn(5, 32, generator=generator()).bfloat16()
    narrow, wide = (neuron_energy(mlp, x, torch.nn.SiLU()) for mlp in mlps)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("num_shared", [0, 2])
def test_layers_learned_side_by_side_are_those_learned_in_turn(num_shared):
    dense = make_dense("llama")
    experts = ExpertsConfig(num_experts=8, init="learned", num_shared=num_shared)
    num_threads = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(partition_neurons(MlpInputs(dense, ROWS), experts, 4.0, generator()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("init", NEW)
def test_a_partition_uses_each_neuron_once_and_keeps_the_teacher(init):
    dense = make_dense("llama")
    orders = orders_of(dense, init)
    assert [sorted(order.tolist()) for order in orders] == [list(range(WIDTH))] * 2
    student = make_student(dense, init=init, neuron_order=orders)
    size = dense(input_ids=make_ids()).logits.abs().max().item()
    assert identity_gap(student, dense, make_ids()) <= 1e-5 * size
    again = orders_of(dense, init)
    assert all(torch.equal(a, b) for a, b in zip(orders, again, strict=True))


def test_slices_and_random_experts_need_no_order():
    dense = make_dense("llama")
    for init in ("slices", "random"):
        experts = ExpertsConfig(num_experts=8, init=init)
        assert partition_neurons(MlpInputs(dense, []), experts, 4.0, generator()) is None


@pytest.mark.parametrize("init", FROM_TEXT)
def test_first_tokens_and_padding_have_no_say(init):
    dense = make_dense("llama")
    narrow, wide = (orders_of(dense, init, rows=make_rows((20, 13), n)) for n in (40, 60))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_samples_are_every_nth_counted_input(max_tokens):
    dense = make_dense("llama")
    seen = []
    mlp = gated_mlps(dense)[1]
    handle = mlp.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in ROWS:
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    handle.remove()
    mask = torch.cat([row.router_mask[0] for row in ROWS])
    inputs = torch.cat(seen)[mask]
    stride = -(-len(inputs) // max_tokens)
    got = sample_inputs(MlpInputs(dense, ROWS), max_tokens)[1]
    assert torch.equal(got, inputs[::stride])
    assert len(got) <= max_tokens


@pytest.mark.parametrize(
    ("init", "needed"), [("slices", False), ("cluster", False), ("coactivation", True)]
)
def test_text_is_read_where_a_partition_needs_it(init, needed):
    config = change(
        RunConfig(),
        experts={"init": init, "gate_init": "random"},
        router={"selection": "top_k"},
    )
    assert needs_text(config) == needed


def test_a_second_ctrl_c_leaves_torch_its_threads():
    before, go_on = torch.get_num_threads(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def press():
        for _ in range(2):
            time.sleep(0.3)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)
        go_on.set()

    def layer(number):
        assert go_on.wait(60)
        return torch.tensor(number)

    user = threading.Thread(target=press)
    torch.set_num_threads(2)
    try:
        user.start()
        with pytest.raises(KeyboardInterrupt):
            partition._map_layers(layer, [(n,) for n in range(4)], 2, "layers")
        assert torch.get_num_threads() == 2
    finally:
        user.join()
        torch.set_num_threads(before)
