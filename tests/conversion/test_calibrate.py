"""Calibration computes what it says, from the text alone: no sink, no padding."""

import pytest
import torch

from tiny import FAMILIES, make_dense, make_rows, make_student
from tiny_onn.conversion.gates import RIDGE, Ridge, expert_norms, fit_gates
from tiny_onn.conversion.partition import importance_order, neuron_importance
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps, last_hidden_states
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.routing.budgets import fit_start_thresholds

# Split, whole and padded documents.
LENGTHS = (20, 13, 30, 64, 9, 40, 17, 22, 33, 64, 12, 50)
ROWS = make_rows(LENGTHS, 64)
HELD_OUT = make_rows(LENGTHS, 64, seed=1)


def gather(dense, rows, module_of, *, counted=True):
    """Per layer, the inputs of a part of the MLP at the tokens that count (or at all)."""
    seen = [[] for _ in gated_mlps(dense)]
    handles = [
        module_of(mlp).register_forward_pre_hook(
            lambda _, inputs, layer=layer: seen[layer].append(inputs[0].flatten(0, -2))
        )
        for layer, mlp in enumerate(gated_mlps(dense))
    ]
    with torch.no_grad():
        for row in rows:
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    for handle in handles:
        handle.remove()
    mask = torch.cat([row.router_mask[0] for row in rows])
    return [torch.cat(layer)[mask if counted else slice(None)] for layer in seen]


def overlap(chosen, best):
    """Share of the best experts that are among the chosen, both (T, k)."""
    return (best[:, :, None] == chosen[:, None]).any(-1).float().mean().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_each_neurons_squared_contribution(family, dtype):
    dense = make_dense(family, dtype=dtype)
    hidden = gather(dense, ROWS, lambda mlp: mlp.down_proj)
    for got, mlp, h_TF in zip(
        neuron_importance(MlpInputs(dense, ROWS)), gated_mlps(dense), hidden, strict=True
    ):
        outputs_TFD = h_TF.float()[..., None] * mlp.down_proj.weight.T.float()
        expected = outputs_TFD.square().sum((0, 2))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_first_tokens_and_padding_say_nothing():
    dense = make_dense("llama")
    last = make_rows((20, 13), 40)
    wider = make_rows((20, 13), 60)
    for got, same in zip(
        neuron_importance(MlpInputs(dense, last)),
        neuron_importance(MlpInputs(dense, wider)),
        strict=True,
    ):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=0)
    counted = gather(dense, last, lambda mlp: mlp.module)[0]
    assert len(counted) == 20 + 13 - 2
    gates = []
    for rows in (last, wider):
        banks = make_student(dense).banks()
        fit_gates(MlpInputs(dense, rows), banks)
        fit_start_thresholds(MlpInputs(dense, rows), banks)
        gates.append((banks[1].router.weight.detach(), banks[1].router.threshold))
    for got, same in zip(*gates, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-3, atol=1e-4)


def test_order_ranks_by_falling_importance():
    dense = make_dense("llama")
    importance = neuron_importance(MlpInputs(dense, ROWS))
    for scores, order in zip(importance, importance_order(importance), strict=True):
        assert sorted(order.tolist()) == list(range(48))
        assert (scores[order].diff() <= 0).all()
    tied = importance_order([torch.zeros(5)])
    assert tied[0].tolist() == [0, 1, 2, 3, 4]


def test_important_neurons_share_an_expert():
    dense = make_dense("llama")
    importance = neuron_importance(MlpInputs(dense, ROWS))
    student = make_student(dense, init="importance", neuron_order=importance_order(importance))
    for bank, mlp, scores in zip(student.banks(), gated_mlps(dense), importance, strict=True):
        first = {tuple(row.tolist()) for row in bank.experts.gate_up_proj[0, :6]}
        best = {tuple(mlp.gate_proj.weight[f].tolist()) for f in scores.topk(6).indices}
        assert first == best


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_norms_are_the_norms_of_each_experts_output(family):
    dense = make_dense(family)
    bank = make_student(dense).banks()[0]
    (x_TD, _) = gather(dense, ROWS[:1], lambda mlp: mlp.module)
    got = expert_norms(bank, x_TD)
    for e in range(8):
        gate, up = (x_TD @ rows.T for rows in bank.experts.gate_up_proj[e].chunk(2))
        expected = (bank.activation(gate) * up @ bank.experts.down_proj[e].T).norm(dim=-1)
        torch.testing.assert_close(got[:, e], expected, rtol=1e-4, atol=1e-5)


def test_a_ridge_regression_is_exact_beside_large_features_and_means():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 20, generator=generator)
    # As hidden states are: one feature hundreds of times as large, another far from zero.
    x_TD[:, 0] *= 300
    x_TD[:, 1] += 30
    target_TE = x_TD @ torch.randn(20, 3, generator=generator) / 20 - 25
    features = torch.nn.functional.pad(x_TD.double(), (0, 1), value=1.0)
    gram = features.T @ features
    penalty = RIDGE * gram.diagonal()[:20].mean() * torch.eye(21, dtype=torch.float64)
    penalty[20, 20] = 0
    expected = features @ torch.linalg.solve(gram + penalty, features.T @ target_TE.double())
    weight, bias = Ridge(x_TD).fit(target_TE)
    got = x_TD.double() @ weight + bias
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * target_TE.std().item())


def test_gates_solve_the_ridge_regression_of_log_norms():
    dense = make_dense("llama")
    banks = make_student(dense).banks()
    explained = fit_gates(MlpInputs(dense, ROWS), banks)
    inputs = gather(dense, ROWS, lambda mlp: mlp.module)
    for bank, narrow_TD, share in zip(banks, inputs, explained, strict=True):
        x_TD = narrow_TD.double()
        targets_TE = expert_norms(bank, narrow_TD).log().double()
        tokens, hidden = x_TD.shape
        penalty = (RIDGE * x_TD.square().sum(0).mean()).sqrt()
        # Ridge as least squares: one more row per weight, none for the bias.
        features = torch.cat((x_TD, torch.ones(tokens, 1).double()), dim=1)
        rows = torch.cat((penalty * torch.eye(hidden), torch.zeros(hidden, 1)), dim=1)
        solution = torch.linalg.lstsq(
            torch.cat((features, rows)),
            torch.cat((targets_TE, torch.zeros(hidden, 8).double())),
        ).solution
        fitted = torch.cat((bank.router.weight.T, bank.router.bias[None])).double()
        torch.testing.assert_close(fitted, solution, rtol=1e-3, atol=1e-4)
        residual = (features @ solution - targets_TE).square().sum()
        variance = (targets_TE - targets_TE.mean(0)).square().sum()
        assert share == pytest.approx((1 - residual / variance).item(), abs=1e-3)


def test_a_static_fit_is_the_mean_of_log_norms():
    dense = make_dense("llama")
    # As in trained models, hidden states have a mean: at x = 0 nothing is known about it.
    next(dense.get_input_embeddings().parameters())[:, :4] += 1
    banks = make_student(dense).banks()
    explained = fit_gates(MlpInputs(dense, ROWS), banks, static=True)
    inputs = gather(dense, ROWS, lambda mlp: mlp.module)
    for bank, x_TD, share in zip(banks, inputs, explained, strict=True):
        assert not bank.router.weight.any()
        expected = expert_norms(bank, x_TD).log().mean(0)
        torch.testing.assert_close(bank.router.bias, expected, rtol=1e-4, atol=1e-5)
        assert share == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fitted_gates_find_the_largest_experts(family):
    dense = make_dense(family)
    order = importance_order(neuron_importance(MlpInputs(dense, ROWS)))
    student = make_student(dense, init="importance", neuron_order=order)
    banks = student.banks()
    inputs = gather(dense, HELD_OUT, lambda mlp: mlp.module)
    overlaps = {}
    for name in ("random", "ridge"):
        if name == "ridge":
            fit_gates(MlpInputs(dense, ROWS), banks)
        overlaps[name] = [
            overlap(
                bank.router(x_TD).router_logits.topk(4).indices,
                expert_norms(bank, x_TD).topk(4).indices,
            )
            for bank, x_TD in zip(banks, inputs, strict=True)
        ]
    # A random choice of 4 of 8 shares half of them.
    assert max(overlaps["random"]) < 0.6
    assert min(overlaps["ridge"]) > 0.7


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
@pytest.mark.parametrize("target", [1.0, 2.5, 4.0, 8.0])
def test_budgets_meet_their_target_on_one_row_exactly(form, target):
    dense = make_dense("llama")
    banks = make_student(dense, budget_form=form, target_k=target).banks()
    rows = ROWS[:1]
    fit_gates(MlpInputs(dense, rows), banks)
    fit_start_thresholds(MlpInputs(dense, rows), banks)
    for bank, x_TD in zip(banks, gather(dense, rows, lambda mlp: mlp.module), strict=True):
        num_active = int(bank.router(x_TD).active.sum())
        assert abs(num_active - target * len(x_TD)) <= 0.5


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_meet_their_target_on_many_rows_within_3_percent(family, form):
    dense = make_dense(family)
    banks = make_student(dense, budget_form=form).banks()
    fit_gates(MlpInputs(dense, ROWS), banks)
    fit_start_thresholds(MlpInputs(dense, ROWS), banks)
    for bank, x_TD in zip(banks, gather(dense, ROWS, lambda mlp: mlp.module), strict=True):
        assert bank.router(x_TD).active.sum(-1).float().mean().item() == pytest.approx(4, rel=0.03)
        assert bank.router.num_updates == len(ROWS)


def test_other_selections_keep_their_threshold():
    dense = make_dense("llama")
    banks = make_student(dense, selection="top_k").banks()
    before = [bank.router.threshold.clone() for bank in banks]
    fit_start_thresholds(MlpInputs(dense, ROWS), banks)
    assert [bank.router.threshold for bank in banks] == before


def test_calibration_leaves_no_hook_and_no_graph_behind():
    dense = make_dense("llama")
    banks = make_student(dense).banks()
    neuron_importance(MlpInputs(dense, ROWS))
    fit_gates(MlpInputs(dense, ROWS), banks)
    fit_start_thresholds(MlpInputs(dense, ROWS), banks)
    assert not any(mlp.module._forward_pre_hooks for mlp in gated_mlps(dense))
    assert all(bank.router.weight.requires_grad for bank in banks)
    assert not any(bank.router.threshold.requires_grad for bank in banks)
