"""The student is a Hugging Face model: saved, loaded, generating, and as exact as its backbone."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny import FAMILIES, OTHERS, make_dense, make_documents, make_ids, make_student
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.data.packing import pack
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import (
    activation_name,
    decoder_layers,
    generation_attention,
    head_of,
    last_hidden_states,
)
from tiny_onn.model.backbone_mode import set_backbone_mode
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.ops import decode

pytestmark = pytest.mark.usefixtures("quiet")

ALL = (*FAMILIES, *OTHERS)
TIED = {"llama", "gemma2", "cohere"}
# Training and calibration move these buffers, "layers.0.mlp.router.threshold" and the like.
ROUTER_BUFFERS = ("threshold", "num_updates")


def make_settled(family, dtype="float32") -> Any:
    """Return a student whose every routing tensor differs from its initial value."""
    student = make_student(make_dense(family, dtype=dtype))
    for index, bank in enumerate(student.banks()):
        generator = torch.Generator().manual_seed(index)
        bank.router.bias.data.copy_(torch.randn(8, generator=generator))
        bank.router.threshold.fill_(0.3 + 0.1 * index)
        bank.router.num_updates.fill_(5 + index)
    return student


def reload(student, folder, **options) -> Any:
    student.save_pretrained(folder)
    with warnings.catch_warnings():
        # transformers reports missing and unexpected tensors as warnings.
        warnings.simplefilter("error")
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    loaded, loading = pair
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert isinstance(loaded, TinyOnnForCausalLM)
    return loaded


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in ALL), *((family, "bfloat16") for family in FAMILIES)],
)
def test_saving_and_loading_changes_no_bit(family, dtype, tmp_path):
    student = make_settled(family, dtype)
    loaded = reload(student, tmp_path)
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    ids = make_ids()
    assert torch.equal(student(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert loaded.config.to_dict().keys() == student.config.to_dict().keys()
    assert not loaded.training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_student_attends_as_its_teacher_generates(family, tmp_path, monkeypatch):
    dense = make_dense(family)
    # transformers before 5.23 says this of every family, and its sdpa drops Gemma 2's softcap.
    told_by = next(cls for cls in type(dense).__mro__ if "_supports_sdpa" in vars(cls))
    monkeypatch.setattr(told_by, "_supports_sdpa", True)
    loaded = reload(make_student(dense), tmp_path)
    expected = "eager" if family == "gemma2" else "sdpa"
    assert generation_attention(dense) == expected
    assert loaded.backbone.config._attn_implementation == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_gates_stay_float32_beside_a_bfloat16_backbone(family, tmp_path):
    loaded = reload(make_settled(family, "bfloat16"), tmp_path)
    for name, tensor in loaded.state_dict().items():
        expected = torch.float32 if ".mlp." in name else torch.bfloat16
        assert tensor.dtype == expected, name
    assert {name.rpartition(".")[2] for name, _ in loaded.named_buffers()} >= set(ROUTER_BUFFERS)
    assert loaded(input_ids=make_ids()).logits.dtype == torch.bfloat16


def test_asking_for_bfloat16_casts_the_backbone_alone(tmp_path):
    loaded = reload(make_settled("llama"), tmp_path, dtype=torch.bfloat16)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.trainable().values()} == {torch.float32}


@pytest.mark.parametrize("family", ALL)
def test_tied_heads_stay_tied_and_untied_ones_apart(family, tmp_path):
    student = make_settled(family)
    for model in (student, reload(student, tmp_path)):
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (family in TIED)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache_agrees(family, tmp_path):
    student = reload(make_settled(family), tmp_path)
    # The text is longer than gemma2's window, so that its cache slides.
    ids = make_ids(1, 12)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    cached = student.generate(ids, use_cache=True, **options)
    assert cached.shape == (1, 22)
    assert torch.equal(cached, student.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_change_what_a_prompt_generates(family, tmp_path):
    student = reload(make_settled(family), tmp_path)
    long, short = make_ids(1, 12), make_ids(1, 7, seed=1)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)
    batch = torch.cat((long, padded))
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = student.generate(batch, attention_mask=(batch != 0).long(), **options)
    for row, prompt in enumerate((long, short)):
        alone = student.generate(prompt, **options)
        assert torch.equal(together.sequences[row, 12:], alone.sequences[0, prompt.shape[1] :])
        for got, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[row], expected[0], rtol=1e-4, atol=1e-4)


def test_padding_is_found_by_generate_when_no_mask_is_given(tmp_path):
    student = reload(make_settled("llama"), tmp_path)
    short = make_ids(1, 7, seed=1)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = student.generate(short, **options)
    assert torch.equal(student.generate(padded, **options)[:, 5:], alone)


def test_prefill_projects_the_last_position_only():
    student: Any = make_student(make_dense("llama"))
    ids = make_ids()
    whole = student(input_ids=ids).logits
    last = student(input_ids=ids, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last, whole[:, -1:])
    assert student._supports_logits_to_keep()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_head_reads_its_input_as_one_matrix(kept):
    student, strides = make_student(make_dense()).train(False), []
    head = student.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    ids = make_ids(2, 9)
    with torch.no_grad():
        got = student(ids, use_cache=False, logits_to_keep=kept).logits
        want = student.backbone.base_model(ids, use_cache=False)[0][:, -kept:] @ head.weight.T
    # By other strides torch would copy the head's weight on a CPU, once per row of the batch.
    assert strides[0][0] == strides[0][1] * got.shape[1]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("tokens", "times"), [(1, 2), (decode.MAX_TOKENS + 1, 1)])
def test_only_a_few_tokens_ask_the_weights_whether_a_gpu_decodes(tokens, times, monkeypatch):
    # The kernels take no float64, so that the answer of the weights is no.
    student, calls = make_student(make_dense()).double().train(False), []
    monkeypatch.setattr(decode, "triton_runs_on", lambda _: True)
    student.banks()[0].experts.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        student(make_ids(1, tokens), use_cache=False)
    assert len(calls) == times


def test_labels_give_the_next_token_loss():
    student, ids = make_student(make_dense("llama")), make_ids()
    out = student(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_head_of_reproduces_the_logits(family, dtype):
    dense = make_dense(family, dtype=dtype)
    for model in (dense, make_student(dense)):
        ids = make_ids(1)
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].float()
            got = head_of(model).logits(last_hidden_states(model, ids)[0])
        # The families' heads scale and cap in bfloat16, ours in float32.
        bound = 1e-6 if dtype == "float32" else 2.0**-7
        assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_families_use_their_own_head_and_activation():
    gemma, cohere, granite = (make_dense(family) for family in ("gemma2", "cohere", "granite"))
    assert head_of(gemma).softcap == 5.0
    assert head_of(cohere).scale == pytest.approx(0.3)
    assert head_of(granite).scale == pytest.approx(0.25)
    assert activation_name(gemma.config) == "gelu_pytorch_tanh"
    assert activation_name(granite.config) == "silu"


def test_a_student_from_its_configuration_alone_has_finite_experts():
    config = make_student(make_dense("llama")).config
    student = AutoModelForCausalLM.from_config(config)
    for name, tensor in student.state_dict().items():
        assert tensor.isfinite().all(), name
    for bank in student.banks():
        assert 0.1 < bank.experts.gate_up_proj.std() < 0.3
        assert 0.1 < bank.experts.down_proj.std() < 0.3


def test_configuration_survives_json(tmp_path):
    dense = make_dense("gemma2")
    config = make_student(
        dense, num_experts=4, selection="top_k", weighting="softmax", target_k=2.0
    ).config
    config.save_pretrained(tmp_path)
    read = TinyOnnConfig.from_pretrained(tmp_path)
    assert read.routing_rule() == config.routing_rule()
    assert (read.num_experts, read.expert_dim) == (4, 12)
    assert type(read.backbone) is type(dense.config)
    assert read.backbone.layer_types == dense.config.layer_types
    assert read.eos_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selection", ["budget", "top_k"])
def test_packed_row_gives_each_document_the_logits_it_gets_alone(family, selection):
    student = make_student(make_dense(family), selection=selection)
    documents = make_documents((5, 17, 3, 11))
    row = next(pack(documents, row_tokens=40, pad_token_id=0))
    with torch.no_grad():
        with recorded_routings(student.banks()) as routing:
            packed = last_hidden_states(student, row.input_ids, **packed_kwargs(row))[0]
        start = 0
        for document in documents:
            with recorded_routings(student.banks()) as own_routing:
                alone = last_hidden_states(student, torch.tensor([document]))[0]
            span = slice(start, start + len(document))
            torch.testing.assert_close(packed[span], alone, rtol=1e-4, atol=1e-5)
            for together, own in zip(routing, own_routing, strict=True):
                assert torch.equal(together.active[span], own.active)
            start += len(document)
    ks = torch.cat([r.active.sum(-1) for r in routing])
    assert (ks.unique().numel() > 1) == (selection == "budget")


def test_only_experts_and_gates_count_as_trainable():
    student = make_student(make_dense("qwen3"))
    names = {name.partition(".mlp.")[2] for name in student.trainable()}
    assert names == {"experts.gate_up_proj", "experts.down_proj", "router.weight", "router.bias"}
    assert {n for n, p in student.named_parameters() if p.requires_grad} == set(student.trainable())


def test_loading_gives_the_backbone_its_hash(tmp_path):
    dense = make_dense("qwen3")
    assert backbone_hash(reload(make_student(dense), tmp_path)) == backbone_hash(dense)


@pytest.mark.parametrize("checkpointing", ["none", "layer", "selective"])
@pytest.mark.parametrize(
    ("family", "dropouts"),
    [
        ("seed_oss", {"attention_dropout": 0.3, "residual_dropout": 0.3}),
        ("stablelm", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_a_frozen_backbone_trains_without_dropout(family, dropouts, checkpointing):
    def gradients(options: dict[str, Any]) -> list[Any]:
        student = make_student(make_dense(family, **options))
        checkpoint_layers(student, checkpointing)
        hidden = last_hidden_states(student.train(), make_ids())
        hidden.square().sum().backward()
        return [hidden, *(bank.experts.gate_up_proj.grad for bank in student.banks())]

    without = gradients(dict.fromkeys(dropouts, 0.0))
    assert all(map(torch.equal, gradients(dropouts), without))


class DroppingLayer(GradientCheckpointingLayer):
    """A layer whose own flag switches dropout on, as in some families, around an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.norm = nn.Dropout(0.5)
        self.calls: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.mlp.training)
        return nn.functional.dropout(self.norm(self.mlp(x)), 0.5, training=self.training)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_is_checkpointed_without_its_own_dropout(checkpointed):
    layer: Any = DroppingLayer()
    layer.gradient_checkpointing = checkpointed
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    layer.norm.weight = nn.Parameter(torch.ones(1), requires_grad=False)
    backbone = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for _ in range(2):
        # The second call finds what the first one set up.
        set_backbone_mode(backbone.train(), [layer], True)
        layer(x).sum().backward()
    assert torch.equal(layer(x), layer.mlp(x))
    assert layer.calls == [True] * (5 if checkpointed else 3)
    layer.norm.weight.requires_grad_(True)
    set_backbone_mode(backbone.train(), [layer], True)
    assert layer.training
    assert layer.norm.training
    assert not torch.equal(layer(x), layer.mlp(x))


def test_transformers_own_checkpointing_recomputes_a_frozen_backbone():
    student = make_student(make_dense("seed_oss", residual_dropout=0.3)).train()
    name = "activation_checkpointing_enable"
    getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")()
    calls: list[nn.Module] = []
    for layer in decoder_layers(student.backbone):
        layer.get_submodule("self_attn").register_forward_pre_hook(
            lambda module, _: calls.append(module)
        )
    hidden = last_hidden_states(student, make_ids())
    hidden.sum().backward()
    assert len(calls) == 2 * len(set(calls)) == 4
    assert torch.equal(hidden, last_hidden_states(student, make_ids()))
