"""Attention by document blocks is the definition's, and repeats its bits on a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from tiny import make_dense
from tiny_onn.config.schema import TrainConfig
from tiny_onn.model import fused_attention
from tiny_onn.model.attention import document_attention, loop_attention
from tiny_onn.model.fused_attention import BLOCK_TOKENS, DocumentBlocks, block_obstacle

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs backward")
LENGTHS = (130, 126, 1, 300)
# Softcap and window of each family's layers: Qwen3, Mistral, Gemma 2.
RULES = ({}, {"sliding_window": 50}, {"softcap": 3.0, "sliding_window": 1}, {"softcap": 3.0})


@pytest.fixture
def eager():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def blocks_of(lengths, device="cpu"):
    positions = torch.cat([torch.arange(length) for length in lengths])
    return DocumentBlocks(positions[None].to(device))


def tensors(lengths, *, heads=4, kv_heads=2, channels=16, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for number in (heads, kv_heads, kv_heads):
        drawn = torch.randn(1, sum(lengths), number, channels, generator=generator)
        yield drawn.transpose(1, 2).to(device, dtype)


def defined(lengths, window):
    """Which keys a query sees: those of its own document, up to itself, in the window."""
    ones = [torch.ones(n, n).tril() for n in lengths]
    seen = torch.block_diag(*ones).bool()
    return seen if window is None else seen & ~torch.ones_like(seen).tril(-window)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 400),
)
@example(lengths=[512], window=None)
@example(lengths=[128, 128, 256], window=128)
@example(lengths=[127, 1, 129, 127], window=129)
@example(lengths=[1], window=1)
def test_the_block_mask_of_documents_is_that_of_the_definition(lengths, window):
    tokens = sum(lengths)
    got = blocks_of(lengths).mask(window)
    assert got.shape == (1, 1, tokens, tokens)
    seen = create_mask(got.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
    assert torch.equal(seen, defined(lengths, window))
    # torch looks at every pair of tokens for it.
    expected = create_block_mask(got.mask_mod, 1, 1, tokens, tokens, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, places = (f"{kind}_num_blocks", f"{kind}_indices")
        assert torch.equal(getattr(got, counts), getattr(expected, counts))
        assert torch.equal(getattr(got, places), getattr(expected, places))
        assert getattr(got, places).is_contiguous()


def test_layers_of_one_window_share_a_mask():
    blocks = blocks_of(LENGTHS)
    assert blocks.mask(50) is blocks.mask(50)
    assert blocks.mask(50) is not blocks.mask(51)


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("rule", RULES)
def test_documents_attend_by_blocks_as_in_the_loop(rule):
    assert_as_the_loop(rule)


@pytest.mark.compiled
def test_compiled_blocks_attend_as_the_loop_and_other_documents_compile_nothing_anew():
    for rule in RULES:
        assert_as_the_loop(rule)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_as_the_loop({}, tuple(reversed(LENGTHS)))
        assert_as_the_loop({}, (sum(LENGTHS),))


def assert_as_the_loop(rule, lengths=LENGTHS):
    query, key, value = tensors(lengths)
    arguments = {"scaling": 0.3, **rule}
    out, _ = document_attention(
        nn.Module(), query, key, value, None, document_blocks=blocks_of(lengths), **arguments
    )
    bounds = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    expected = loop_attention(query, key, value, bounds, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()


def test_what_keeps_training_rows_from_blocks_is_named():
    model, train = make_dense("qwen3"), TrainConfig()
    assert block_obstacle(model, train, 512) == "the device is no GPU"


@pytest.mark.parametrize(
    ("head_dim", "capability", "shared", "reason"),
    [
        (128, (8, 6), 101_376, None),
        (256, (9, 0), 232_448, None),
        (256, (8, 9), 101_376, "heads of 256 channels do not fit"),
        (64, (7, 5), 65_536, "compute capability is below 8.0"),
    ],
)
def test_gpus_that_cannot_run_the_kernel_take_the_other_ways(
    monkeypatch, head_dim, capability, shared, reason
):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(fused_attention, "triton_runs_on", lambda device_type: True)
    model = make_dense("qwen3", head_dim=head_dim)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    found = block_obstacle(model, TrainConfig(), 512)
    assert found == reason or str(reason) in str(found)


@gpu
def test_small_heads_short_rows_and_settings_keep_training_rows_from_blocks():
    train = TrainConfig()
    model = make_dense("qwen3", head_dim=16)
    nn.Module.to(model, "cuda")
    assert block_obstacle(model, train, BLOCK_TOKENS) is None
    assert "shorter than 128" in str(block_obstacle(model, train, BLOCK_TOKENS - 1))
    selective = replace(train, checkpointing="selective")
    assert "selective" in str(block_obstacle(model, selective, 512))
    assert "train.compile is false" in str(
        block_obstacle(model, replace(train, compile=False), 512)
    )
    small = make_dense("qwen3", head_dim=8)
    nn.Module.to(small, "cuda")
    assert "8 channels" in str(block_obstacle(small, train, 512))


# The backward pass runs in a thread of its own, which opens the GPU with a warning.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
@gpu
@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(16, 8, 128), (9, 3, 64), (4, 1, 256)])
@pytest.mark.parametrize("lengths", [LENGTHS, (2000, 1500, 596)])
def test_gradients_by_blocks_are_as_exact_as_the_loops_and_repeat_their_bits(lengths, shape, rule):
    # The criterion is |exact - kernel| <= 2 |exact - loop in bfloat16| + 1e-2, by largest element.
    heads, kv_heads, channels = shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "channels": channels}
    rounded = list(tensors(lengths, **sizes, device="cuda", dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(1, sum(lengths), heads, channels, generator=generator).cuda()
    bounds = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())

    def run(way, dtype):
        q, k, v = (tensor.to(dtype, copy=True).requires_grad_() for tensor in rounded)
        if way == "loop":
            out = loop_attention(q, k, v, bounds, **rule)
        else:
            out = blocks_of(lengths, "cuda").attend(q, k, v, **rule)
        return out, *torch.autograd.grad(out, (q, k, v), weights.to(dtype))

    exact, low = run("loop", torch.float64), run("loop", torch.bfloat16)
    first, second = (run("blocks", torch.bfloat16) for _ in range(2))
    for truth, plain, ours, again in zip(exact, low, first, second, strict=True):
        assert (truth - ours).abs().max() <= 2 * (truth - plain).abs().max() + 1e-2
        assert torch.equal(ours, again)


@gpu
@pytest.mark.gpu
@pytest.mark.compiled
def test_blocks_are_made_and_attend_within_a_captured_graph():
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()
    query, key, value = tensors(LENGTHS, device="cuda", dtype=torch.bfloat16)
    DocumentBlocks(positions).attend(query, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = DocumentBlocks(positions).attend(query, key, value)
    for lengths in (LENGTHS, tuple(reversed(LENGTHS))):
        positions.copy_(torch.cat([torch.arange(length) for length in lengths])[None])
        graph.replay()
        expected = blocks_of(lengths, "cuda").attend(query, key, value)
        assert torch.equal(out, expected)


def test_the_kernel_is_compiled_once_per_process():
    assert fused_attention._compiled_flex() is fused_attention._compiled_flex()
