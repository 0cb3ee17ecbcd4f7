"""Every routing statistic equals a count by hand, one token and one expert at a time."""

import math
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CONFIG, change, make_dense, make_rows, make_student, normal
from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.evaluation.compare import evaluate, evaluate_layers, unigram_nll
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.router import Routing, RoutingRule
from tiny_onn.ops import reference
from tiny_onn.ops.router_gradient import RoutingTables, SmkStep, SurpriseTally, router_gradient
from tiny_onn.ops.surprise import SmkRule, smk_targets
from tiny_onn.routing import thresholds
from tiny_onn.routing.statistics import OracleStats, RoutingStats, border_ties, first_tokens
from tiny_onn.teacher.held_out import HeldOut

# Documents of 5, 2 and 4 tokens, then one of padding.
ROW = build_row([[5, 6, 7, 8, 9], [3, 4], [9, 8, 7, 6]], row_tokens=12, pad_token_id=0)
FIRST, COUNTED = (0, 5, 7), (1, 2, 3, 4, 6, 8, 9, 10)
E, S = 8, 2


def routing_of(logits, active) -> Routing:
    return Routing(router_logits=logits, scores=logits, active=active, weights=active.float())


def uneven(seed, share) -> Routing:
    """Logits with ties and any active experts, none and all of them among the tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (12, E), generator=generator).float()
    active = torch.rand(12, E, generator=generator) < share
    active[1], active[2] = False, True
    # Expert 5 has only a first token.
    active[1:5, 5], active[0, 5], active[6:, 5] = False, True, False
    return routing_of(logits, active)


ROUTINGS = [uneven(0, 0.5), uneven(1, 0.1), uneven(2, 0.9)]
BANKS = [ExpertBank(3, E, 2, "silu", RoutingRule(target_k=4.0)) for _ in ROUTINGS]


def entropy(weights):
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w)


def test_first_tokens_are_the_first_of_each_document():
    assert tuple(first_tokens(ROW).nonzero().flatten().tolist()) == FIRST
    assert tuple(ROW.router_mask[0].nonzero().flatten().tolist()) == COUNTED


def test_every_statistic_is_a_count_over_tokens():
    stats = RoutingStats.zeros(BANKS)
    stats.add(ROUTINGS, ROW)
    layers, counts = stats.layers(), stats.counts()
    assert (counts["num_tokens"], counts["num_first"]) == (8, 3)
    wanted: dict[str, list[Any]] = {name: [] for name in (*layers, *counts)}
    for routing in ROUTINGS:
        active, logits = routing.active, routing.router_logits
        k = [int(active[t].sum()) for t in COUNTED]
        load = [sum(int(active[t, e]) for t in COUNTED) for e in range(E)]
        first = [sum(int(active[t, e]) for t in FIRST) for e in range(E)]
        mean = sum(k) / 8
        wanted["mean_k"].append(mean)
        wanted["std_k"].append(math.sqrt(sum((n - mean) ** 2 for n in k) / 8))
        wanted["k_histogram"].append([k.count(n) for n in range(E + 1)])
        wanted["zero_expert_rate"].append(k.count(0) / 8)
        wanted["load"].append(load)
        wanted["load_entropy"].append(entropy(load))
        wanted["max_load_share"].append(max(load) / sum(load))
        wanted["first_load"].append(first)
        wanted["first_mean_k"].append(sum(first) / 3)
        gates = [[math.exp(logits[t, e]) for e in range(E)] for t in COUNTED]
        wanted["gate_entropy"].append(sum(entropy(gate) for gate in gates) / 8)
        ties = 0
        for t in COUNTED:
            ours = [float(logits[t, e]) for e in range(E) if active[t, e]]
            others = [float(logits[t, e]) for e in range(E) if not active[t, e]]
            ties += bool(ours and others and min(ours) == max(others))
        wanted["tie_rate"].append(ties / 8)
    assert 0 < sum(wanted["tie_rate"]) < 3
    for name, values in (layers | counts).items():
        if name not in ("num_tokens", "num_first"):
            assert [pytest.approx(value, rel=1e-6) for value in wanted[name]] == values, name
    summary = stats.summary()
    for name in ("mean_k", "std_k", "zero_expert_rate", "load_entropy", "gate_entropy"):
        assert summary[name] == pytest.approx(sum(wanted[name]) / 3), name
    assert summary["max_load_share"] == pytest.approx(max(wanted["max_load_share"]))
    assert summary["min_layer_k"] == min(wanted["mean_k"])
    assert summary["dead_experts"] == sum(load.count(0) for load in wanted["load"]) > 0


@pytest.mark.parametrize("elements", [1, 2 * E * 11])
def test_however_many_layers_are_counted_together(elements, monkeypatch):
    whole, parts = RoutingStats.zeros(BANKS), RoutingStats.zeros(BANKS)
    whole.add(ROUTINGS, ROW)
    monkeypatch.setattr(thresholds, "GROUP_ELEMENTS", elements)
    parts.add(ROUTINGS, ROW)
    for name, values in parts.layers().items():
        assert values == pytest.approx(whole.layers()[name]), name
    assert parts.counts() == whole.counts()


def test_tallies_are_read_layer_by_layer():
    tallies = SurpriseTally.of_layers(3, E, torch.device("cpu"))
    for layer, tally in enumerate(tallies):
        tally.counts_4.add_(torch.arange(4) + 10 * layer)
        tally.sums_4E.add_(torch.arange(4)[:, None] + 100 * layer)
    for read, tally in zip(SurpriseTally.read(tallies), tallies, strict=True):
        assert torch.equal(read.counts_4, tally.counts_4)
        assert torch.equal(read.sums_4E, tally.sums_4E)
        assert (read.num_agree, read.pick_E[0]) == (tally.counts_4[2], tally.sums_4E[2, 0])
    assert tallies[2].chance == 23
    assert SurpriseTally.read([]) == []


def test_rows_add_up():
    once, twice = RoutingStats.zeros(BANKS), RoutingStats.zeros(BANKS)
    once.add(ROUTINGS, ROW)
    for _ in range(2):
        twice.add(ROUTINGS, ROW)
    for field in fields(RoutingStats):
        if field.name == "num_shared":
            continue
        assert torch.equal(2 * getattr(once, field.name), getattr(twice, field.name)), field.name
    assert twice.summary() == pytest.approx(once.summary())


def test_a_step_reads_nothing_from_the_device():
    # Meta tensors hold no numbers: whatever asked for one would raise.
    row = PackedRow(**{name: _meta(getattr(ROW, name)) for name in ROW.__slots__})
    banks = [ExpertBank(3, E, 2, "silu", RoutingRule(target_k=4.0)).to("meta")]
    routing = routing_of(torch.empty(12, E, device="meta"), _meta(ROUTINGS[0].active))
    RoutingStats.zeros(banks).add([routing], row)
    tally = SurpriseTally.of_layers(1, E, torch.device("meta"))[0]
    smk = SmkStep(rule=SmkRule(), grad_scale=1.0, tally=tally)
    table = torch.empty(12, E, device="meta")
    router_gradient(smk, table, RoutingTables(table, table, table > 0, row.router_mask[0]))


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("candidates", ["active", "all"])
@pytest.mark.parametrize("targets", ["single", "set"])
def test_the_tally_is_a_count_over_tokens_and_pairs(candidates, targets):
    generator = torch.Generator().manual_seed(3)
    surprise, logits = (torch.randn(40, E, generator=generator) for _ in range(2))
    active = torch.rand(40, E, generator=generator) < 0.5
    mask = torch.arange(40) % 5 != 0
    # Half of the gate's logits follow the targets, so that agreement is neither chance nor all.
    logits[::2] -= 2 * surprise[::2]
    rule = SmkRule(candidates=candidates, targets=targets, num_targets=3)
    tally = SurpriseTally.of_layers(1, E, torch.device("cpu"))[0]
    smk = SmkStep(rule=rule, grad_scale=1.0, tally=tally)
    weights = active.float()
    # In two parts, as two rows of a step.
    for part in (slice(0, 15), slice(15, 40)):
        tables = RoutingTables(*(x[part] for x in (weights, logits, active, mask)))
        router_gradient(smk, surprise[part], tables)
    seen = surprise * weights if candidates == "active" else surprise
    target = smk_targets(seen, active, mask, rule) > 0
    taught = [t for t in range(40) if target[t].any()]
    pick = {}
    for t in taught:
        allowed = [e for e in range(E) if active[t, e] or candidates == "all"]
        pick[t] = max(allowed, key=lambda e, t=t: float(logits[t, e]))
    agree = sum(bool(target[t, pick[t]]) for t in taught)
    pairs = [bool(target[s, pick[t]]) for t in taught for s in taught if s != t]
    assert tally.num_agree == agree
    assert tally.num_targets == len(taught) > 20
    assert tally.pick_E.tolist() == [list(pick.values()).count(e) for e in range(E)]
    assert tally.shuffled_agreements() / len(taught) == pytest.approx(sum(pairs) / len(pairs))
    # The same by rolling the targets over the taught tokens, every way but by none.
    rolls = [
        sum(bool(target[taught[(i + n) % len(taught)], pick[t]]) for i, t in enumerate(taught))
        for n in range(1, len(taught))
    ]
    assert tally.shuffled_agreements() == pytest.approx(sum(rolls) / len(rolls))
    assert agree > 1.3 * tally.shuffled_agreements()
    for e in range(E):
        mine = [float(seen[t, e]) for t in range(40) if mask[t] and active[t, e]]
        assert float(tally.active_surprise_E[e]) == pytest.approx(sum(mine), abs=1e-5)
        every = [float(seen[t, e]) for t in range(40) if mask[t]]
        assert float(tally.surprise_E[e]) == pytest.approx(sum(every), abs=1e-5)


def test_a_constant_gate_agrees_no_more_than_shuffled_targets_do():
    # Agreement of 0.96 from a gate that says the same for all tokens.
    surprise = torch.ones(100, E)
    surprise[:, 0] = 0
    surprise[:4, 0], surprise[:4, 1] = 1, 0
    logits = torch.zeros(100, E)
    logits[:, 0] = 9
    tally = SurpriseTally.of_layers(1, E, torch.device("cpu"))[0]
    smk = SmkStep(rule=SmkRule(candidates="all"), grad_scale=1.0, tally=tally)
    everything = torch.ones(100, E, dtype=torch.bool)
    tables = RoutingTables(torch.ones(100, E), logits, everything, everything[:, 0])
    router_gradient(smk, surprise, tables)
    assert float(tally.num_agree) == 96
    assert tally.shuffled_agreements() == pytest.approx(96)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_ties_are_where_the_gate_did_not_decide(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (20, 6), generator=generator).float()
    k = int(torch.randint(0, 7, (), generator=generator))
    order = logits.argsort(dim=-1, descending=True, stable=True)
    active = torch.zeros(20, 6, dtype=torch.bool).scatter(-1, order[:, :k], True)
    # Without ties, experts in another order would have given the same choice.
    backwards = logits.flip(-1).argsort(dim=-1, descending=True, stable=True)
    other = torch.zeros(20, 6, dtype=torch.bool).scatter(-1, backwards[:, :k], True).flip(-1)
    assert torch.equal(border_ties(logits, active), (active != other).any(-1))


def test_the_oracle_is_the_k_largest_norms_of_each_token():
    student = make_student(make_dense(), selection="top_k", target_k=3.0)
    banks, (row,) = student.banks(), make_rows((12, 9), 21)
    oracle = OracleStats.zeros(banks)
    inputs: dict[int, torch.Tensor] = {}

    def keep(i, _, arguments) -> None:
        inputs[i] = arguments[0][0]

    handles = [bank.register_forward_pre_hook(partial(keep, i)) for i, bank in enumerate(banks)]
    watching, recorded = oracle.watch(banks, row.router_mask[0]), recorded_routings(banks)
    with torch.no_grad(), watching, recorded as routings:
        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    for handle in handles:
        handle.remove()
    assert len(inputs) == 2
    got = oracle.layers()
    for i, bank in enumerate(banks):
        norms = reference.surprise(
            "magnitude",
            inputs[i].double(),
            bank.experts.gate_up_proj.detach().double(),
            bank.experts.down_proj.detach().double(),
            torch.zeros_like(inputs[i]).double(),
            F.silu,
        )
        shares, means = [], []
        for t in row.router_mask[0].nonzero().flatten().tolist():
            ours = routings[i].active[t].nonzero().flatten().tolist()
            best = norms[t].argsort(descending=True)[: len(ours)].tolist()
            shares.append(len(set(ours) & set(best)) / len(ours))
            means.append(sum(float(norms[t, e]) for e in ours) / len(ours))
        assert got["oracle_overlap"][i] == pytest.approx(sum(shares) / len(shares))
        assert got["oracle_chance"][i] == pytest.approx(3 / 8)
        assert got["expert_norm"][i] == pytest.approx(sum(means) / len(means), rel=1e-4)
    # A context that has ended counts nothing.
    with torch.no_grad():
        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    assert oracle.layers() == got


def test_tokens_without_experts_have_no_overlap():
    oracle = OracleStats.zeros(BANKS[:1])
    norms = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)
    active = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    oracle.add(0, norms, active, torch.tensor([True, True, True, True]))
    got = oracle.layers()
    assert got["oracle_overlap"][0] == pytest.approx((1 + 0 + 0.5) / 3)
    assert got["oracle_chance"][0] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert got["expert_norm"][0] == pytest.approx((1.5 + 0.5 + 1.5) / 3)


def test_a_random_gate_overlaps_at_chance_and_the_oracle_gate_always():
    generator = torch.Generator().manual_seed(5)
    norms = torch.rand(2000, E, generator=generator)
    k = torch.randint(1, E + 1, (2000, 1), generator=generator)
    at_random = torch.rand(2000, E, generator=generator).argsort(-1).argsort(-1) < k
    best = norms.argsort(-1, descending=True).argsort(-1) < k
    assert torch.equal(best.sum(-1), k.flatten())
    mask = torch.ones(2000, dtype=torch.bool)
    for active, wanted in ((at_random, None), (best, 1.0)):
        oracle = OracleStats.zeros(BANKS[:1])
        oracle.add(0, norms, active, mask)
        got = oracle.layers()
        chance = got["oracle_chance"][0]
        assert got["oracle_overlap"][0] == pytest.approx(wanted or chance, abs=0.02)


def test_unigram_level_is_the_loss_of_the_labels_frequencies():
    labels = torch.tensor([7] * 6 + [8] * 3 + [9])
    plain = -sum(math.log(n / 10) * n / 10 for n in (6, 3, 1))
    assert unigram_nll(labels) == pytest.approx(plain + 2 / 20)
    # The correction is for having counted on the judged text: on average it finds the source's own.
    probabilities = torch.tensor([0.5] + [0.02] * 25)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(probabilities, 300 * 200, replacement=True, generator=generator)
    levels = [unigram_nll(part) for part in draws.split(200)]
    source = float(torch.special.entr(probabilities.double()).sum())
    assert sum(levels) / 300 == pytest.approx(source, abs=0.01)


def test_evaluations_hold_levels_entropies_and_layers():
    student, teacher = make_student(make_dense()), make_dense()
    rows = make_rows((20, 13, 30, 40), 32)
    result, layers = evaluate_layers(student, HeldOut(teacher, rows), CONFIG.loss)
    assert result == evaluate(student, HeldOut(teacher, rows), CONFIG.loss)
    assert result.student_perplexity == pytest.approx(math.exp(result.student_nll))
    assert result.uniform_nll == math.log(64)
    probs, entropies = [], []
    with torch.no_grad():
        for row in rows:
            hidden = last_hidden_states(student, row.input_ids, **packed_kwargs(row))
            head = student.get_output_embeddings()
            assert isinstance(head, torch.nn.Linear)
            probs = head(hidden)[row.loss_mask].double().softmax(-1)
            entropies += torch.special.entr(probs).sum(-1).tolist()
    assert result.tau == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert len(layers["oracle_overlap"]) == len(layers["load"]) == 2
    assert result.oracle_overlap == pytest.approx(sum(layers["oracle_overlap"]) / 2)
    assert layers["num_tokens"] == sum(int(row.router_mask.sum()) for row in rows)


def test_flat_gates_tie_and_have_the_largest_entropy():
    student = make_student(make_dense(), selection="top_k", gate_init="zeros")
    config = change(CONFIG, router={"selection": "top_k"})
    result = evaluate(student, HeldOut(make_dense(), make_rows((20, 12), 32)), config.loss)
    assert result.tie_rate == 1
    assert result.gate_entropy == pytest.approx(math.log(8))


def test_statistics_are_about_choices():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (12, E), generator=generator).float()
    active = logits + torch.rand(12, E, generator=generator) > 0.5
    active[:, :S] = True
    rule = RoutingRule(target_k=4.0, num_shared=S)
    bank = ExpertBank(3, E, 2, "silu", rule)
    stats = RoutingStats.zeros([bank])
    stats.add([routing_of(logits, active)], ROW)
    layers, others = stats.layers(), range(S, E)
    load = [sum(int(active[t, e]) for t in COUNTED) for e in others]
    assert stats.counts()["load"] == [[len(COUNTED)] * S + load]
    assert layers["mean_k"] == [pytest.approx(S + sum(load) / len(COUNTED))]
    assert layers["load_entropy"] == [pytest.approx(entropy(load))]
    assert layers["max_load_share"] == [pytest.approx(max(load) / sum(load))]
    gates = [entropy([math.exp(logits[t, e]) for e in others]) for t in COUNTED]
    assert layers["gate_entropy"] == [pytest.approx(sum(gates) / len(COUNTED))]
    ties = 0
    for t in COUNTED:
        on = [float(logits[t, e]) for e in others if active[t, e]]
        off = [float(logits[t, e]) for e in others if not active[t, e]]
        ties += bool(on and off and min(on) == max(off))
    assert layers["tie_rate"] == [ties / len(COUNTED)]
    assert ties > 0


def test_the_oracles_overlap_is_that_of_the_others():
    norms, active = normal(20, E).abs(), normal(20, E, seed=1) > 0
    active[:, :S] = True
    everyone = torch.ones(20, dtype=torch.bool)
    bank = ExpertBank(3, E, 2, "silu", RoutingRule())
    got, alone = OracleStats.zeros([bank]), OracleStats.zeros([bank])
    got.add(0, norms, active, everyone, num_shared=S)
    alone.add(0, norms[:, S:], active[:, S:], everyone)
    for name in ("oracle_overlap", "oracle_chance"):
        assert got.layers()[name] == alone.layers()[name]
    some = [t for t in range(20) if active[t, S:].any()]
    means = [norms[t][active[t]].mean().item() for t in some]
    assert got.layers()["expert_norm"] == [pytest.approx(sum(means) / len(some))]
