"""Experts in 4 and 8 bits: what a number becomes, what computes with it, what is refused."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tiny import make_dense, make_ids, make_student
from tiny_onn.config.schema import RunConfig
from tiny_onn.device import load_bitsandbytes
from tiny_onn.errors import UserError
from tiny_onn.model.expert_path import set_objective
from tiny_onn.model.expert_weights import KINDS
from tiny_onn.model.experts import Execution, expert_norms
from tiny_onn.model.quantized_experts import (
    BLOCK_SIZE,
    int8_per_row,
    quantize_experts,
    stored_bytes,
)
from tiny_onn.model.student import TinyOnnForCausalLM

pytestmark = pytest.mark.usefixtures("quiet")
bitsandbytes = load_bitsandbytes("tests")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ("cpu", CUDA) if torch.cuda.is_available() else ("cpu",)
each_device = pytest.mark.parametrize("device", DEVICES)
each_format = pytest.mark.parametrize("stored_as", ["nf4", "fp4", "int8"])
each_selection = pytest.mark.parametrize("selection", ["top_k", "budget", "oracle"])
# bitsandbytes' table of NF4; QLoRA, arXiv 2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def student_of(device="cpu", dtype="float32", **changes) -> TinyOnnForCausalLM:
    student = make_student(make_dense(dtype=dtype), **changes)
    return student.to(device).eval()  # pyright: ignore[reportArgumentType]


def weights(student) -> list[torch.Tensor]:
    return [getattr(bank.experts, kind).clone() for bank in student.banks() for kind in KINDS]


def restored(student, stored_as) -> TinyOnnForCausalLM:
    """The same student with the dequantised weights as plain ones."""
    quantized, plain = copy.deepcopy(student), copy.deepcopy(student)
    quantized.quantize_experts(stored_as)
    values = iter(weights(quantized))
    for bank in plain.banks():
        for kind in KINDS:
            bank.experts.get_parameter(kind).data.copy_(next(values))
    return plain


def test_int8_is_the_nearest_multiple_of_a_127th_of_the_rows_largest_number():
    weight = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = 0
    stored, scale = int8_per_row(weight)
    assert stored.dtype == torch.int8
    for e in range(3):
        for m in range(4):
            row = weight[e, m].tolist()
            step = max(map(abs, row)) / 127
            assert scale[e, m, 0].item() == pytest.approx(step)
            nearest = [0 if step == 0 else round(number / step) for number in row]
            assert stored[e, m].tolist() == nearest


@each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_are_read_as_integer_times_scale_rounded_to_the_backbones_format(
    device, dtype
):
    student = student_of(device, dtype)
    before = weights(student)
    student.quantize_experts("int8")
    for weight, read in zip(before, weights(student), strict=True):
        stored, scale = int8_per_row(weight)
        assert read.dtype == getattr(torch, dtype)
        assert torch.equal(read, (stored.float() * scale).to(read.dtype))


@each_device
def test_nf4_weights_are_the_nearest_levels_of_their_blocks_of_64_row_after_row(device):
    # An expert's `down_proj` has rows of 6 numbers, so that its blocks cross rows.
    student = student_of(device)
    before = weights(student)
    student.quantize_experts("nf4")
    levels = torch.tensor(NF4, device=device)
    for weight, read in zip(before, weights(student), strict=True):
        for expert, found in zip(weight, read, strict=True):
            blocks = expert.reshape(-1, BLOCK_SIZE)
            largest = blocks.abs().amax(1, keepdim=True)
            nearest = (blocks / largest)[..., None].sub(levels).abs().argmin(-1)
            expected = levels[nearest] * largest
            torch.testing.assert_close(found.reshape(-1, BLOCK_SIZE), expected)


@each_device
@each_format
@each_selection
@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_every_way_to_call_a_layer_computes_with_the_dequantised_weights(
    device, stored_as, selection, compensation
):
    student = student_of(device, selection=selection, compensation=compensation)
    plain = restored(student, stored_as)
    student.quantize_experts(stored_as)
    for path in ("dense", "grouped"):
        for bank in (*student.banks(), *plain.banks()):
            bank.set_execution(Execution(path=path))
        for ids in (make_ids().to(device), make_ids(1, 1).to(device)):
            with torch.no_grad():
                expected = plain(input_ids=ids).logits
                torch.testing.assert_close(student(input_ids=ids).logits, expected)
            # With gradients another path computes.
            torch.testing.assert_close(
                student(input_ids=ids).logits.detach(), plain(input_ids=ids).logits.detach()
            )
    x = torch.randn(5, 32, device=device)
    with torch.no_grad():
        for ours, theirs in zip(student.banks(), plain.banks(), strict=True):
            torch.testing.assert_close(expert_norms(ours, x), expert_norms(theirs, x))


@each_device
@each_format
def test_generation_writes_what_the_dequantised_student_writes(device, stored_as):
    student = student_of(device)
    student.set_attn_implementation("sdpa")
    plain = restored(student, stored_as)
    student.quantize_experts(stored_as)
    ids = make_ids(1, 4).to(device)
    options: Any = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, **options)  # pyright: ignore[reportAttributeAccessIssue]
    student.round_experts()
    written = student.generate(ids, **options)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(written, expected)


@each_format
def test_a_cpu_dequantises_the_active_experts_alone_and_keeps_none(stored_as, monkeypatch):
    student = student_of(selection="top_k", target_k=2.0)
    student.quantize_experts(stored_as)
    sizes = []
    for bank in student.banks():
        for kind in KINDS:
            chain: Any = bank.experts.parametrizations
            back = chain[kind][0]
            inner = back._dequantize

            def counted(stored, scale, inner=inner):
                sizes.append(len(stored))
                return inner(stored, scale)

            monkeypatch.setattr(back, "_dequantize", counted)
    with torch.no_grad():
        student(input_ids=make_ids(1, 1))
    assert sizes == [2] * 4
    assert not nn.utils.parametrize._cache


@each_format
def test_the_bytes_are_those_of_integers_and_scales(stored_as):
    student = student_of()
    before = stored_bytes(student)
    numbers = 2 * 8 * (12 * 32 + 32 * 6)
    assert before == 4 * numbers
    line = student.quantize_experts(stored_as)
    scales = 2 * 8 * (12 + 32) if stored_as == "int8" else numbers // 64
    integers = numbers if stored_as == "int8" else numbers // 2
    assert stored_bytes(student) == integers + 4 * scales
    assert f" MiB in {stored_as} instead of " in line


@each_format
def test_a_cast_of_the_student_casts_the_weights_that_are_read_and_no_scale(stored_as):
    student = student_of()
    student.quantize_experts(stored_as)
    before = weights(student)
    student.bfloat16()
    for bank in student.banks():
        assert all(buffer.dtype == torch.float32 for buffer in bank.experts.buffers())
    for weight, read in zip(before, weights(student), strict=True):
        assert read.dtype == torch.bfloat16
        torch.testing.assert_close(read, weight.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_format
def test_a_student_that_is_quantised_on_the_cpu_moves_to_a_gpu(stored_as):
    student = student_of()
    student.quantize_experts(stored_as)
    ids = make_ids()
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        student.to("cuda")  # pyright: ignore[reportArgumentType] - transformers hides Module.to
        moved = student(input_ids=ids.cuda()).logits.cpu()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "stored_as"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "experts"]}, None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning")
def test_transformers_config_of_bitsandbytes_quantises_the_experts_too(
    tmp_path, settings, stored_as
):
    student = make_student(make_dense(hidden_size=64, head_dim=16))
    student.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings)
    )
    assert {bank.experts.stored_as for bank in loaded.banks()} == {stored_as}
    kind = bitsandbytes.nn.Linear8bitLt if stored_as == "int8" else bitsandbytes.nn.Linear4bit
    assert isinstance(loaded.backbone.model.layers[0].self_attn.q_proj, kind)
    with torch.no_grad():
        assert loaded(input_ids=make_ids().to(loaded.device)).logits.isfinite().all()


def test_a_quantised_student_is_neither_saved_nor_trained_nor_quantised_again(tmp_path):
    student = student_of()
    student.quantize_experts("int8")
    held = "got experts that are held in int8, expected ones that are not quantised; "
    with pytest.raises(UserError, match=f"^save_pretrained: {held}save the student before"):
        student.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^fine_tune: {held}pass experts=False"):
        student.fine_tune()
    with pytest.raises(UserError, match=f"^training: {held}load the student without"):
        set_objective(student.banks(), RunConfig())
    with pytest.raises(UserError, match=rf'^quantize_experts\("nf4"\): {held}load the student'):
        student.quantize_experts("nf4")
    assert "experts" not in student.fine_tune(experts=False, backbone=True).split("frozen")[0]


def test_a_layer_around_quantised_experts_passes_the_gradient_on():
    student = student_of()
    plain = restored(student, "int8")
    student.quantize_experts("int8")
    gradients = []
    for model in (student, plain):
        embedding = model.get_input_embeddings()(make_ids()).detach().requires_grad_(True)
        model(inputs_embeds=embedding).logits.square().sum().backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients)


def test_experts_that_are_no_whole_number_of_blocks_are_refused_in_4_bits_and_taken_in_8():
    student = make_student(make_dense(hidden_size=20, head_dim=4, num_attention_heads=4))
    before = weights(student)
    message = "^experts in nf4: got weights of 120 and 240 numbers an expert, expected multiples"
    with pytest.raises(UserError, match=message):
        student.quantize_experts("nf4")
    assert all(map(torch.equal, before, weights(student)))
    student.quantize_experts("int8")


def test_offloaded_experts_are_refused():
    config: Any = student_of().config
    with torch.device("meta"):
        student = TinyOnnForCausalLM(config)
    with pytest.raises(UserError, match=r"^quantize_experts.*offloaded.*device_map"):
        quantize_experts(student, "int8")


def test_a_missing_bitsandbytes_names_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^experts in nf4: .*pip install bitsandbytes$"):
        student_of().quantize_experts("nf4")
    student_of().quantize_experts("int8")
