"""A plan's numbers against the modules, the model card, and steps that really run."""

import io
import json
import sys
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny import make_dense, make_rows, model_bytes
from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config
from tiny_onn.conversion.convert import convert
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model import expert_path
from tiny_onn.model.expert_path import set_objective
from tiny_onn.planning.costs import count_parameters, meta_models
from tiny_onn.planning.memory import nf4_bytes
from tiny_onn.planning.plan import DOCUMENT_TOKENS, EFFICIENCY, card_lines, plan
from tiny_onn.planning.render import render
from tiny_onn.planning.sources import GIB, Device, find_device, load_shape
from tiny_onn.teacher.load import teacher_for
from tiny_onn.teacher.quantize import quantize_nf4

SHAPES = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B", "SmolLM2-135M", "Llama-3.2-1B")
DEVICES = ("RTX 3060", "RTX 4060 Ti", "RTX 4090", "RTX 5090", "A100", "H100", "H200")
CPU = Device(name="x", type="cpu", memory_bytes=GIB, bf16_tflops=1.0, bandwidth_gb_s=10.0)
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
ROW_TOKENS = 512


def card_plan(device="RTX 3060", *overrides):
    """The model card's plan."""
    config = load_config(None, "model-card", ["teacher.dtype=bfloat16", *overrides])
    return plan(config, config.teacher.path, device)


def settings(*overrides):
    """Settings of a small step that runs without the compiler."""
    rows = (f"data.row_tokens={ROW_TOKENS}", "train.compile=false", "train.device=cpu")
    experts = ("experts.num_experts=8", "router.target_k=4", "train.expert_path=dense")
    return load_config(None, None, ["teacher.dtype=bfloat16", *rows, *experts, *overrides])


def test_the_sparse_path_keeps_hidden_activations_where_nothing_is_computed_again(monkeypatch):
    kept = {}
    entry = {"cuda bfloat16": {"share": 0.0, "sparse": {"share": 0.67}}}
    monkeypatch.setattr(expert_path, "read_crossover", lambda: entry)
    # By `auto`, k / E is 4 / 8, which is below the measured share, and then all of them.
    for path, k in (("dense", 4), ("sparse", 4), ("auto", 4), ("auto", 8)):
        for mode in ("none", "layer"):
            overrides = (f"train.expert_path={path}", f"train.checkpointing={mode}")
            rule = ("smk.candidates=active", f"router.target_k={k}")
            config = settings(*overrides, *rule, "train.device=cuda")
            planned = plan(config, "SmolLM2-135M", "H100")
            kept[path, k, mode] = planned.peak.parts["saved activations"]
    assert kept["sparse", 4, "none"] == kept["auto", 4, "none"] > kept["dense", 4, "none"]
    assert kept["auto", 8, "none"] == kept["dense", 4, "none"]
    assert len({kept[path, k, "layer"] for path, k, _ in kept}) == 1


def small_step(family, config):
    """Everything that `distill_step` takes: a random model of the family and packed rows."""
    dense = make_dense(family, dtype=config.teacher.dtype, tie_word_embeddings=True, **SIZES)
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator)
    set_objective(student.banks(), config)
    training = assemble(config, student, teacher_for(dense, config.teacher))
    rows = make_rows([ROW_TOKENS // 2] * 2 * config.train.rows_per_step, ROW_TOKENS)
    return student, training.teacher, training.optimizer, rows, training.config


def small_plan(family, config, tmp_path):
    """The plan of the same model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family, "tie_word_embeddings": True, **SIZES}))
    return plan(config, path, CPU, document_tokens=ROW_TOKENS // 2)


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors alive, each storage once, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key)
            self.peak = max(self.peak, sum(self.sizes.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((result, args)):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


class MatrixProducts(TorchDispatchMode):
    """FLOPs of all matrix products. Torch's own counter stumbles over torch.func in a backward."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left = args[1 if "add" in name else 0]
            self.flops += 2 * result.numel() * left.shape[-1]
        return result


def test_parameters_of_the_card_s_student():
    p = card_plan().parameters
    assert p.embeddings == 151_936 * 1024
    assert p.output_head == 0
    assert p.attention == 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024)
    assert p.norms == 28 * (2 * 1024 + 2 * 128) + 1024
    assert p.one_expert == 294_912
    assert p.experts == 896 * 294_912
    assert (p.gate_weights, p.gate_biases, p.budget_thresholds) == (28 * 1024 * 32, 896, 28)
    assert p.dense_total == 596_049_920
    assert p.student_total == 596_968_320
    assert p.trainable == p.experts + 28 * 1024 * 32 + 896


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_sum_to_the_modules(shape):
    config = load_config(None, None, ["teacher.dtype=bfloat16"])
    dense, student = meta_models(config, load_shape(shape, config.teacher)[1])
    p = count_parameters(dense, student)
    assert p.dense_total == sum(q.numel() for q in dense.parameters())
    assert p.student_total == sum(q.numel() for q in student.parameters())
    assert all(q.is_meta for q in student.parameters())


def test_parts_of_an_untied_head_with_attention_biases():
    config = settings()
    dense_config = make_dense("qwen2", tie_word_embeddings=False, **SIZES).config
    dense, student = meta_models(config, dense_config)
    p = count_parameters(dense, student)
    assert p.output_head == p.embeddings == 2048 * 64
    assert p.dense_total == sum(q.numel() for q in dense.parameters())
    assert p.student_total == sum(q.numel() for q in student.parameters())


def test_card_column_and_true_column():
    lines = {line.quantity: (line.card, line.true) for line in card_lines(card_plan())}
    assert lines == {
        "shared backbone": ("243.66 M", "331.81 M"),
        "experts and gates": ("265.16 M", "265.16 M"),
        "one expert": ("0.295 M", "0.295 M"),
        "dense total": ("0.508 B", "596.05 M"),
        "student total": ("0.509 B", "596.97 M"),
        "dense MLP, FLOPs per token and layer": ("6.29 M", "18.87 M"),
        "16 experts and gate, the same": ("3.15 M", "9.50 M"),
        "MLP FLOPs saved": ("49.92 %", "49.65 %"),
        "all matmul FLOPs saved": ("-", "22.01 %"),
    }


def test_card_s_backbone_is_the_true_one_with_half_of_the_attention():
    p = card_plan().parameters
    assert p.backbone - p.attention / 2 == pytest.approx(243.66e6, rel=4e-4)


def test_card_column_belongs_to_the_card_s_student_alone():
    assert card_lines(card_plan("H100", "router.target_k=8")) == []
    assert card_lines(card_plan("H100", "teacher.path=Qwen3-1.7B")) == []


def test_forward_flops_of_one_row_of_32k():
    planned = card_plan()
    token, tokens = planned.token, 32_768
    row_tera = {
        "scores": token.attention_scores_row * tokens / 1e12,
        "ffn": token.ffn_dense * tokens / 1e12,
        "projections": token.attention_projections * tokens / 1e12,
        "head": token.head * tokens / 1e12,
    }
    expected = {"scores": 123.1, "ffn": 17.3, "projections": 11.5, "head": 10.2}
    assert row_tera == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.checkpointing=none",),
        ("train.checkpointing=selective", "train.ffn_chunk_tokens=64"),
        ("router.objective=none", "train.rows_per_step=2"),
        ("router.objective=task", "router.selection=top_k", "experts.weighting=softmax"),
        ("optim.name=muon",),
    ],
    ids=" ".join,
)
def test_matmul_flops_are_those_of_a_step(overrides, tmp_path):
    config = settings("smk.surprise=gain", *overrides)
    arguments = small_step("qwen3", config)
    with MatrixProducts() as counter:
        distill_step(*arguments)
    planned = small_plan("qwen3", config, tmp_path)
    tokens = ROW_TOKENS * config.train.rows_per_step
    scores = planned.token.attention_scores_documents * tokens
    # Attention has a kernel of its own: forward, recomputation, the teacher's, and 2.5 backward in
    # the layers but the first.
    passes = 3 if config.train.checkpointing == "layer" else 2
    layers = planned.sizes.layers
    attention = scores * (passes + 2.5 * (layers - 1) / layers)
    assert planned.packed.total - attention == counter.flops


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3", ()),
        ("qwen3", ("train.checkpointing=selective", "train.ffn_chunk_tokens=64")),
        ("llama", ("teacher.dtype=float32", "teacher.placement=separate")),
        ("qwen3", ("train.checkpointing=none",)),
        ("qwen3", ("train.checkpointing=none", "train.ffn_chunk_tokens=64")),
        ("qwen3", ("smk.surprise=input", "train.rows_per_step=2")),
        ("llama", ("router.objective=task", "experts.weighting=softmax")),
        ("qwen3", ("router.objective=none", "optim.master_dtype=bfloat16")),
        ("llama", ("smk.surprise=magnitude", "optim.name=adafactor")),
        ("qwen3", ("train.checkpointing=none", "optim.name=muon")),
        ("qwen3", ("smk.surprise=parameters", "teacher.quantization=nf4")),
        ("llama", ("teacher.quantization=nf4", "teacher.placement=separate")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_peak_memory_is_that_of_the_tensors_alive_in_a_step(family, overrides, tmp_path):
    config = settings(*overrides)
    planned = small_plan(family, config, tmp_path)
    assert planned.peak.total == pytest.approx(live_peak(family, config), rel=0.03)


def test_peak_memory_of_many_layers_whose_states_are_compared(tmp_path, monkeypatch):
    for name, value in {"num_hidden_layers": 24, "vocab_size": 512}.items():
        monkeypatch.setitem(SIZES, name, value)
    step = ("loss.chunk_tokens=64", "train.rows_per_step=2")
    config = settings("loss.states_coef=4.0", "smk.surprise=gain", *step)
    planned = small_plan("qwen3", config, tmp_path)
    assert planned.peak.name.startswith("backward of layer 23")
    assert planned.peak.total == pytest.approx(live_peak("qwen3", config), rel=0.03)


@pytest.mark.parametrize(("width", "experts"), [(64, 8), (8, 48), (192, 1)])
@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_the_copies_of_a_step_of_muon_are_counted(
    width, experts, master_dtype, tmp_path, monkeypatch
):
    for name, value in {"num_hidden_layers": 12, "intermediate_size": width * experts}.items():
        monkeypatch.setitem(SIZES, name, value)
    monkeypatch.setattr(sys.modules[__name__], "ROW_TOKENS", 32)
    muon = ("optim.name=muon", f"optim.master_dtype={master_dtype}")
    config = settings(*muon, f"experts.num_experts={experts}", "router.target_k=1")
    planned = small_plan("llama", config, tmp_path)
    assert planned.peak.name == "update"
    assert planned.peak.total == pytest.approx(live_peak("llama", config), rel=0.02)


def live_peak(family, config):
    """The peak of the tensors that are alive in a step of a small model."""
    arguments = small_step(family, config)
    student, teacher, optimizer = arguments[:3]
    distill_step(*arguments)
    live = LiveTensors()
    for tensor in (*student.parameters(), *teacher.parameters()):
        live.add(tensor)
    for tensor in tree_leaves([*optimizer.state.values()]):
        if isinstance(tensor, torch.Tensor):
            live.add(tensor)
    with live:
        distill_step(*arguments)
    return live.peak


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_bytes_are_those_of_quantised_weights(double_quant):
    dense = make_dense("llama", **SIZES)
    linears = [
        module
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    expected = sum(nf4_bytes(tuple(m.weight.shape), double_quant=double_quant) for m in linears)
    # Each weight brings the 16 levels, doubly quantised also 256 levels and an offset.
    tables = len(linears) * (16 * 4 + (256 * 4 + 4 if double_quant else 0))
    before = model_bytes(dense) - sum(m.weight.nbytes for m in linears)
    quantize_nf4(dense, only_mlps=False, double_quant=double_quant)
    assert model_bytes(dense) - before == expected + tables


def test_eight_bit_state_and_bfloat16_masters_save_what_they_promise():
    plain = card_plan("H100", "optim.name=adamw", "optim.master_dtype=float32").peak.parts
    small = card_plan("H100", "optim.name=adamw8bit", "optim.master_dtype=bfloat16").peak.parts
    experts = 28 * 32 * 294_912
    assert plain["expert weights to train"] == 4 * experts
    assert small["expert weights to train"] == 2 * experts
    assert plain["optimizer state"] - small["optimizer state"] == pytest.approx(
        5.97 * experts, rel=0.01
    )


def test_memory_grows_by_the_saved_inputs_with_the_layers():
    short, long = (
        card_plan("H100", f"data.row_tokens={tokens}").peak.total for tokens in (8192, 16_384)
    )
    assert long > short
    assert card_plan("H100").fits
    assert not card_plan("RTX 3060", "train.checkpointing=none").fits


def test_time_is_flops_over_rate():
    config = load_config(None, "model-card", ["teacher.dtype=bfloat16", "train.tokens=65537"])
    planned = plan(config, "Qwen3-0.6B", "A100", efficiency=0.5)
    assert planned.steps == 3
    assert planned.seconds(planned.whole_rows) == 3 * planned.whole_rows.total / (312e12 * 0.5)
    assert planned.packed.total < planned.whole_rows.total / 3
    slow = replace(config, teacher=replace(config.teacher, dtype="float32"))
    planned = plan(slow, "Qwen3-0.6B", "A100")
    assert planned.seconds(planned.packed) is None


@pytest.mark.parametrize("name", DEVICES)
def test_devices_name_their_source(name):
    device = find_device(name.lower(), "bfloat16")
    assert device.name == name
    assert device.source.startswith("NVIDIA")
    # A GPU reads its whole memory 15 to 60 times a second and multiplies 70 to 600 times a byte.
    assert 15 < device.bandwidth_gb_s * 1e9 / device.memory_bytes < 60
    assert 70 < device.bf16_tflops * 1e3 / device.bandwidth_gb_s < 600


def test_device_given_by_numbers():
    device = find_device("48,91.5,864", "bfloat16")
    assert (device.memory_bytes, device.bf16_tflops) == (48 * GIB, 91.5)
    assert device.bandwidth_gb_s == 864


def test_cpu_is_this_machine():
    device = find_device("cpu", "float32")
    assert device.type == "cpu"
    assert device.memory_bytes > GIB
    assert device.bf16_tflops > 0
    assert "measured now" in device.source


def test_teacher_by_name_hub_id_file_and_folder(tmp_path):
    config = load_config(None, None, ["teacher.dtype=bfloat16"])
    _, by_name = load_shape("qwen3-0.6b", config.teacher)
    _, by_hub_id = load_shape("Qwen/Qwen3-0.6B", config.teacher)
    by_hub_id.save_pretrained(tmp_path)
    _, by_folder = load_shape(tmp_path, config.teacher)
    _, by_file = load_shape(str(tmp_path / "config.json"), config.teacher)
    for other in (by_hub_id, by_folder, by_file):
        assert (other.hidden_size, other.head_dim, other.num_hidden_layers) == (1024, 128, 28)
    assert by_name.tie_word_embeddings
    assert load_shape("embedded", config.teacher)[0] == "SmolLM2-135M"


MISTAKES = [
    (["--device", "RTX 9090"], "--device: got RTX 9090, expected auto, cpu, RTX 3060"),
    (["--device", "1,2,x"], "--device: got 1,2,x, expected three numbers > 0"),
    (["--device", "1,0,1"], "--device: got 1,0,1, expected three numbers > 0"),
    (["--device", "A100", "--efficiency", "30"], "--efficiency: got 30.0, expected a number > 0"),
    (["--device", "A100", "--document-tokens", "0"], "--document-tokens: got 0"),
    (["--device", "A100", "--tokens", "0"], "train.tokens: got 0"),
    (["--device", "A100", "--set", "teacher.path=/nowhere"], "teacher.path: got /nowhere"),
    (["--device", "A100", "--set", "experts.num_experts=31"], "expected a divisor of 1536"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistake_is_told_in_one_line(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_file_that_is_no_configuration_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", "[]", "{}", '{"model_type": "nothing"}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^teacher\.path: got .*config\.json"):
            load_shape(path, load_config(None, None, []).teacher)


def test_json_holds_every_number_and_nothing_else(capsys):
    arguments = ["plan", "--preset", "model-card", "--device", "A100", "--tokens", "32768"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    planned = card_plan("A100", "train.tokens=32768")
    assert result == json.loads(json.dumps(planned.as_dict()))
    parts = result["memory"]["parts_bytes"]
    assert (
        sum(parts.values()) + result["memory"]["runtime_bytes"] == result["memory"]["total_bytes"]
    )
    assert result["time"]["steps"] == 1
    assert Counter(line["section"] for line in result["card"])["2"] == 5


def test_tables_show_card_flops_memory_and_time():
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(card_plan("RTX 4090")))
    text = console.export_text()
    for words in (
        "243.66 M",
        "331.81 M",
        "attention scores",
        "optimizer state",
        "GiB",
        "15,259 steps",
        "without conversion and evaluations",
        "Disk: 8.1 GB, for 4 checkpoints of 1.6 GB each with optimizer state, and the student of",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ((), 4),
        (("train.keep_checkpoints=1",), 3),
        (("train.tokens=10_000_000",), 1),
        (("train.tokens=10_000_001", "train.eval_every_tokens=0"), 2),
        (("train.tokens=10_000_000", "train.save_every_tokens=0"), 1),
    ],
)
def test_checkpoints_at_once_are_those_kept_the_best_and_the_one_in_writing(overrides, number):
    assert card_plan("A100", *overrides).disk.num_checkpoints == number


@pytest.mark.parametrize(("row_tokens", "shown"), [(1024, False), (4096, True)])
def test_documents_as_long_as_a_row_are_shown_once(row_tokens, shown):
    config = load_config(None, "demo", [f"data.row_tokens={row_tokens}"])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(plan(config, "HuggingFaceTB/SmolLM2-135M", "RTX 4090")))
    text = console.export_text()
    assert f"one document of {row_tokens:,}" in text
    assert ("documents of 2,048" in text, ", or " in text.partition("Time of")[2]) == (shown, shown)


def test_help_names_the_devices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"(default: {EFFICIENCY})" in text
    assert f"(default: {DOCUMENT_TOKENS})" in text
    assert all(name in text for name in DEVICES)
