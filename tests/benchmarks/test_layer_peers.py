"""Other projects' layers are timed if they are right, and a failing one leaves its reason."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from benchmarks import layer_libraries, layer_peers

CASE = {"device": "cpu", "tokens": [24, 16], "k": [3], "tuned": False, "repeats": 1, "smoke": True,
        "library": "written here"}  # fmt: skip


def looped(x, gate_up, down, index, weights):
    """Return the layer's output by loops over experts, as a peer would."""
    y = torch.zeros_like(x)
    for expert, (rows, columns) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = (x @ rows.T).chunk(2, dim=-1)
        y = y + (silu(gate) * up) @ columns.T * (weights * (index == expert)).sum(-1)[:, None]
    return y


def wrong(*inputs):
    """Return twice the layer's output."""
    return 2 * looped(*inputs)


def broken(*_):
    """Fail as a kernel fails."""
    raise RuntimeError("no such\n kernel")


def records_of(monkeypatch, *peers):
    """Return the records of some peers, by name and function."""
    written = {"written here": lambda *_, **__: iter(peers)}
    monkeypatch.setattr(layer_peers, "LIBRARIES", written)
    return list(layer_peers.Comparison(CASE).records())


def test_a_right_peer_is_timed_at_every_size_beside_the_dense_mlp(monkeypatch):
    parity, *timed = records_of(monkeypatch, ("looped", looped))
    assert set(parity["parity"]) == {"y", "x", "gate_up", "down", "weights"}
    assert max(parity["parity"].values()) < 1e-5
    assert [(row["peer"], row["tokens"], row["k"]) for row in timed] == [
        ("looped", 24, 3), ("looped", 16, 3)]  # fmt: skip
    assert all(row["peer_ms"] > 0 and row["mlp_ms"] > 0 for row in timed)
    ratios = layer_peers.ratios_of(timed)
    assert ratios["looped / MLP, 24 tokens, k=3"] == timed[0]["peer_ms"] / timed[0]["mlp_ms"]


@pytest.mark.parametrize(
    ("peer", "reason"),
    [(wrong, "parity, k = 3"), (broken, "RuntimeError: no such kernel"), ("absent", "absent")],
)
def test_a_wrong_or_failing_peer_is_a_reason_and_the_others_are_timed(monkeypatch, peer, reason):
    found = records_of(monkeypatch, ("bad", peer), ("looped", looped))
    reasons = [row["reason"] for row in found if "reason" in row]
    assert len(reasons) == 2
    assert all(told.startswith(reason) for told in reasons)
    assert [row["peer"] for row in found if "peer_ms" in row] == ["looped", "looped"]


def test_a_peer_gets_the_kernels_that_its_users_get(monkeypatch):
    seen = []

    def noting(*inputs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return looped(*inputs)

    torch.use_deterministic_algorithms(True)
    try:
        records_of(monkeypatch, ("noting", noting))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen
    assert not any(seen)


def test_candidates_that_are_not_wanted_are_not_tried_unless_all_are_unwanted():
    one, other = SimpleNamespace(configs=[1, 2, 3]), SimpleNamespace(configs=[5])
    module = SimpleNamespace(one=one, other=other, text="configs")
    layer_libraries.try_only(module, lambda config: config < 3)
    assert (one.configs, other.configs) == ([1, 2], [5])


@pytest.mark.parametrize(
    ("program", "seconds", "reason"),
    [
        ("print('{\"peer\": \"a\"}', flush=True); raise ValueError('broke')", 60, "broke"),
        ('import time; print(\'{"peer": "a"}\', flush=True); time.sleep(60)', 3, "more than 3 s"),
    ],
    ids=["broken", "late"],
)
def test_what_a_process_told_before_it_ended_badly_stays(monkeypatch, program, seconds, reason):
    monkeypatch.setattr(layer_peers, "command_of", lambda *_: [sys.executable, "-c", program])
    told, last = layer_peers.in_a_process(CASE, seconds)
    assert told == {"peer": "a"}
    assert last["peer"] == "written here"
    assert reason in last["reason"]


def test_a_process_that_ends_well_adds_no_reason(monkeypatch):
    lines = [{"peer": "a"}, {"library": "a", "ended": True}]
    program = "".join(f"print('{json.dumps(line)}');" for line in lines).replace("True", "true")
    monkeypatch.setattr(layer_peers, "command_of", lambda *_: [sys.executable, "-c", program])
    assert list(layer_peers.in_a_process(CASE, 60)) == [{"peer": "a"}]
