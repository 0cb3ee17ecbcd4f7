"""The blockwise stage: each layer learns its teacher MLP as if alone, and nothing of it stays."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tiny import CONFIG, change, make_dense, make_documents, make_rows
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.data.packing import build_row
from tiny_onn.distill.blockwise import block_errors, blockwise_step, teacher_power
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import decoder_layers, gated_mlps, last_hidden_states
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.ops import reference
from tiny_onn.ops.surprise import SmkRule, label_loss, smk_loss, smk_targets
from tiny_onn.routing.losses import load_balancing_loss, z_loss
from tiny_onn.routing.thresholds import exact_threshold, update_thresholds
from tiny_onn.teacher.load import teacher_for

ROWS = make_rows((20, 13, 30, 40, 9, 40, 17, 22), 32)
TASK = change(CONFIG, experts={"weighting": "softmax"}, router={"objective": "task"})
UNCLIPPED = {"clip_norm": 1e9}


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of a step and changes nothing."""

    def __init__(self, student) -> None:
        super().__init__(list(student.trainable().values()), {})
        self.student = student
        self.gradients: dict[str, Any] = {}

    def step(self, closure: Any = None) -> Any:
        parameters = self.student.trainable().items()
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in parameters}


def start(config, family="llama", **sizes):
    dense = make_dense(family, dtype=config.teacher.dtype, **sizes)
    student, teacher = (
        prepare.make_student(config, MlpInputs(dense, ROWS)),
        teacher_for(dense, config.teacher),
    )
    return student, teacher, teacher_power(teacher, ROWS)


def gradients(config, rows):
    student, teacher, power = start(config)
    recorder = Recorder(student)
    config = change(config, optim=UNCLIPPED)
    result = blockwise_step(student, teacher, recorder, rows, config, power=power)
    return recorder.gradients, result, student


def train(config, num_steps, family="llama"):
    student, teacher, power = start(config, family)
    optimizer = build_optimizer(student, config.optim)
    size = config.train.rows_per_step
    results = [
        blockwise_step(
            student,
            teacher,
            optimizer,
            [ROWS[(step * size + i) % len(ROWS)] for i in range(size)],
            config,
            power=power,
        )
        for step in range(num_steps)
    ]
    return student, teacher, results


def mlp_inputs(dense, row):
    """Each MLP's input and output for a row, by running the dense model layer by layer."""
    seen = []
    handles = [
        layer.mlp.register_forward_hook(lambda _, x, y: seen.append((x[0][0], y[0])))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        for layer in decoder_layers(dense)
    ]
    last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    for handle in handles:
        handle.remove()
    return seen


def plain_layer(bank, x_TD, weights_TE):
    """The expert layer as torch differentiates it."""
    gate_up = torch.einsum("td,ejd->tej", x_TD, bank.experts.gate_up_proj)
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up * weights_TE[..., None]
    return torch.einsum("tei,edi->td", hidden, bank.experts.down_proj)


def of_layer(tensors, index):
    prefix = f"backbone.model.layers.{index}.mlp."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize("config", [CONFIG, TASK], ids=["smk", "task"])
def test_every_layer_learns_as_if_it_were_alone(config):
    rows = ROWS[:2]
    got, result, student = gradients(config, rows)
    twin, teacher, _ = start(config)
    calls = [mlp_inputs(teacher, row) for row in rows]
    mask_T = torch.cat([row.router_mask[0] for row in rows])
    # The definition: the power is a mean over all rows that calibrated it.
    every = [mlp_inputs(teacher, row) for row in ROWS]
    every_mask_T = torch.cat([row.router_mask[0] for row in ROWS])
    assert result.error_L is not None
    for index, bank in enumerate(twin.banks()):
        x_TD, y_TD = (torch.cat([call[index][side] for call in calls]) for side in (0, 1))
        all_y_TD = torch.cat([call[index][1] for call in every])
        power = all_y_TD[every_mask_T].square().sum(-1).mean()
        routing = bank.router(x_TD)
        coupled = config.router.objective == "task"
        weights_TE = routing.weights if coupled else routing.weights.detach()
        error_T = (plain_layer(bank, x_TD, weights_TE) - y_TD).square().sum(-1) / power
        error = error_T[mask_T].mean()
        torch.testing.assert_close(result.error_L[index], error.detach(), rtol=1e-5, atol=1e-7)
        names = ["experts.gate_up_proj", "experts.down_proj"] + [
            "router.weight",
            "router.bias",
        ] * coupled
        parameters = [bank.get_parameter(name) for name in names]
        for name, expected in zip(names, torch.autograd.grad(error, parameters), strict=True):
            assert expected.abs().max() > 1e-5
            torch.testing.assert_close(of_layer(got, index)[name], expected, rtol=1e-4, atol=1e-6)
    assert float(result.loss) == pytest.approx(float(result.error_L.mean()))
    # One step of the controller, with all the rows' scores.
    for index, (bank, after) in enumerate(zip(twin.banks(), student.banks(), strict=True)):
        exact = sum(
            row.router_mask.sum()
            / mask_T.sum()
            * exact_threshold(bank.router(call[index][0]).scores, row.router_mask[0], 4.0)
            for row, call in zip(rows, calls, strict=True)
        )
        mean_k = result.stats.load_LE[index].sum() / result.stats.num_tokens
        exact_L = torch.as_tensor(exact)[None]
        update_thresholds([bank.router], exact_L, config.router.budget_rate, mean_k[None])
        torch.testing.assert_close(after.router.threshold, bank.router.threshold)


@pytest.mark.parametrize("surprise", ["parameters", "input", "gain", "magnitude"])
@pytest.mark.parametrize("candidates", ["active", "all"])
def test_a_gate_learns_from_the_surprise_of_its_own_error(surprise, candidates):
    smk = {"surprise": surprise, "direction": "max", "candidates": candidates, "coef": 0.5}
    (row,) = ROWS[:1]
    got, result, _ = gradients(change(CONFIG, smk=smk), [row])
    twin, teacher, power = start(CONFIG)
    mask_T = row.router_mask[0]
    rule = SmkRule(surprise=surprise, direction="max", candidates=candidates, num_targets=4)
    for index, (bank, (x_TD, y_TD)) in enumerate(
        zip(twin.banks(), mlp_inputs(teacher, row), strict=True)
    ):
        routing = bank.router(x_TD)
        out_TD = plain_layer(bank, x_TD, routing.weights.detach()).detach().requires_grad_()
        # A token's own error: surprise is in its units.
        error_T = (out_TD - y_TD).square().sum(-1) / power[index]
        (grad_y_TD,) = torch.autograd.grad((error_T * mask_T).sum(), out_TD)
        surprise_TE = reference.surprise(
            surprise,
            x_TD.double(),
            bank.experts.gate_up_proj.detach().double(),
            bank.experts.down_proj.detach().double(),
            grad_y_TD.double(),
            F.silu,
        ).float()
        if candidates == "active":
            surprise_TE = surprise_TE * routing.active
        torch.testing.assert_close(
            result.tallies[index].surprise_E, surprise_TE[mask_T].sum(0), rtol=1e-3, atol=1e-4
        )
        targets_TE = smk_targets(surprise_TE, routing.active, mask_T, rule)
        assert targets_TE.sum() == mask_T.sum()
        loss = 0.5 * smk_loss(routing.router_logits, targets_TE).sum() / mask_T.sum()
        for name in ("router.weight", "router.bias"):
            (expected,) = torch.autograd.grad(loss, bank.get_parameter(name), retain_graph=True)
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(of_layer(got, index)[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", ["member", "helpful"])
def test_the_backward_pass_hands_gates_this_gradient(targets):
    smk = {"surprise": "gain", "direction": "max", "candidates": "all", "targets": targets}
    (row,) = ROWS[:1]
    config = change(CONFIG, smk=smk)
    got, _, _ = gradients(config, [row])
    twin, teacher, power = start(config)
    mask_T = row.router_mask[0]
    rule = SmkRule(
        surprise="gain", direction="max", candidates="all", targets=targets, num_targets=4
    )
    for index, (bank, (x_TD, y_TD)) in enumerate(
        zip(twin.banks(), mlp_inputs(teacher, row), strict=True)
    ):
        routing = bank.router(x_TD)
        out_TD = plain_layer(bank, x_TD, routing.weights.detach())
        grad_y_TD = 2 * (out_TD - y_TD) / power[index]
        alone = torch.eye(8)
        outputs = [plain_layer(bank, x_TD, alone[e].expand(len(x_TD), 8)) for e in range(8)]
        gains_TE = -torch.stack([(out * grad_y_TD).sum(-1) for out in outputs], dim=-1).detach()
        targets_TE = smk_targets(gains_TE, routing.active, mask_T, rule)
        everyone_TE = torch.ones_like(routing.active)
        loss = label_loss(routing.router_logits, targets_TE, everyone_TE).sum() / mask_T.sum()
        (expected,) = torch.autograd.grad(loss, bank.router.weight)
        assert expected.abs().max() > 1e-5
        name = f"backbone.model.layers.{index}.mlp.router.weight"
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-6)


def test_top_k_gates_are_balanced_layer_by_layer():
    plain = change(
        TASK,
        router={"selection": "top_k", "load_balancing_coef": 0.0, "z_loss_coef": 0.0},
    )
    both = change(plain, router={"load_balancing_coef": 1.0, "z_loss_coef": 0.1})
    rows = ROWS[:2]
    without, with_both = gradients(plain, rows)[0], gradients(both, rows)[0]
    twin, teacher, _ = start(plain)
    calls = [mlp_inputs(teacher, row) for row in rows]
    for index, bank in enumerate(twin.banks()):
        penalty = torch.zeros(())
        for row, call in zip(rows, calls, strict=True):
            logits, mask_T = [bank.router(call[index][0]).router_logits], row.router_mask[0]
            penalty = penalty + load_balancing_loss(logits, 4, mask_T) / 2
            penalty = penalty + 0.1 * z_loss(logits, mask_T) / 2
        expected = torch.autograd.grad(penalty, bank.router.weight)[0]
        name = "router.weight"
        added = of_layer(with_both, index)[name] - of_layer(without, index)[name]
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


class Saved:
    """A saved tensor whose life can be watched."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("config", [CONFIG, TASK], ids=["smk", "task"])
def test_nothing_of_a_layer_outlives_its_turn(config):
    """The most that is kept for backward passes at once is one layer's, whatever the depth."""

    def peak(num_layers):
        student, teacher, power = start(config, num_hidden_layers=num_layers)
        alive: weakref.WeakSet[Saved] = weakref.WeakSet()
        most = []

        def pack(tensor):
            # Detached: an operation that saves its own output would else hold itself alive.
            alive.add(saved := Saved(tensor.detach()))
            most.append(len(alive))
            return saved

        # Within the banks only: torch.func, which the backward pass uses, refuses such hooks.
        watch = saved_tensors_hooks(pack, lambda saved: saved.tensor)
        for bank in student.banks():
            bank.register_forward_pre_hook(lambda *_: watch.__enter__())
            bank.register_forward_hook(lambda *_: watch.__exit__())
        between = []
        for mlp in gated_mlps(teacher):
            mlp.module.register_forward_pre_hook(lambda *_: between.append(len(alive)))
        gc.disable()
        try:
            blockwise_step(student, teacher, Recorder(student), ROWS[:2], config, power=power)
        finally:
            gc.enable()
        assert len(between) == 2 * num_layers
        assert set(between) == {0}
        return max(most)

    assert peak(2) == peak(5) > 0


@pytest.mark.parametrize("smk", [{}, {"surprise": "gain", "direction": "max"}])
def test_two_rows_teach_as_one_row_of_the_same_documents(smk):
    config = change(CONFIG, smk=smk, train={"expert_path": "dense"})
    first, second = make_documents((11, 21)), make_documents((7, 5, 20), seed=1)
    halves = [build_row(docs, row_tokens=32, pad_token_id=0) for docs in (first, second)]
    whole = build_row([*first, *second], row_tokens=64, pad_token_id=0)
    (split, one, _), (joined, other, _) = gradients(config, halves), gradients(config, [whole])
    for name, gradient in joined.items():
        bound = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=bound)
    torch.testing.assert_close(one.error_L, other.error_L)
    assert one.stats.summary() == pytest.approx(other.stats.summary(), rel=1e-4)


@pytest.mark.parametrize("selection", ["budget", "top_k"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_fall_and_the_backbone_stays(selection, dtype):
    config = change(
        CONFIG,
        teacher={"dtype": dtype},
        experts={"gate_init": "ridge"},
        router={"selection": selection, "budget_form": "threshold"},
        smk={"surprise": "gain", "direction": "max", "candidates": "all"},
        optim={"expert_lr": 1e-2},
    )
    student, teacher, _ = start(config)
    before = block_errors(student, teacher, ROWS)
    student, teacher, results = train(config, 4 * len(ROWS))
    after = block_errors(student, teacher, ROWS)
    # Measured: to 0.62 ... 0.76 of what they were.
    assert all(new < 0.85 * old for new, old in zip(after, before, strict=True))
    assert backbone_hash(student) == backbone_hash(make_dense(dtype=dtype))
    if selection == "budget":
        last = [result.stats.summary() for result in results[-len(ROWS) :]]
        assert sum(stats["mean_k"] for stats in last) / len(last) == pytest.approx(4, rel=0.05)
        assert min(stats["std_k"] for stats in last) > 0.5


def test_the_error_is_0_with_all_experts_on_and_1_in_silence():
    student, teacher, _ = start(CONFIG, family="gemma2")
    with all_experts_on(student.banks()):
        assert max(block_errors(student, teacher, ROWS)) < 1e-10
    for bank in student.banks():
        bank.experts.down_proj.data.zero_()
    assert block_errors(student, teacher, ROWS) == [1.0, 1.0]


def test_the_error_is_that_of_a_plain_sum_over_counted_tokens():
    student, teacher, _ = start(CONFIG)
    errors = block_errors(student, teacher, ROWS)
    mask_T = torch.cat([row.router_mask[0] for row in ROWS])
    calls = [mlp_inputs(teacher, row) for row in ROWS]
    for index, bank in enumerate(student.banks()):
        x_TD, y_TD = (torch.cat([call[index][side] for call in calls])[mask_T] for side in (0, 1))
        with torch.no_grad():
            own_TD = plain_layer(bank, x_TD, bank.router(x_TD).weights)
        expected = (own_TD - y_TD).square().sum() / y_TD.square().sum()
        assert errors[index] == pytest.approx(float(expected), rel=1e-4)


def test_a_budget_that_layers_share_gives_them_one_threshold():
    router = {"budget_scope": "global", "budget_form": "threshold"}
    config = change(CONFIG, experts={"gate_init": "ridge"}, router=router)
    student, _, results = train(config, 2 * len(ROWS))
    thresholds = [float(bank.router.threshold) for bank in student.banks()]
    assert thresholds[0] == thresholds[1]
    last = [result.stats.summary() for result in results[-len(ROWS) :]]
    assert sum(stats["mean_k"] for stats in last) / len(last) == pytest.approx(4, rel=0.1)
    assert last[-1]["min_layer_k"] != last[-1]["max_layer_k"]


def test_a_step_that_is_not_finite_changes_nothing():
    student, teacher, power = start(CONFIG)
    optimizer = build_optimizer(student, CONFIG.optim)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    broken = [power[0], float("nan")]
    result = blockwise_step(student, teacher, optimizer, ROWS[:1], CONFIG, power=broken)
    assert not result.finite
    assert all(torch.equal(tensor, before[n]) for n, tensor in student.state_dict().items())
    assert blockwise_step(student, teacher, optimizer, ROWS[:1], CONFIG, power=power).finite
    assert not torch.equal(
        student.banks()[0].experts.down_proj,
        before["backbone.model.layers.0.mlp.experts.down_proj"],
    )


def test_a_regression_gate_learns_log_norms_and_token_losses_sum_to_the_loss():
    config = change(CONFIG, router={"objective": "regression"}, train={"expert_path": "dense"})
    got, result, _ = gradients(config, ROWS[:2])
    twin, teacher, _ = start(config)
    num_tokens = sum(int(row.router_mask.sum()) for row in ROWS[:2])
    total = sum(float(losses_T.sum()) for losses_T in result.token_losses)
    assert total / num_tokens == pytest.approx(float(result.loss), rel=1e-5)
    calls = [mlp_inputs(teacher, row) for row in ROWS[:2]]
    mask_T = torch.cat([row.router_mask[0] for row in ROWS[:2]])
    for index, bank in enumerate(twin.banks()):
        x_TD = torch.cat([call[index][0] for call in calls])
        weights = torch.eye(8)
        norms_TE = torch.stack(
            [
                plain_layer(bank, x_TD, weights[e].expand(len(x_TD), 8)).norm(dim=-1)
                for e in range(8)
            ],
            dim=-1,
        ).detach()
        errors_TE = bank.router(x_TD).router_logits - norms_TE.clamp_min(1e-6).log()
        loss = errors_TE.square().mean(-1)[mask_T].mean()
        (expected,) = torch.autograd.grad(loss, bank.router.weight)
        name = "router.weight"
        torch.testing.assert_close(of_layer(got, index)[name], expected, rtol=1e-3, atol=1e-5)
