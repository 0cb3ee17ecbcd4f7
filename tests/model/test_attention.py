"""Packed rows attend as their documents do alone; everything else is refused by name."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiny_onn.errors import UserError
from tiny_onn.model.attention import (
    DOCUMENT_ATTENTION,
    QUERY_BLOCK_TOKENS,
    document_attention,
    loop_attention,
    packed_kwargs,
    varlen_attention,
    varlen_supported,
)
from tiny_onn.model.fused_attention import DocumentBlocks

LENGTHS = (7, 1, 12, 3)
HIDDEN = 32
FAMILIES = ("qwen3", "llama", "gemma2", "mistral")


@dataclass
class Row:
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def make_row(lengths: tuple[int, ...], device: str = "cpu") -> Row:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Row(positions.to(device), bounds, max(lengths))


def make_config(family: str) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # The scores must differ enough for a wrong mask to show.
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gemma2":
        sizes |= {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    if family in ("gemma2", "mistral"):
        sizes["sliding_window"] = 5
    return AutoConfig.for_model(family, **sizes)


def make_model(family: str, attention: str = DOCUMENT_ATTENTION) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(family), attn_implementation="eager")
    model.requires_grad_(False)
    model.set_attn_implementation(attention)
    return model.eval()


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def logits_and_gradient(
    model: nn.Module, embeds: Tensor, weights: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    embeds = embeds.clone().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False, **kwargs).logits
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embeds)
    return logits.detach(), gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_row_equals_each_document_alone(family: str) -> None:
    row = make_row(LENGTHS)
    tokens = sum(LENGTHS)
    embeds, weights = random_tensor(1, tokens, HIDDEN), random_tensor(1, tokens, 48, seed=1)
    logits, gradient = logits_and_gradient(
        make_model(family), embeds, weights, **packed_kwargs(row)
    )
    alone = make_model(family, "eager")
    for start, stop in pairwise(row.cu_seqlens.tolist()):
        part = slice(start, stop)
        expected = logits_and_gradient(alone, embeds[:, part], weights[:, part])
        torch.testing.assert_close(logits[:, part], expected[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(gradient[:, part], expected[1], rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_by_blocks_and_by_bounds(family: str) -> None:
    row, model = make_row((70, 1, 90)), make_model(family)
    embeds = random_tensor(1, 161, HIDDEN)
    blocks = DocumentBlocks(row.position_ids[None])
    by_blocks = {"position_ids": row.position_ids[None], "document_blocks": blocks}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found, expected = (
            model(inputs_embeds=embeds, use_cache=False, **kwargs).logits
            for kwargs in (by_blocks, packed_kwargs(row))
        )
    assert blocks.was_used
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(family: str) -> None:
    tokens = sum(LENGTHS)
    embeds, weights = random_tensor(1, tokens, HIDDEN), random_tensor(1, tokens, 48, seed=1)
    kwargs = packed_kwargs(make_row(LENGTHS))
    model = make_model(family).train()
    plain = logits_and_gradient(model, embeds, weights, **kwargs)
    # Versions of transformers before 5.23 have the second name.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    calls: list[nn.Module] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    recomputed = logits_and_gradient(model, embeds, weights, **kwargs)
    assert len(calls) == 2 * len(set(calls)) == 4
    assert torch.equal(plain[0], recomputed[0])
    assert torch.equal(plain[1], recomputed[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_bounds_each_batch_row_is_one_document(family: str) -> None:
    embeds, weights = random_tensor(2, 9, HIDDEN), random_tensor(2, 9, 48, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    ours = logits_and_gradient(make_model(family), embeds, weights, attention_mask=mask)
    eager = logits_and_gradient(make_model(family, "eager"), embeds, weights)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=2e-5)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_as_large_as_a_mask_exists(family: str) -> None:
    lengths = (16,) * 24
    tokens = sum(lengths)
    embeds = random_tensor(1, tokens, HIDDEN)
    with LargestTensor() as largest:
        logits_and_gradient(
            make_model(family), embeds, torch.ones(()), **packed_kwargs(make_row(lengths))
        )
    assert tokens * 48 <= largest.numel < tokens * tokens


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    *,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return the definition's output, with the whole T x T mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    document = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    age = position[:, None] - position
    visible = (document[:, None] == document) & (age >= 0) & (age < (window or len(position)))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def with_gradients(out: Tensor, weights: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)


def make_qkv(
    tokens: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    query = random_tensor(1, heads, tokens, head_dim, seed=2, dtype=torch.float64)
    key = random_tensor(1, kv_heads, tokens, head_dim, seed=3, dtype=torch.float64)
    value = random_tensor(1, kv_heads, tokens, head_dim, seed=4, dtype=torch.float64)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def assert_loop_equals_definition(
    lengths: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    bounds = tuple(make_row(lengths).cu_seqlens.tolist())
    inputs = make_qkv(bounds[-1])
    weights = random_tensor(1, bounds[-1], 4, 4, dtype=torch.float64)
    ours = loop_attention(*inputs, bounds, sliding_window=window, softcap=softcap)
    dense = dense_attention(*inputs, bounds, window=window, softcap=softcap)
    torch.testing.assert_close(
        with_gradients(ours, weights, *inputs), with_gradients(dense, weights, *inputs)
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 10)),
    softcap=st.sampled_from([None, 0.7]),
)
def test_loop_equals_the_masked_definition(
    lengths: list[int], window: int | None, softcap: float | None
) -> None:
    assert_loop_equals_definition(tuple(lengths), window, softcap)


@pytest.mark.parametrize(("window", "softcap"), [(300, None), (None, 0.7), (300, 0.7)])
def test_documents_longer_than_a_query_block_are_exact(
    window: int | None, softcap: float | None
) -> None:
    assert_loop_equals_definition((3, QUERY_BLOCK_TOKENS + 110), window, softcap)


def test_flash_kwargs_alone_are_enough_on_the_cpu() -> None:
    embeds = random_tensor(1, sum(LENGTHS), HIDDEN)
    kwargs = packed_kwargs(make_row(LENGTHS))
    model = make_model("qwen3")
    both = model(inputs_embeds=embeds, **kwargs).logits
    del kwargs["document_bounds"]
    assert torch.equal(model(inputs_embeds=embeds, **kwargs).logits, both)


def test_padding_is_refused() -> None:
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(UserError, match="attention_mask: got padding"):
        make_model("llama")(inputs_embeds=random_tensor(1, 3, HIDDEN), attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_ready_made_masks_are_refused(family: str) -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with pytest.raises(UserError, match="got a ready-made attention_mask"):
        make_model(family)(inputs_embeds=random_tensor(1, 3, HIDDEN), attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_is_refused(family: str) -> None:
    model = make_model(family)
    embeds = random_tensor(1, 9, HIDDEN)
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeds[:, :8], past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="generation"):
        model(inputs_embeds=embeds[:, 8:], past_key_values=cache, use_cache=True)


def test_bidirectional_attention_is_refused() -> None:
    model = make_model("llama")
    model.config.is_causal = False
    with pytest.raises(UserError, match="bidirectional"):
        model(inputs_embeds=random_tensor(1, 3, HIDDEN))


def test_attention_dropout_is_refused_in_training_only() -> None:
    layer = nn.Module()
    query, key, value = make_qkv(3)
    with pytest.raises(UserError, match=r"attention_dropout: got 0\.1, expected 0"):
        document_attention(layer, query, key, value, None, dropout=0.1)
    document_attention(layer.eval(), query, key, value, None, dropout=0.1)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 2, 4), "expected rising ones from 0 to the row's 6"),
        ((1, 2, 6), "expected rising ones from 0"),
        ((0, 6, 6), "expected rising ones"),
        ((0, 7, 6), "expected rising ones"),
        ((0, 6), r"got 2 bounds, expected cu_seq_lens_q's 3"),
    ],
)
def test_bounds_that_do_not_split_the_row_are_refused(
    bounds: tuple[int, ...], message: str
) -> None:
    kwargs = {**packed_kwargs(make_row((2, 4))), "document_bounds": torch.tensor(bounds)}
    with pytest.raises(UserError, match=message):
        make_model("llama")(inputs_embeds=random_tensor(1, 6, HIDDEN), **kwargs)


def test_bounds_with_several_batch_rows_are_refused() -> None:
    with pytest.raises(UserError, match="got a batch of 2 rows, expected 1"):
        make_model("llama")(
            inputs_embeds=random_tensor(2, 6, HIDDEN), **packed_kwargs(make_row((2, 4)))
        )


def test_attention_sinks_are_refused() -> None:
    query, key, value = make_qkv(3)
    with pytest.raises(UserError, match="got s_aux"):
        document_attention(nn.Module(), query, key, value, None, s_aux=torch.zeros(4))


def test_device_bounds_without_host_bounds_are_refused_by_the_loop() -> None:
    query, key, value = (x.detach().to("meta") for x in make_qkv(3))
    bounds = torch.tensor([0, 3], dtype=torch.int32, device="meta")
    with pytest.raises(UserError, match="document_bounds: got none with cu_seq_lens_q on meta"):
        document_attention(nn.Module(), query, key, value, None, cu_seq_lens_q=bounds)


# torch says with every change of this mode that it is a prototype.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel runs on CUDA only")
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 128), (3, 3, 64), (2, 1, 256)])
def test_varlen_is_as_exact_as_the_loop_in_bfloat16(
    window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    # The criterion is |exact - kernel| <= 2 |exact - loop in bfloat16| + 1e-2, by largest element.
    row = make_row((123, 1, 63, 300), "cuda")
    bounds = tuple(row.cu_seqlens.tolist())
    tokens = bounds[-1]
    rounded = [
        x.detach().to("cuda", torch.bfloat16) for x in make_qkv(tokens, heads, kv_heads, head_dim)
    ]
    weights = random_tensor(1, tokens, heads, head_dim).to("cuda", torch.bfloat16)

    def run(kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in rounded]
        query, key, value = inputs
        if kind == "loop":
            out = loop_attention(query, key, value, bounds, sliding_window=window)
        else:
            assert varlen_supported(query, value)
            out = varlen_attention(
                query, key, value, row.cu_seqlens, row.max_seqlen, sliding_window=window
            )
            kwargs = packed_kwargs(row)
            torch.cuda.set_sync_debug_mode("error")
            try:
                chosen, _ = document_attention(
                    nn.Module(), query, key, value, None, sliding_window=window, **kwargs
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(chosen, out)
        return with_gradients(out, weights.to(dtype), *inputs)

    exact = run("loop", torch.float64)
    plain = run("loop", torch.bfloat16)
    kernel = run("varlen", torch.bfloat16)
    for gt, low, ours in zip(exact, plain, kernel, strict=True):
        allowed = 2 * (gt - low).abs().max() + 1e-2
        assert (gt - ours).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel runs on CUDA only")
def test_varlen_without_bounds_takes_each_batch_row_as_one_document() -> None:
    query, key, value = (
        x.detach()
        .to("cuda", torch.bfloat16)
        .unflatten(2, (2, 40))
        .squeeze(0)
        .transpose(0, 1)
        .contiguous()
        for x in make_qkv(80, head_dim=64)
    )
    out, _ = document_attention(nn.Module(), query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel runs on CUDA only")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_equals_each_document_alone_on_cuda(family: str, dtype: torch.dtype) -> None:
    # The error may be three times that of eager against float32, by largest element of the row.
    row = make_row(LENGTHS, "cuda")
    embeds = random_tensor(1, sum(LENGTHS), HIDDEN).to("cuda", dtype)
    weights = random_tensor(1, sum(LENGTHS), 48, seed=1).to("cuda", dtype)
    packed = nn.Module.to(make_model(family), "cuda", dtype)
    ours = logits_and_gradient(packed, embeds, weights, **packed_kwargs(row))

    def alone(precision: torch.dtype) -> list[Tensor]:
        model = nn.Module.to(nn.Module.to(make_model(family, "eager"), "cuda", dtype), precision)
        parts = [
            logits_and_gradient(model, embeds[:, a:b].to(precision), weights[:, a:b].to(precision))
            for a, b in pairwise(row.cu_seqlens.tolist())
        ]
        return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]

    for gt, eager, out in zip(alone(torch.float32), alone(dtype), ours, strict=True):
        assert (gt - out).abs().max() <= 3 * (gt - eager).abs().max() + 1e-4
