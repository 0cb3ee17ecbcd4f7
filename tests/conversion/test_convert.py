"""Conversion is exact: all experts on is the dense model. What cannot be converted is refused."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from tiny import FAMILIES, OTHERS, SIZES, WIDTH, make_dense, make_ids, make_student
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.conversion.verify import backbone_hash, identity_gap, verify_head
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import activation_name, gated_mlps
from tiny_onn.model.router import RoutingRule

ALL = (*FAMILIES, *OTHERS)
UNSUPPORTED = {
    "gpt2": ("GPT2LMHeadModel", "no list of decoder layers"),
    "opt": ("OPTForCausalLM", "no list of decoder layers"),
    "phi3": ("Phi3ForCausalLM", "layer 0's MLP has no linear gate_proj, up_proj;"),
    "glm4": ("Glm4ForCausalLM", "layer 0's MLP has no linear gate_proj, up_proj;"),
    "mixtral": ("MixtralForCausalLM", "no linear gate_proj, up_proj, down_proj"),
    "starcoder2": ("Starcoder2ForCausalLM", "no linear gate_proj, up_proj, down_proj"),
}


def random_order(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(WIDTH, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("order", [None, random_order()], ids=["slices", "shuffled"])
@pytest.mark.parametrize("family", ALL)
def test_all_experts_on_is_the_dense_model(family, order):
    dense, ids = make_dense(family), make_ids()
    student = make_student(dense, neuron_order=order)
    size = dense(input_ids=ids).logits.abs().max().item()
    assert identity_gap(student, dense, ids) <= 1e-5 * size
    # The measure can fail: the routed student is another function.
    assert (student(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max() > 0.01 * size


@pytest.mark.parametrize("order", [None, random_order()], ids=["slices", "shuffled"])
@pytest.mark.parametrize("family", ALL)
def test_in_bfloat16_the_student_errs_no_more_than_the_dense_model(family, order):
    dense, ids = make_dense(family, dtype="bfloat16"), make_ids()
    student = make_student(dense, neuron_order=order)
    with torch.no_grad(), all_experts_on(student.banks()):
        got = student(input_ids=ids).logits.float()
        plain = dense(input_ids=ids).logits.float()
        exact = dense.float()(input_ids=ids).logits
    # Both round in other places: the factor allows for that, not for another function.
    assert (got - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


def test_the_order_says_which_neuron_goes_where():
    dense, order = make_dense("llama"), random_order()
    student = make_student(dense, neuron_order=order)
    for bank, mlp, order_F in zip(student.banks(), gated_mlps(dense), order, strict=True):
        neuron = int(order_F[3 * 6 + 2])
        assert torch.equal(bank.experts.gate_up_proj[3, 2], mlp.gate_proj.weight[neuron])
        assert torch.equal(bank.experts.gate_up_proj[3, 6 + 2], mlp.up_proj.weight[neuron])
        assert torch.equal(bank.experts.down_proj[3, :, 2], mlp.down_proj.weight[:, neuron])


def test_random_experts_depend_on_the_seed_alone():
    dense = make_dense("llama")
    first, again, other = (make_student(dense, init="random", seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.trainable().items():
        assert torch.equal(tensor, again.trainable()[name]), name
        if not name.endswith("bias"):
            assert not torch.equal(tensor, other.trainable()[name]), name
    assert 0.18 < first.banks()[0].experts.gate_up_proj.std() < 0.22


def test_gates_start_as_asked():
    dense = make_dense("llama")
    assert not make_student(dense, gate_init="zeros").banks()[0].router.weight.any()
    assert 0.01 < make_student(dense).banks()[0].router.weight.std() < 0.03


def test_all_experts_on_ends_with_its_context():
    student = make_student(make_dense("llama"))
    rule = student.banks()[0].router.rule
    with pytest.raises(ZeroDivisionError), all_experts_on(student.banks()):
        assert student.banks()[0].router.rule == RoutingRule(selection="top_k", target_k=8.0)
        raise ZeroDivisionError
    assert [bank.router.rule for bank in student.banks()] == [rule, rule]


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_is_the_dense_models_own(family):
    dense = make_dense(family)
    student = make_student(dense)
    theirs = dict(dense.named_parameters(remove_duplicate=False)) | dict(dense.named_buffers())
    ours = dict(student.backbone.named_parameters(remove_duplicate=False))
    ours |= dict(student.backbone.named_buffers())
    shared = [name for name in theirs if ".mlp." not in name]
    assert shared
    for name in shared:
        assert ours[name] is theirs[name], name
        assert not ours[name].requires_grad, name
    assert {name for name in ours if ".mlp." not in name} == set(shared)
    assert not any(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_hash_sees_every_backbone_tensor_and_no_expert(family):
    dense = make_dense(family)
    student = make_student(dense)
    before = backbone_hash(dense)
    assert backbone_hash(student) == before
    for name, parameter in student.named_parameters():
        last = parameter.data.view(-1)[-1:]
        value = last.clone()
        last += 1
        assert (backbone_hash(student) == before) == (".mlp." in name), name
        last.copy_(value)


def test_backbone_hash_tells_number_formats_apart():
    dense = make_dense("llama", dtype="bfloat16")
    for parameter in dense.parameters():
        # The same bytes in every format of this width.
        parameter.data.zero_()
    assert backbone_hash(dense) != backbone_hash(copy.deepcopy(dense).half())


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_architectures_are_refused_by_name_with_the_reason(family):
    sizes = {name: value for name, value in SIZES.items() if "token" not in name}
    config = AutoConfig.for_model(family, **sizes, pad_token_id=0)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config)
    architecture, reason = UNSUPPORTED[family]
    with pytest.raises(UserError) as caught:
        make_student(dense)
    message = str(caught.value)
    assert message.startswith(f"architecture {architecture} (model_type '{family}') cannot be")
    assert reason in message
    assert "\n" not in message


def test_mlp_biases_are_refused():
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*layer 0's MLP has biases"):
        make_student(make_dense("llama", mlp_bias=True))


def test_a_student_is_not_converted_again():
    student = make_student(make_dense("llama"))
    for model in (student, student.backbone):
        with pytest.raises(UserError, match=r"student already|no list of decoder layers"):
            make_student(model)


def test_layers_of_other_widths_are_refused():
    dense = make_dense("llama")
    dense.model.layers[1].mlp = make_dense("llama", intermediate_size=96).model.layers[1].mlp
    with pytest.raises(UserError, match="layer 1's MLP width differs from layer 0's"):
        make_student(dense)


def test_an_mlp_with_more_parts_is_refused():
    dense = make_dense("llama")
    dense.model.layers[1].mlp.norm = torch.nn.LayerNorm(WIDTH)
    with pytest.raises(UserError, match="layer 1's MLP also holds norm"):
        make_student(dense)
    dense = make_dense("llama")
    dense.model.layers[0].mlp.gain = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="layer 0's MLP also holds gain"):
        make_student(dense)


class ResidualMlp(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + 0.01 * x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_mlp_that_computes_something_else_is_refused(dtype):
    dense = make_dense("llama", dtype=dtype)
    mlp = dense.model.layers[1].mlp
    odd = ResidualMlp(dense.config).to(mlp.gate_proj.weight.dtype)
    odd.load_state_dict(mlp.state_dict())
    make_student(dense)
    dense.model.layers[1].mlp = odd
    with pytest.raises(UserError, match=r"LlamaForCausalLM: layer 1's MLP differs from down"):
        make_student(dense)


def test_an_activation_nobody_knows_is_refused():
    config = make_dense("llama").config
    config.hidden_act = "nonesuch"
    with pytest.raises(UserError, match=r"'llama'.*activation 'nonesuch'"):
        activation_name(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 7}, r"num_experts: got 7, expected a divisor of 48.*for example (6|8)"),
        ({"num_experts": 8, "expert_dim": 5}, r"got 8 x 5, expected a product of 48"),
        ({"target_k": 9.0}, r"router.target_k: got 9, expected 1 to 8"),
        ({"target_k": 0.5}, r"router.target_k: got 0.5, expected 1 to 8"),
        ({"target_k": float("nan")}, r"router.target_k: got nan, expected 1 to 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_student(make_dense("llama"), **changes)


@pytest.mark.parametrize("family", ALL)
def test_heads_are_verified(family):
    dense = make_dense(family)
    size = dense(input_ids=make_ids()).logits.abs().max().item()
    assert verify_head(dense, make_ids()) <= 1e-6 * size


def test_a_head_that_does_more_is_refused():
    dense = make_dense("gemma2")
    dense.config.final_logit_softcapping = None
    head: Any = dense.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: 1.1 * output)
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM: its logits differ from softcap"):
        verify_head(dense, make_ids())
