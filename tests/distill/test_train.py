"""One step teaches experts by the loss and gates by what the objective says, and nothing else."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tiny import CONFIG, SIZES, change, make_dense, make_documents, make_rows
from tiny_onn.config.checks import validate
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.data.packing import build_row
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import StepResult, distill_step
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops import dense_masked, reference
from tiny_onn.ops.surprise import SmkRule, smk_loss, smk_targets
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import teacher_for

ROWS = make_rows((20, 13, 30, 40, 9, 40, 17, 22), 32)
COUPLED = change(
    CONFIG,
    experts={"weighting": "softmax"},
    router={"selection": "top_k", "objective": "task"},
)


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of each step and changes nothing."""

    def __init__(self, student: TinyOnnForCausalLM) -> None:
        super().__init__(list(student.trainable().values()), {})
        self.student = student
        self.gradients: list[dict[str, Any]] = []

    def step(self, closure: Any = None) -> Any:
        parameters = self.student.trainable().items()
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in parameters}
        )


@dataclass
class Trained:
    student: TinyOnnForCausalLM
    results: list[StepResult] = field(default_factory=list)

    def parameters(self):
        return {name: p.detach() for name, p in self.student.trainable().items()}


def start(config, family="llama"):
    dense = make_dense(family, dtype=config.teacher.dtype)
    return prepare.make_student(config, MlpInputs(dense, ROWS)), teacher_for(dense, config.teacher)


def train(config, num_steps, family="llama"):
    """Steps over the rows, `rows_per_step` at a time, round and round."""
    student, teacher = start(config, family)
    checkpoint_layers(student, config.train.checkpointing)
    optimizer = build_optimizer(student, config.optim)
    trained, size = Trained(student), config.train.rows_per_step
    for step in range(num_steps):
        rows = [ROWS[(step * size + i) % len(ROWS)] for i in range(size)]
        trained.results.append(distill_step(student, teacher, optimizer, rows, config))
    return trained


def gradients(config, rows):
    """The gradients of one step before clipping, by parameter name."""
    student, teacher = start(config)
    recorder = Recorder(student)
    distill_step(student, teacher, recorder, rows, change(config, optim={"clip_norm": 1e9}))
    return recorder.gradients[0], student


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def gates_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".router." in name}


def experts_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".router." not in name}


def plain_expert_layer(x_TD, gate_up, down, weights_TE, router_logits_TE, *, activation, **_):
    """The expert layer as torch differentiates it."""
    gate, up = torch.einsum("td,ejd->tej", x_TD, gate_up).chunk(2, dim=-1)
    hidden = activation(gate) * up * weights_TE[..., None]
    return torch.einsum("tei,edi->td", hidden, down)


# Measured: from 0.85 to 0.46 and from 0.45 to 0.22.
@pytest.mark.parametrize(("family", "bound"), [("llama", 0.55), ("gemma2", 0.28)])
def test_loss_falls_from_a_random_start(family, bound):
    config = change(CONFIG, experts={"init": "random"}, optim={"expert_lr": 1e-2})
    losses = [result.loss.item() for result in train(config, 3 * len(ROWS), family).results]
    assert sum(losses[-len(ROWS) :]) / len(ROWS) < bound
    assert sum(losses[: len(ROWS)]) / len(ROWS) > 1.4 * bound


def test_all_objectives_start_from_the_same_forward_pass():
    configs = [change(CONFIG, router={"objective": o}) for o in ("smk", "task", "none")]
    # Only `task` must take the dense path: by `auto` the sums of the others have another order.
    same_path = [change(config, train={"expert_path": "dense"}) for config in configs]
    expected, *others = [train(config, 1).results[0].loss for config in same_path]
    assert all(torch.equal(expected, loss) for loss in others)
    # Each of a layer's sums over neurons and features may round at every term.
    terms = SIZES["hidden_size"] + SIZES["intermediate_size"]
    bound = terms * SIZES["num_hidden_layers"] * torch.finfo(torch.float32).eps
    for config in configs:
        loss = train(config, 1).results[0].loss
        torch.testing.assert_close(loss, expected, rtol=bound, atol=0)


class Watched(NamedTuple):
    """One bank's forward pass: what went in, what came out, and who was active."""

    bank: ExpertBank
    x_TD: torch.Tensor
    y_TD: torch.Tensor
    active_TE: torch.Tensor

    def surprise(self, kind, num_tokens):
        """The definition, at the gradient of a loss that is a sum over these tokens."""
        assert self.y_TD.grad is not None
        return reference.surprise(
            kind,
            self.x_TD.double(),
            self.bank.experts.gate_up_proj.detach().double(),
            self.bank.experts.down_proj.detach().double(),
            self.y_TD.grad.flatten(0, -2).double() * num_tokens,
            F.silu,
        )


def watch(student) -> list[Watched]:
    """The banks' passes that are to come, in the order of the layers; gradients are kept."""
    seen = []

    def keep(bank, inputs, y_TD):
        if torch.is_grad_enabled():
            y_TD.retain_grad()
            x_TD = inputs[0].detach().flatten(0, -2)
            seen.append(Watched(bank, x_TD, y_TD, bank.router(x_TD).active))

    for bank in student.banks():
        bank.register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("surprise", ["parameters", "gain"])
def test_smk_gives_the_gates_exactly_its_own_gradient(surprise):
    smk = {"surprise": surprise, "coef": 0.5, "direction": "max", "candidates": "active"}
    rule = SmkRule(surprise=surprise, direction="max", candidates="active", num_targets=4)
    # Clipping would scale the gradients that are compared.
    config = change(CONFIG, smk=smk, train={"expert_path": "dense"}, optim={"clip_norm": 1e9})
    row = ROWS[0]
    mask_T = row.router_mask[0]
    student, teacher = start(config)
    recorder, passes = Recorder(student), watch(student)
    tallies = distill_step(student, teacher, recorder, [row], config).tallies
    (got,) = recorder.gradients
    assert len(passes) == len(tallies) == 2
    for layer, (watched, tally) in enumerate(zip(passes, tallies, strict=True)):
        router, active_TE = watched.bank.router, watched.active_TE
        surprise_TE = watched.surprise(surprise, int(row.loss_mask.sum()))
        counted_E = (surprise_TE * active_TE)[mask_T].sum(0).float()
        torch.testing.assert_close(tally.surprise_E, counted_E, rtol=1e-3, atol=1e-4)
        targets_TE = smk_targets(surprise_TE.float(), active_TE, mask_T, rule)
        # A document's last token has no loss, so no gradient and no target.
        assert targets_TE.sum() == (mask_T & row.loss_mask[0]).sum()
        logits_TE = F.linear(watched.x_TD, router.weight, router.bias)
        # The loss is 0 without a target, and so is the gradient.
        loss = 0.5 * smk_loss(logits_TE, targets_TE).sum() / mask_T.sum()
        for name, parameter in (("weight", router.weight), ("bias", router.bias)):
            (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            ours = got[f"backbone.model.layers.{layer}.mlp.router.{name}"]
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_smk_moves_the_gates_and_leaves_the_experts_gradient_alone():
    ours = [change(CONFIG, smk={"coef": coef}) for coef in (0.0, 1.0, 2.0)]
    without, with_smk, doubled = (gradients(config, ROWS[:2])[0] for config in ours)
    assert_same_bits(experts_of(without), experts_of(with_smk))
    for name, gradient in gates_of(with_smk).items():
        assert not gates_of(without)[name].any()
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(doubled[name], 2 * gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("config", [CONFIG, COUPLED], ids=["smk", "task"])
def test_the_loss_gradient_is_what_torch_computes(config, monkeypatch):
    config = change(config, router={"load_balancing_coef": 0.0, "z_loss_coef": 0.0})
    got, _ = gradients(config, ROWS[:1])
    monkeypatch.setattr(dense_masked, "expert_layer", plain_expert_layer)
    expected, _ = gradients(config, ROWS[:1])
    compared = got if config.router.objective == "task" else experts_of(got)
    for name, gradient in compared.items():
        assert expected[name] is not None
        assert expected[name].abs().max() > 1e-6
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_without_an_objective_the_gates_stay():
    config = change(CONFIG, router={"objective": "none"})
    student, _ = start(config)
    before = {name: p.clone() for name, p in gates_of(student.trainable()).items()}
    trained = train(config, 3)
    assert_same_bits(before, gates_of(trained.parameters()))
    assert float(trained.results[0].gate_grad_norm) == 0
    assert all(p.grad is None for p in gates_of(trained.student.trainable()).values())
    assert not trained.results[0].tallies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["smk", "task", "none"])
def test_the_backbone_never_changes_and_the_experts_do(objective, dtype):
    config = change(CONFIG, router={"objective": objective}, teacher={"dtype": dtype})
    before = {name: p.clone() for name, p in start(config)[0].trainable().items()}
    trained = train(config, 3)
    assert backbone_hash(trained.student) == backbone_hash(make_dense("llama", dtype=dtype))
    after = trained.parameters()
    assert {p.dtype for p in after.values()} == {torch.float32}
    for name, tensor in before.items():
        gate = ".router." in name
        assert torch.equal(tensor, after[name]) == (gate and objective == "none"), name
    frozen = [p for n, p in trained.student.named_parameters() if n not in after]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("config", [CONFIG, COUPLED], ids=["smk", "task"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointing_layers_changes_no_bit(config, family):
    plain = train(config, 3, family)
    recomputed = train(change(config, train={"checkpointing": "layer"}), 3, family)
    assert_same_bits(plain.parameters(), recomputed.parameters())
    for one, other in zip(plain.results, recomputed.results, strict=True):
        assert one.loss == other.loss
        for tally, same in zip(one.tallies, other.tallies, strict=True):
            # A second forward pass must not be counted twice.
            assert tally.num_tokens == same.num_tokens
            assert torch.equal(tally.surprise_E, same.surprise_E)


@pytest.mark.parametrize("config", [CONFIG, COUPLED], ids=["smk", "task"])
def test_the_same_settings_give_the_same_bits(config):
    config = change(config, experts={"init": "random"})
    first = train(config, 3).parameters()
    assert_same_bits(first, train(config, 3).parameters())
    other = train(change(config, train={"seed": 1}), 3).parameters()
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_and_separate_teachers_teach_the_same(dtype):
    config = change(CONFIG, teacher={"dtype": dtype})
    separate = change(config, teacher={"placement": "separate"})
    assert_same_bits(train(config, 3).parameters(), train(separate, 3).parameters())


@pytest.mark.parametrize("smk", [{}, {"surprise": "gain", "direction": "max"}])
def test_two_rows_teach_as_one_row_of_the_same_documents(smk):
    config = change(CONFIG, smk=smk, train={"expert_path": "dense"})
    first, second = make_documents((11, 21)), make_documents((7, 5, 20), seed=1)
    halves = [build_row(docs, row_tokens=32, pad_token_id=0) for docs in (first, second)]
    whole = build_row([*first, *second], row_tokens=64, pad_token_id=0)
    (split, _), (joined, _) = gradients(config, halves), gradients(config, [whole])
    for name, gradient in joined.items():
        assert gradient is not None
        assert split[name] is not None
        # Sums over tokens in another order.
        bound = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=bound)


def test_rows_per_step_measures_as_one_row_does():
    first, second = make_documents((11, 21)), make_documents((7, 5, 20), seed=1)
    halves = [build_row(docs, row_tokens=32, pad_token_id=0) for docs in (first, second)]
    whole = build_row([*first, *second], row_tokens=64, pad_token_id=0)
    results = []
    for rows in (halves, [whole]):
        student, teacher = start(CONFIG)
        results.append(distill_step(student, teacher, Recorder(student), rows, CONFIG))
    for name in ("loss", "forward_kl", "agreement", "gate_grad_norm"):
        one, other = (float(getattr(result, name)) for result in results)
        assert one == pytest.approx(other, rel=1e-4), name
    one, other = (result.stats.summary() for result in results)
    assert one == pytest.approx(other, rel=1e-4)
    for tally, same in zip(results[0].tallies, results[1].tallies, strict=True):
        # In units of the per-token loss, whatever it was divided by.
        torch.testing.assert_close(tally.surprise_E, same.surprise_E, rtol=1e-4, atol=1e-5)
        assert tally.num_agree == same.num_agree


def test_mixtral_like_training_runs_with_its_balance_losses():
    losses = [result.loss.item() for result in train(COUPLED, 3 * len(ROWS)).results]
    # Measured: from 0.50 to 0.29.
    assert sum(losses[-len(ROWS) :]) < 0.7 * sum(losses[: len(ROWS)])
    plain = change(COUPLED, router={"load_balancing_coef": 0.0, "z_loss_coef": 0.0})
    for coef in ("load_balancing_coef", "z_loss_coef"):
        balanced, _ = gradients(change(plain, router={coef: 1.0}), ROWS[:1])
        for name, gradient in gates_of(gradients(plain, ROWS[:1])[0]).items():
            assert not torch.allclose(gradient, balanced[name]), (coef, name)


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
def test_budgets_stay_near_their_target_while_the_gates_learn(form):
    config = change(CONFIG, router={"budget_form": form}, experts={"gate_init": "ridge"})
    results = train(config, 24).results
    ks = [result.stats.summary()["mean_k"] for result in results]
    assert sum(ks[-8:]) / 8 == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("selection", ["static", "random", "top_k"])
def test_fixed_selections_use_k_experts_each(selection):
    config = change(CONFIG, router={"selection": selection, "objective": "none"})
    summary = train(config, 2).results[-1].stats.summary()
    assert (summary["mean_k"], summary["std_k"]) == (4, 0)
    assert (summary["dead_experts"] == 2 * 4) == (selection == "static")


@pytest.mark.parametrize(
    "surprise", ["parameters", "input", "output", "gain", "magnitude", "relative"]
)
@pytest.mark.parametrize("targets", ["single", "set"])
def test_every_surprise_teaches(surprise, targets):
    config = change(CONFIG, smk={"surprise": surprise, "targets": targets, "candidates": "all"})
    trained = train(config, 2)
    for result, row in zip(trained.results, ROWS[:2], strict=True):
        assert result.loss.isfinite()
        # A document's last token has no loss: only the magnitude is known there.
        counted = row.router_mask if surprise == "magnitude" else row.router_mask & row.loss_mask
        for tally in result.tallies:
            assert tally.num_tokens == row.router_mask.sum()
            # All experts of a layer share the gradient at its output: it points at none.
            assert tally.num_targets == (0 if surprise == "output" else counted.sum())
            assert tally.surprise_E.isfinite().all()


E, S = 8, 2
LONG = make_rows((20, 13, 30, 64, 9, 40, 17, 22), 64)
SHARED = change(CONFIG, experts={"num_shared": S}, data={"row_tokens": 64})
TRAINED = [
    ({}, {}),
    ({"budget_scope": "global"}, {"candidates": "all", "surprise": "gain", "direction": "max"}),
    ({"balance_rate": 0.01, "revive_after_steps": 1}, {"explore_fraction": 0.5}),
    ({"objective": "regression"}, {}),
    ({"objective": "task"}, {}),
    ({"selection": "top_k", "objective": "task", "z_loss_coef": 0.1}, {}),
]


@pytest.mark.parametrize(("router", "smk"), TRAINED)
def test_training_moves_every_gate_but_those_of_shared_experts(router, smk):
    config = change(SHARED, router=router, smk=smk)
    validate(config)
    dense = make_dense()
    student = prepare.make_student(config, MlpInputs(dense, LONG))
    prepare.set_objective(student.banks(), config)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = build_optimizer(student, config.optim)
    results = [
        distill_step(student, dense, optimizer, LONG[:2], config, step=step) for step in range(3)
    ]
    for name, tensor in student.state_dict().items():
        if name.endswith(("router.weight", "router.bias")):
            moved_E = (tensor != before[name]).view(E, -1).any(1)
            assert moved_E.tolist() == [False] * S + [True] * (E - S), name
        if name.endswith("selection_bias") and config.router.balance_rate:
            assert not tensor[:S].any() and tensor[S:].any()
            assert tensor[S:].sum().abs() < 1
        if name.endswith("down_proj"):
            assert (tensor[:S] != before[name][:S]).any()
    stats = results[-1].stats
    assert stats.load_LE[:, :S].eq(stats.num_tokens).all()
    fit_eval_thresholds(student, LONG, config.router.budget_scope)
    mean_k = evaluate(student, HeldOut(dense, LONG), config.loss).mean_k
    assert mean_k == pytest.approx(4.0, rel=0.05)
