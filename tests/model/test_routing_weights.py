"""What the main loss tells a gate: the layer's derivative where there is one, else an estimate."""

import pytest
import torch
from torch import nn

from tiny import CONFIG, change, make_dense, make_rows, make_student, normal
from tiny_onn.conversion.pipeline import make_student as prepared_student
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.experts import Execution
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import RoutingRule, route
from tiny_onn.model.routing_weights import WIDTH
from tiny_onn.model.student import TinyOnnForCausalLM

ROWS = make_rows((20, 13, 30, 60, 9, 40, 17, 22, 33), 64)
RAMP = RoutingRule(selection="budget", weighting="ramp", target_k=3.0)
THRESHOLD = torch.tensor(0.15)


def gradients(dense, objective, straight_through="softmax") -> dict[str, torch.Tensor]:
    """The gradients of a first step, before clipping changes them, by parameter."""
    config = change(
        CONFIG,
        experts={"gate_init": "ridge", "compensation": "mean"},
        router={
            "objective": objective,
            "straight_through": straight_through,
            "budget_form": "threshold",
        },
        optim={"clip_norm": 1e9},
    )
    student = prepared_student(config, MlpInputs(dense, ROWS[:2]))
    kept = {}

    class Keeping(torch.optim.SGD):
        def step(self, closure=None):
            named = student.trainable().items()
            kept.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    optimizer = Keeping(student.trainable().values(), lr=0.0)
    distill_step(student, dense, optimizer, ROWS[:1], config)
    return kept


def test_the_estimators_gradient_stays_out_of_the_experts():
    dense = make_dense("llama", num_hidden_layers=4)
    frozen = {n: g for n, g in gradients(dense, "none").items() if ".router." not in n}
    assert frozen
    for estimator in ("softmax", "threshold"):
        task = gradients(dense, "task", estimator)
        for name, expected in frozen.items():
            torch.testing.assert_close(task[name], expected, rtol=1e-4, atol=1e-6)
        gates = [g for n, g in task.items() if n.endswith("router.weight")]
        assert len(gates) == 4
        assert all(g.any() for g in gates)
    # What runs of earlier versions did, and why it is not the default.
    coupled = gradients(dense, "task", "coupled")
    assert any(not torch.allclose(coupled[n], g, rtol=0.1) for n, g in frozen.items())


def test_a_ramp_starts_at_the_threshold_and_ends_at_1():
    above = torch.linspace(0, 4 * WIDTH, 9)
    # The first expert's log probability lies this far above the threshold, or below it.
    for distance, sign in ((above, 1), (above, -1)):
        probs = (THRESHOLD.log() + sign * distance).exp()
        logits = torch.stack((probs.log(), (1 - probs).log()), dim=1)
        weights = route(logits, RAMP, THRESHOLD).weights[:, 0]
        torch.testing.assert_close(weights, (sign * distance / WIDTH).relu().tanh())


def test_a_ramp_rises_from_each_tokens_own_threshold():
    logits, thresholds = normal(6, 8), torch.linspace(0.05, 0.3, 6)[:, None]
    together = route(logits, RAMP, thresholds).weights
    for t in range(6):
        alone = route(logits[t : t + 1], RAMP, thresholds[t, 0]).weights[0]
        torch.testing.assert_close(together[t], alone)


def test_a_ramps_gradient_is_the_derivative_of_the_layer():
    student = make_student(
        make_dense("llama"), selection="budget", weighting="ramp", compensation="mean"
    )
    bank = student.banks()[0].double()
    bank.set_execution(Execution(coupled=True))
    assert bank.mean_outputs is not None
    for parameter in (bank.mean_outputs, bank.router.weight):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    bank.router.threshold.fill_(0.12)
    x, pull = normal(6, 32, dtype=torch.float64), normal(6, 32, seed=1, dtype=torch.float64)
    bank.train()

    def loss(x_TD, gate_ED):
        return torch.func.functional_call(bank, {"router.weight": gate_ED}, (x_TD,)) * pull

    inputs = (x.requires_grad_(), bank.router.weight)
    # The router computes in float32, so that small differences need large steps.
    assert torch.autograd.gradcheck(
        lambda *args: loss(*args).sum(), inputs, eps=1e-4, atol=2e-3, rtol=1e-2
    )


def test_a_layer_of_ramps_does_not_jump_where_an_expert_comes_or_goes():
    bank = make_student(
        make_dense("llama"), selection="budget", weighting="ramp", compensation="mean"
    ).banks()[0]
    assert bank.mean_outputs is not None
    nn.init.normal_(bank.mean_outputs, generator=torch.Generator().manual_seed(0))
    x = normal(50, 32)
    probs = bank.router(x).router_logits.softmax(-1)
    # Just above and just below the second largest probability of a token.
    edge = probs[0].sort().values[-2]
    outputs = []
    for threshold in (edge * (1 + 1e-4), edge * (1 - 1e-4)):
        bank.train(False).router.settled.copy_(threshold)
        with torch.no_grad():
            outputs.append((bank(x[:1]), bank.route(x[:1]).active.sum()))
    (before, fewer), (after, more) = outputs
    assert more == fewer + 1
    assert (after - before).abs().max() < 1e-2 * before.abs().max()


def test_a_threshold_estimator_pulls_most_at_the_experts_next_to_the_threshold():
    rule = RoutingRule(
        selection="budget", weighting="unit", target_k=3.0, straight_through="threshold"
    )
    logits, pull = normal(40, 8).requires_grad_(), normal(40, 8, seed=1)
    weights = route(logits, rule, THRESHOLD).weights
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    (got,) = torch.autograd.grad((weights * pull).sum(), logits)
    soft = ((logits.log_softmax(-1) - THRESHOLD.log()) / WIDTH).sigmoid()
    (expected,) = torch.autograd.grad((soft * pull).sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weighting", ["unit", "ramp"])
def test_a_task_gate_learns_what_an_active_expert_takes_away(weighting):
    dense = make_dense("llama")
    changes = {"selection": "budget", "weighting": weighting, "compensation": "mean"}
    bank = make_student(dense, **changes).banks()[0].train()
    bank.set_execution(Execution(coupled=True))
    assert bank.mean_outputs is not None
    x, pull = normal(30, 32), normal(30, 32, seed=1)
    grads = []
    for scale in (0.0, 5.0):
        nn.init.constant_(bank.mean_outputs, scale)
        (grad,) = torch.autograd.grad((bank(x) * pull).sum(), bank.router.weight)
        grads.append(grad)
    assert not torch.allclose(*grads)


def test_a_ramped_student_trains_is_saved_and_answers_as_before(tmp_path):
    dense = make_dense("llama")
    config = change(
        CONFIG,
        experts={"weighting": "ramp", "gate_init": "ridge"},
        router={"objective": "task", "budget_form": "threshold"},
    )
    student = prepared_student(config, MlpInputs(dense, ROWS[:2]))
    optimizer = build_optimizer(student, config.optim)
    losses = [distill_step(student, dense, optimizer, ROWS[:1], config).loss for _ in range(30)]
    assert losses[-1] < losses[0]
    student.train(False).save_pretrained(tmp_path)
    loaded = TinyOnnForCausalLM.from_pretrained(tmp_path)
    ids = ROWS[0].input_ids
    with torch.no_grad():
        got, expected = loaded(input_ids=ids).logits, student(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["unit", "mean", "softmax", "sigmoid"])
@pytest.mark.parametrize("straight_through", ["softmax", "threshold"])
def test_weights_without_gradients_have_the_same_bits(weighting, straight_through):
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rule = RoutingRule(weighting=weighting, straight_through=straight_through, target_k=4.0)
    weights = route(logits, rule, torch.tensor(0.1)).weights
    with torch.no_grad():
        assert torch.equal(route(logits, rule, torch.tensor(0.1)).weights, weights)
