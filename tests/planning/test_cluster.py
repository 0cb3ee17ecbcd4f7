"""A plan for several GPUs: what they exchange, how long it takes, and what each of them holds."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tiny import make_dense
from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config
from tiny_onn.conversion.convert import convert
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.optim import owners_of
from tiny_onn.parallel import MESSAGE_BYTES
from tiny_onn.planning.cluster import (
    CALL_S,
    HOST_TENSOR_S,
    LINK_SHARE,
    MESSAGE_COPIES,
    NETWORK_HOP_S,
    NVLINK_HOP_S,
    TALLIES,
    Cluster,
    Trained,
    link_of,
    state_of_rank,
)
from tiny_onn.planning.pictures import time_stacks
from tiny_onn.planning.plan import plan
from tiny_onn.planning.render import render
from tiny_onn.planning.sources import find_device
from tiny_onn.teacher.load import teacher_for


def planned(gpus=8, *overrides, rows=None, device="H100", model="SmolLM2-135M", **cluster):
    """The plan of a run of a model on a number of GPUs, one row each unless `rows` says."""
    given = (f"train.rows_per_step={rows or gpus}", "teacher.dtype=bfloat16", "optim.name=adamw")
    config = load_config(None, "recommended", [*given, *overrides])
    return plan(config, model, device, cluster=Cluster(gpus=gpus, **cluster))


def step_s(plan):
    """The time of a step in documents."""
    seconds = plan.step_seconds(plan.packed)
    assert seconds is not None
    return seconds


def text_of(plan):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(plan))
    return console.export_text()


def test_one_gpu_is_planned_as_without_a_cluster():
    config = load_config(None, "recommended", ["teacher.dtype=bfloat16"])
    alone = plan(config, "SmolLM2-135M", "H100")
    assert (
        alone.as_dict() == plan(config, "SmolLM2-135M", "H100", cluster=Cluster(gpus=1)).as_dict()
    )
    assert alone.collectives == ()
    assert "cluster" not in alone.as_dict()
    assert "Communication" not in text_of(alone)
    assert alone.share_of_linear(alone.packed) == 1


@pytest.mark.parametrize(
    "overrides", [(), ("router.objective=none",), ("optim.master_dtype=bfloat16",)], ids=str
)
def test_gradients_that_are_exchanged_are_those_of_the_student(overrides, tmp_path):
    dense = make_dense("qwen3", dtype="bfloat16")
    given = ("teacher.dtype=bfloat16", "train.compile=false", "train.device=cpu")
    sizes = ("experts.num_experts=4", "router.target_k=2", "train.rows_per_step=2")
    config = load_config(None, None, [*given, *sizes, *overrides])
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator)
    for bank in student.banks():
        bank.router.requires_grad_(config.router.objective != "none")
    training = assemble(config, student, teacher_for(dense, config.teacher))
    groups = training.optimizer.param_groups
    expected = sum(p.nbytes for group in groups for p in group["params"])
    dense.config.save_pretrained(tmp_path)
    cluster = Cluster(gpus=2)
    (found,) = plan(config, tmp_path, "H100", cluster=cluster, document_tokens=64).collectives
    assert found.bytes == expected


def test_an_all_reduce_takes_the_time_of_a_ring():
    (one_node,) = planned(8).collectives
    # Tensors fill messages of 64 MiB as far as whole ones do.
    assert one_node.bytes / MESSAGE_BYTES <= one_node.calls < 1.2 * one_node.bytes / MESSAGE_BYTES
    transfer_s = 2 * 7 / 8 * one_node.bytes / (LINK_SHARE * 450e9)
    calls_s = one_node.calls * (CALL_S + 14 * NVLINK_HOP_S)
    # Experts' two projections, mean outputs and both parts of the gate; all share messages.
    host_s = HOST_TENSOR_S * 30 * (5 + TALLIES)
    copies_s = MESSAGE_COPIES * one_node.bytes / 3350e9
    assert one_node.seconds == pytest.approx(transfer_s + calls_s + copies_s + host_s)


def test_large_tensors_travel_alone_and_are_not_copied():
    (alone,) = planned(8, "experts.compensation=none", model="Qwen3-8B").collectives
    wires_s = 2 * 7 / 8 * alone.bytes / (LINK_SHARE * 450e9)
    wires_s += alone.calls * (CALL_S + 14 * NVLINK_HOP_S)
    small = alone.bytes - 4 * 3 * 36 * 12_288 * 4096
    copies_s = MESSAGE_COPIES * small / 3350e9
    assert alone.seconds - wires_s == pytest.approx(HOST_TENSOR_S * 36 * 7 + copies_s, rel=1e-3)


def test_nodes_add_the_time_of_their_network():
    (one,), (four,) = planned(8).collectives, planned(32).collectives
    hops_s = four.calls * 6 * NETWORK_HOP_S
    network_s = 2 * 3 / 4 * four.bytes / (LINK_SHARE * 3200e9 / 8) + hops_s
    assert four.bytes == one.bytes
    assert four.seconds - one.seconds == pytest.approx(network_s)
    (slow,) = planned(32, network_gbps=320.0).collectives
    assert slow.seconds - four.seconds == pytest.approx(
        9 * 2 * 3 / 4 * four.bytes / (LINK_SHARE * 3200e9 / 8)
    )


def test_each_gpu_computes_its_rows_and_the_exchange_comes_on_top():
    one, eight = planned(1, rows=8), planned(8)
    assert eight.packed.total == one.packed.total / 8
    assert eight.steps == one.steps
    alone, together = step_s(one), step_s(eight)
    assert together == pytest.approx(alone / 8 + eight.communication_s)
    assert 0.9 < alone / 8 / together < 1
    assert eight.share_of_linear(eight.packed) == pytest.approx(alone / 8 / together)
    assert eight.tokens_per_s(eight.packed) == pytest.approx(8 * 32_768 / together)


def test_rows_of_a_gpu_decide_its_memory():
    # A GPU with two rows keeps gradients through its passes; one with a row has none yet.
    assert planned(8).peak_bytes == planned(1).peak_bytes
    assert planned(4, rows=8).peak_bytes == planned(1, rows=2).peak_bytes


def test_sharded_optimizer_state_lies_whole_on_one_gpu_each():
    plain, sharded = planned(4), planned(4, shard="optimizer")
    whole = plain.peak.parts["optimizer state"]
    held = sharded.peak.parts["optimizer state"]
    assert whole / 4 <= held < 1.05 * whole / 4
    assert plain.peak_bytes - sharded.peak_bytes == whole - held
    gradients, weights = sharded.collectives
    assert gradients == plain.collectives[0]
    assert weights.bytes == gradients.bytes - plain.peak.parts["gates"]
    # Experts' weights and their mean outputs in each of 30 layers.
    assert weights.calls == 30 * (2 + 1)
    # A tensor is not cut, so that more GPUs than tensors hold no less.
    held = [planned(n, shard="optimizer").peak.parts["optimizer state"] for n in (64, 256)]
    gates = 2 * plain.peak.parts["gates"]
    assert held[0] == held[1] == gates + 8 * 2 * 1536 * 576


def test_paged_state_takes_no_memory_of_a_gpu():
    paged = "optim.name=paged_adamw8bit"
    whole, sharded = planned(4, paged), planned(4, paged, shard="optimizer")
    assert sharded.peak.parts == whole.peak.parts


def test_full_sharding_keeps_a_share_and_gathers_layers():
    plain, full = planned(8), planned(8, shard="full")
    p, (teacher, student, gradients, others) = full.parameters, full.collectives
    experts = gradients.bytes
    # Masters are float32, the teacher is bfloat16.
    assert experts == 4 * p.dense_mlps
    assert others.bytes == plain.collectives[0].bytes - experts
    assert (teacher.bytes, student.bytes) == (2 * p.dense_mlps, 2 * experts)
    for name in ("backbone weights", "gates", "saved activations"):
        assert full.peak.parts[name] == plain.peak.parts[name]
    assert full.peak.parts["teacher's weights"] == 2 * p.dense_mlps // 8
    small = plain.peak.parts["expert weights to train"] - experts
    assert full.peak.parts["expert weights to train"] == experts // 8 + small
    assert full.peak.parts["optimizer state"] < plain.peak.parts["optimizer state"] / 7
    assert full.peak.parts["gathered weights and gradients"] == 4 * experts // 30
    assert full.peak_bytes < plain.peak_bytes
    # A row more needs all of them again, but for the gradients that are added up once.
    assert planned(8, rows=16, shard="full").communication_s == pytest.approx(
        2 * full.communication_s - others.seconds
    )


def test_full_sharding_leaves_a_quantised_teacher_whole():
    nf4 = "teacher.quantization=nf4"
    plain, full = planned(8, nf4), planned(8, nf4, shard="full")
    assert full.peak.parts["teacher's weights"] == plain.peak.parts["teacher's weights"]
    assert [part.name for part in full.collectives][:1] == ["all-gather of the student"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_state_is_planned_where_the_optimizer_puts_it(num_ranks):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 50, (12,), generator=generator).tolist()
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    held = [0] * num_ranks
    for parameter, rank in owners_of(parameters, num_ranks).items():
        held[rank] += 8 * parameter.numel()
    tensors = [Trained(4 * size, 8 * size) for size in sizes]
    assert state_of_rank(tensors, num_ranks) == max(held)
    assert state_of_rank([*tensors, Trained(4, 8, True)], num_ranks) == max(held) + 8


@pytest.mark.parametrize(
    ("name", "rate"),
    [("H100", 450), ("NVIDIA A100-SXM4-80GB", 300), ("RTX 4060 Ti", 16), ("48,91,864", 32)],
)
def test_links_are_known_by_the_device_s_name(name, rate):
    device = find_device("A100" if "NVIDIA" in name else name, "bfloat16")
    device = type(device)(**{**{f: getattr(device, f) for f in device.__slots__}, "name": name})
    assert link_of(device).gb_s == rate


def test_a_card_on_pcie_has_no_nvlink():
    device = find_device("H100", "bfloat16")
    fields = {name: getattr(device, name) for name in device.__slots__}
    assert link_of(type(device)(**{**fields, "name": "NVIDIA H100 PCIe"})).gb_s == 32


MISTAKES = [
    (["--gpus", "0"], "--gpus: got 0, expected an integer >= 1"),
    (["--gpus", "2"], "train.rows_per_step: got 1, expected a multiple of the 2 GPUs"),
    (["--gpus", "12"], "--gpus: got 12, expected a multiple of the 8 GPUs of a node"),
    (["--gpus", "2", "--gpus-per-node", "0"], "--gpus-per-node: got 0, expected an integer"),
    (["--gpus", "2", "--network-gbps", "0"], "--network-gbps: got 0, expected a node's Gbit/s"),
    (
        ["--gpus", "3", "--shard", "full", "--set", "train.rows_per_step=3"],
        'train.shard: got "full" with 3 processes and 32 experts',
    ),
    (
        ["--gpus", "2", "--shard", "full", "--set", "optim.name=adafactor"],
        'optim.name: got "adafactor" with train.shard = "full"',
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistake_is_told_in_one_line(arguments, message, capsys):
    assert cli.main(["plan", "--preset", "model-card", "--device", "A100", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_several_cpus_are_refused(capsys):
    assert cli.main(["plan", "--device", "cpu", "--gpus", "2"]) == 2
    assert "--gpus: got 2 with a CPU as the device, expected 1" in capsys.readouterr().err


def test_json_text_and_page_tell_the_speed(tmp_path, capsys):
    page = tmp_path / "plan.html"
    arguments = ["plan", "--preset", "model-card", "--device", "H100", "--gpus", "16"]
    arguments += ["--set", "train.rows_per_step=16", "--html", str(page)]
    assert cli.main([*arguments, "--json"]) == 0
    cluster = json.loads(capsys.readouterr().out)["cluster"]
    assert (cluster["nodes"], cluster["rows_per_gpu"]) == (2, 1)
    assert cluster["link"]["gb_s"] == 450
    seconds = sum(part["seconds"] for part in cluster["collectives"])
    assert cluster["communication_s"] == pytest.approx(seconds)
    assert cli.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    speed = f"{cluster['tokens_per_s']['packed']:,.0f} tokens"
    share = f"{cluster['share_of_linear']['packed']:.1%} of linear"
    for words in ("16 x H100", "all-reduce of gradients", "2 nodes", f"{speed}/s", share):
        assert words in text
    html = page.read_text()
    assert f"{speed} a second together, {share}" in html
    assert "16 x H100" in html


def test_bars_of_time_hold_the_exchange():
    found = planned(8, shard="optimizer")
    for bar, step in zip(
        time_stacks(found).bars.values(), (found.whole_rows, found.packed), strict=True
    ):
        assert sum(bar.values()) == pytest.approx(found.step_seconds(step))
        assert bar["broadcast of experts"] > 0


@pytest.mark.parametrize(("shard", "shares"), [("none", 1), ("optimizer", 8), ("full", 8)])
def test_gpus_that_divide_the_experts_divide_the_products_of_muon(shard, shares):
    alone = planned(1, "optim.name=muon").packed
    divided = planned(8, "optim.name=muon", shard=shard).packed
    assert alone.update > 0
    assert divided == replace(alone, update=alone.update / shares)
