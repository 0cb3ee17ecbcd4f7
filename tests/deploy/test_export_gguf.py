"""A GGUF computes our student by the formula of llama.cpp's graph, and in llama.cpp itself."""

import importlib
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from export_cases import HAS_LLAMA_CPP, save_student
from tiny import make_ids, normal, write_corpus
from tiny_onn.deploy.export import run_export
from tiny_onn.deploy.gguf_fits import fit_constant, fit_sign_gate, places
from tiny_onn.deploy.gguf_tokenizer import PRE_TOKENIZERS, _rule
from tiny_onn.deploy.to_gguf import STEEP, expert_tensors, fixed_rule, gate_tensors
from tiny_onn.errors import UserError
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule, temporary_rules
from tiny_onn.runs.students import load_student

pytestmark = pytest.mark.usefixtures("quiet")

HIDDEN, WIDTH, EXPERTS = 12, 5, 8
RULES = {
    "budget": {},
    "shared": {"num_shared": 2},
    "mean weights": {"weighting": "mean", "num_shared": 1},
    "top-k": {"selection": "top_k", "target_k": 3.0},
    "static, shared, scale": {"selection": "static", "num_shared": 1, "learn_scale": True},
}


def graph(tensors, x_TD, k, scale):
    """`build_moe_ffn` and the shared expert of llama.cpp's graph for GLM-4-MoE."""
    probs_TR = (x_TD @ tensors["ffn_gate_inp.weight"].T).sigmoid()
    chosen_TK = (probs_TR + tensors["exp_probs_b.bias"]).topk(k).indices
    gate, up, down = (tensors[f"ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down"))
    pre_TKI = [torch.einsum("td,tkid->tki", x_TD, weight[chosen_TK]) for weight in (gate, up)]
    outs_TKD = torch.einsum("tki,tkdi->tkd", F.silu(pre_TKI[0]) * pre_TKI[1], down[chosen_TK])
    y_TD = (outs_TKD * (scale * probs_TR.gather(-1, chosen_TK))[..., None]).sum(1)
    gate, up, down = (tensors[f"ffn_{kind}_shexp.weight"] for kind in ("gate", "up", "down"))
    return y_TD + F.linear(F.silu(x_TD @ gate.T) * (x_TD @ up.T), down)


def bank_of(rule, *, seed=0, **options):
    bank = ExpertBank(HIDDEN, EXPERTS, WIDTH, "silu", rule, **options).train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        bank.router.selection_bias.copy_(torch.randn(EXPERTS, generator=generator) * 0.3)
    return bank


def inputs_with_a_constant(num_tokens, seed=1):
    """Inputs whose first coordinate never changes, so that linear maps of them are affine."""
    x_TD = normal(num_tokens, HIDDEN, seed=seed)
    x_TD[:, 0] = 1.0
    return x_TD


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("weighting", ["unit", "mean"])
def test_a_fixed_layer_is_ours_means_and_scales_included(num_shared, weighting):
    rule = RoutingRule(selection="top_k", target_k=5.0, num_shared=num_shared, weighting=weighting)
    bank = bank_of(rule, compensated=True, scaled=True)
    x_TD = inputs_with_a_constant(400)
    constant = fit_constant(x_TD)
    assert constant.error < 1e-3
    tensors = gate_tensors(bank, None) | expert_tensors(bank, constant)
    k = 5 - num_shared
    scale = 2.0 / (k if weighting == "mean" else 1)
    with torch.no_grad():
        got, ours = graph(tensors, x_TD, k, scale), bank(x_TD)
    torch.testing.assert_close(got, ours, atol=0.02, rtol=0.01)


def test_a_threshold_layer_is_ours_away_from_the_threshold():
    bank = bank_of(RoutingRule(selection="budget", target_k=3.0, num_shared=1), compensated=True)
    bank.router.settled.fill_(0.12)
    # Small differences between logits make their normaliser nearly a line.
    bank.router.weight.data *= 0.3
    x_TD = inputs_with_a_constant(4000)
    gate = fit_sign_gate(bank, x_TD)
    assert gate.agreement > 0.95
    tensors = gate_tensors(bank, gate) | expert_tensors(bank, fit_constant(x_TD))
    with torch.no_grad():
        got, ours = graph(tensors, x_TD, EXPERTS - 1, 1.0), bank(x_TD)
        logits_TR = x_TD @ gate.weight.T
        active_TR = bank.router(x_TD).active[:, 1:]
    far_T = (logits_TR.abs() * STEEP > 8).all(-1) & ((logits_TR > 0) == active_TR).all(-1)
    assert far_T.sum() > 100
    torch.testing.assert_close(got[far_T], ours[far_T], atol=0.02, rtol=0.02)
    counts = active_TR.sum(-1).sort().values
    assert places([gate]) == counts[int(0.99 * len(counts)) - 1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_fields_are_those_of_the_rule(tmp_path, family):
    folder = save_student(tmp_path / "student", family, num_shared=2, compensation="mean")
    text = write_corpus(tmp_path / "text")
    lost = run_export(str(folder), to="gguf", out=tmp_path / "out", fixed_k=True, text=text)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-F16.gguf")
    fields = {
        name.removeprefix("glm4moe."): field.contents() for name, field in reader.fields.items()
    }
    expected = {
        "general.architecture": "glm4moe",
        "expert_count": 6,
        "expert_used_count": 2,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 7,
        "expert_gating_func": 2,
        "expert_weights_norm": False,
        "expert_weights_scale": 2.0,
        "attention.key_length": 8,
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {name: fields[name] for name in expected} == expected
    names = {tensor.name for tensor in reader.tensors}
    assert ("blk.0.attn_q_norm.weight" in names) == (family == "qwen3")
    assert "mean outputs" in lost
    assert "every token uses 4 experts" in lost


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rule", RULES)
def test_llama_cpp_computes_our_fixed_student(tmp_path, family, rule):
    llama_cpp: Any = importlib.import_module("llama_cpp")
    folder = save_student(tmp_path / "student", family, **RULES[rule])
    run_export(str(folder), to="gguf", out=tmp_path / "out", fixed_k=True)
    loaded = load_student(str(folder), torch.device("cpu"))
    ids = make_ids(1, 24)
    routers = [bank.router for bank in loaded.student.banks()]
    rules = [fixed_rule(router.rule) for router in routers]
    with torch.no_grad(), temporary_rules(routers, rules):
        ours = loaded.student(ids).logits[0]
    # Where two logits are nearly equal, rounding swaps their experts; the median token has none.
    for form, tolerance in (("F16", 0.01), ("Q8_0", 0.25)):
        path = str(tmp_path / "out" / f"model-{form}.gguf")
        model = llama_cpp.Llama(path, n_ctx=128, logits_all=True, n_threads=1, verbose=False)
        model.eval(ids[0].tolist())
        theirs = torch.tensor(np.array(model.scores[:24]))
        sentence = "the quick  brown fox, 12 dogs"
        tokens = model.tokenize(sentence.encode(), add_bos=False)
        model.close()
        errors_T = (theirs - ours).square().mean(-1).sqrt()
        assert errors_T.median() < tolerance * ours.std()
        assert tokens == loaded.tokenizer(sentence)["input_ids"]


@pytest.mark.parametrize(
    ("family", "dense", "said"),
    [
        ("gemma2", {}, "model_type = 'gemma2'"),
        ("mistral", {}, "sliding_window = 8"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_a_backbone_that_llama_cpp_computes_otherwise_is_refused(tmp_path, family, dense, said):
    folder = save_student(tmp_path / "student", family, dense=dense, selection="top_k")
    with pytest.raises(UserError, match=rf"^--to gguf: got a backbone with {said}"):
        run_export(str(folder), to="gguf", out=tmp_path / "out")


def test_weights_that_llama_cpp_has_not_are_refused(tmp_path):
    folder = save_student(tmp_path / "student", selection="top_k", weighting="sigmoid")
    with pytest.raises(UserError, match=r"^--to gguf: got a student with experts\.weighting"):
        run_export(str(folder), to="gguf", out=tmp_path / "out")


def test_weights_beyond_the_format_are_refused(tmp_path):
    folder = save_student(tmp_path / "student", selection="top_k")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj"))
    weights[name] = weights[name] * 1e7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^--to gguf: got weights up to .* in blk\.0\.ffn_down"):
        run_export(str(folder), to="gguf", out=tmp_path / "out")


def test_ways_of_splitting_text_are_told_apart():
    split = {
        "type": "Split",
        "behavior": "Isolated",
        "invert": False,
        "pattern": {
            "Regex": next(key for key, name in PRE_TOKENIZERS.items() if name == "qwen2")[0]
        },
    }
    after = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, after]}
    assert PRE_TOKENIZERS[_rule(steps)] == "qwen2"
    assert _rule({"type": "Sequence", "pretokenizers": [split | {"invert": True}, after]}) not in (
        PRE_TOKENIZERS
    )
    assert _rule({"type": "Metaspace"}) not in PRE_TOKENIZERS


def test_the_fixed_number_is_the_nearest_to_the_mean():
    rule = RoutingRule(target_k=3.6, num_shared=1)
    assert fixed_rule(rule) == replace(rule, selection="top_k", target_k=4.0)
