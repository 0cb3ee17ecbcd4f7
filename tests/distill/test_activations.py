"""What is kept and what is computed again changes memory, and no bit of a gradient."""

from typing import Any
from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import CONFIG, SIZES, change, make_dense, make_rows, make_student
from tiny_onn.config.schema import LossConfig
from tiny_onn.distill.checkpointing import (
    ATTENTION_OPS,
    attention_ops,
    checkpoint_layers,
    to_device,
    to_host,
)
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.expert_path import set_objective
from tiny_onn.ops.distillation_loss import Head, distill
from tiny_onn.ops.loss_chunks import (
    CPU_LOSS_CHUNK_TOKENS,
    GPU_LOSS_CHUNK_TOKENS,
    LOSS_MEMORY_SHARE,
    auto_chunk_tokens,
    loss_chunk_tokens,
)
from tiny_onn.teacher.load import teacher_for

MODES = ("none", "layer", "selective", "offload")
ROWS = make_rows((20, 12, 32), 32)
CONFIG = change(CONFIG, train={"expert_path": "dense"})
COUPLED = change(
    CONFIG,
    experts={"weighting": "softmax"},
    router={"selection": "top_k", "objective": "task"},
)
LAYERS = SIZES["num_hidden_layers"]
ATTENTION = "scaled_dot_product"


class Keep(torch.optim.Optimizer):
    """Keeps the last gradients and changes nothing."""

    def __init__(self, student: Any) -> None:
        super().__init__(list(student.trainable().values()), {})
        self.named = student.trainable()
        self.gradients: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        assert closure is None
        self.gradients = {n: p.grad.clone() for n, p in self.named.items() if p.grad is not None}


def start(config, family="llama", device="cpu"):
    dense: Any = make_dense(family, dtype=config.teacher.dtype)
    dense = dense.to(device)
    options = {"weighting": config.experts.weighting, "selection": config.router.selection}
    student = make_student(dense, **options)
    set_objective(student.banks(), config)
    checkpoint_layers(student, config.train.checkpointing)
    return student, teacher_for(dense, config.teacher)


def one_step(config, family="llama", device="cpu"):
    """The loss and all gradients of one step over both rows, and the summed surprise."""
    student, teacher = start(config, family, device)
    optimizer = Keep(student)
    result = distill_step(student, teacher, optimizer, ROWS, config)
    surprise = {str(i): tally.surprise_E for i, tally in enumerate(result.tallies)}
    assert len(optimizer.gradients) == 4 * LAYERS
    return optimizer.gradients | surprise | {"loss": result.loss}


def forward(student):
    student.train()
    row = ROWS[0]
    return last_hidden_states(student, row.input_ids, **packed_kwargs(row))


@pytest.mark.parametrize("config", [CONFIG, COUPLED], ids=["smk", "task"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_mode_gives_the_same_bits(family, config):
    # Gemma 2's softcap has no fused attention, and recomputes its own blocks inside the layer.
    results = [one_step(change(config, train={"checkpointing": m}), family) for m in MODES]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


# torch 2.13's inductor warns about torch itself when it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.compiled
def test_every_mode_gives_the_same_bits_with_compiled_regions():
    config = change(CONFIG, train={"compile": True})
    results = [one_step(change(config, train={"checkpointing": m})) for m in MODES]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


class Attentions(TorchDispatchMode):
    """Counts the fused attention's forward passes."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += ATTENTION in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "share"), [("none", 0), ("layer", 1), ("selective", 0)])
def test_selective_mode_does_not_compute_attention_again(mode, share):
    student, _ = start(change(CONFIG, train={"checkpointing": mode}))
    documents = len(ROWS[0].cu_seqlens) - 1
    with Attentions() as first:
        hidden = forward(student)
    assert first.calls == LAYERS * documents
    with Attentions() as again:
        hidden.sum().backward()
    assert again.calls == share * first.calls


def test_the_attention_of_this_torch_is_listed():
    ops = {op.name().partition("::")[2] for op in attention_ops()}
    assert "_scaled_dot_product_flash_attention_for_cpu" in ops
    assert "_scaled_dot_product_flash_attention" in ops
    # Every name is one that some release has: a typing mistake would be missing in all.
    assert len(ops) == len(ATTENTION_OPS)


class Live(TorchDispatchMode):
    """Remembers the storages that operations made, as long as something else does."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.storages.add(tensor.untyped_storage())
        return out

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


def kept_bytes(mode) -> int:
    """What a forward pass leaves behind for the backward pass."""
    student, _ = start(change(CONFIG, train={"checkpointing": mode}))
    with Live() as live:
        hidden = forward(student)
        assert hidden.requires_grad
        return live.bytes()


def test_each_mode_keeps_what_it_says():
    kept = {mode: kept_bytes(mode) for mode in MODES}
    tokens, heads, head_dim = 32, SIZES["num_attention_heads"], 8
    attention = 4 * LAYERS * tokens * heads * (head_dim + 1)
    assert kept["selective"] - kept["layer"] == attention
    assert kept["offload"] == kept["layer"]
    activations = 4 * LAYERS * tokens * (2 * SIZES["intermediate_size"] + SIZES["hidden_size"])
    assert kept["none"] - kept["selective"] > activations


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_a_layer_keeps_one_input_for_autograd(mode):
    student, _ = start(change(CONFIG, train={"checkpointing": mode}))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(student)
    inputs = [t for t in saved if t.shape == (1, 32, SIZES["hidden_size"])]
    # The layers' inputs, and two tensors of the last norm.
    assert len(inputs) == LAYERS + 2
    assert sum(t.numel() for t in saved) < (LAYERS + 3) * 32 * SIZES["hidden_size"]


def test_a_host_tensor_is_not_copied_to_the_host():
    tensor = torch.arange(3.0)
    packed = to_host(tensor)
    assert packed[1] is tensor
    assert to_device(packed) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_inputs_leave_the_gpu_and_change_no_bit():
    results, kept = [], []
    for mode in MODES:
        config = change(CONFIG, train={"checkpointing": mode, "device": "cuda"})
        results.append(one_step(config, device="cuda"))
        student, _ = start(config, device="cuda")
        student.train()
        row = ROWS[0].to("cuda")
        before = torch.cuda.memory_allocated()
        hidden = last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        kept.append(torch.cuda.memory_allocated() - before)
        del hidden
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    none, layer, selective, offload = kept
    assert offload < layer < selective < none


def test_layers_that_cannot_be_checkpointed_are_refused():
    student, _ = start(CONFIG)
    layers = student.backbone.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    layers[0] = nn.Identity()
    checkpoint_layers(student, "none")
    with pytest.raises(UserError, match=r"train\.checkpointing: got 'layer'.*set it to 'none'"):
        checkpoint_layers(student, "layer")


def test_modes_can_be_changed_back():
    student, _ = start(change(CONFIG, train={"checkpointing": "layer"}))
    checkpoint_layers(student, "none")
    hidden = forward(student)
    with Attentions() as again:
        hidden.sum().backward()
    assert again.calls == 0


@given(free=st.integers(0, 2**40), vocab=st.integers(2, 300_000), itemsize=st.sampled_from((2, 4)))
def test_automatic_chunks_fit_and_are_powers_of_two(free, vocab, itemsize):
    tokens = auto_chunk_tokens(vocab, itemsize, free)
    smallest, largest = GPU_LOSS_CHUNK_TOKENS
    assert smallest <= tokens <= largest
    assert tokens.bit_count() == 1
    budget = free * LOSS_MEMORY_SHARE
    if tokens > smallest:
        assert 2 * vocab * itemsize * tokens <= budget
    if tokens < largest:
        assert 2 * vocab * itemsize * 2 * tokens > budget - 2 * vocab * itemsize


def test_a_cpu_and_an_explicit_number_ask_no_memory():
    weight = torch.zeros(7, 3)
    assert loss_chunk_tokens(LossConfig(chunk_tokens=0), weight) == CPU_LOSS_CHUNK_TOKENS
    assert loss_chunk_tokens(LossConfig(chunk_tokens=77), weight) == 77
    assert auto_chunk_tokens(7, 4, None) == CPU_LOSS_CHUNK_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_bits_for_every_chunk(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(96, 24, generator=generator).to(dtype) for _ in range(2))
    head = Head(weight=torch.randn(501, 24, generator=generator).to(dtype))
    labels = torch.randint(501, (96,), generator=generator)
    results = []
    # With fewer than 4 rows the product of two matrices takes another kernel.
    for chunk_tokens in (512, 48, 20, 16):
        hidden = student.clone().requires_grad_()
        values = distill(
            hidden,
            teacher,
            head,
            head,
            labels,
            divergence="forward_kl",
            temperature=1.0,
            jsd_beta=0.5,
            chunk_tokens=chunk_tokens,
        )
        values.loss.sum().backward()
        results.append((values.loss.detach(), values.forward_kl, values.student_nll, hidden.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_a_run_in_chunks_teaches_as_whole_rows_do():
    config = change(CONFIG, train={"checkpointing": "layer"})
    whole = one_step(config)
    parts = one_step(change(config, train={"ffn_chunk_tokens": 12}))
    for name, tensor in whole.items():
        atol = 1e-6 * tensor.abs().max().item()
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=atol, msg=name)
