"""The block mask of packed documents is that of the definition, and a wrong one is not timed."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from benchmarks import packed_attention
from benchmarks.packed_attention import document_mask, make_case, parity, ratios_of

CPU = torch.device("cpu")


def bounds_of(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def defined(lengths):
    """Which keys a query sees: those of its own document, up to itself."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6).filter(any))
@example(lengths=[512])
@example(lengths=[128, 128, 256])
@example(lengths=[127, 1, 129, 127])
@example(lengths=[300, 0, 0])
@example(lengths=[0, 700, 0, 5])
@example(lengths=[1])
def test_the_block_mask_of_documents_is_that_of_the_definition(lengths):
    tokens = sum(lengths)
    got = document_mask(bounds_of(lengths), tokens)
    assert got.shape == (1, 1, tokens, tokens)
    seen = create_mask(got.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
    assert torch.equal(seen, defined([n for n in lengths if n]))
    # torch looks at every pair of tokens for it.
    expected = create_block_mask(got.mask_mod, 1, 1, tokens, tokens, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, places = (f"{kind}_num_blocks", f"{kind}_indices")
        assert torch.equal(getattr(got, counts), getattr(expected, counts))
        assert torch.equal(getattr(got, places), getattr(expected, places))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_documents_other_than_those_of_the_peer_are_not_timed():
    case = make_case("tiny", (130, 126, 44), CPU, torch.float32)
    assert max(parity(case, ["loop", "flex"]).values()) < 1e-6
    wrong = replace(case, cu_seqlens=bounds_of([130, 125, 45]))
    with pytest.raises(SystemExit, match=r"flex.*no time is reported"):
        parity(wrong, ["loop", "flex"])


def test_ratios_name_the_peer_and_lack_what_was_not_measured():
    case = make_case("tiny", (130, 126, 44), CPU, torch.float32)
    where = "tiny, 300 tokens, documents=3"

    def row(way, forward, backward):
        return {"way": way, "forward_ms": forward, "backward_ms": backward}

    rows = [row("flash", 2.0, 4.0), row("flash deterministic", 2.0, 40.0), row("flex", 1.0, 3.0)]
    assert ratios_of(case, rows) == {
        f"flex / flash deterministic, forward, {where}": 0.5,
        f"flex / flash, forward, {where}": 0.5,
        f"flex / flash deterministic, backward, {where}": 0.075,
        f"flex / flash, backward, {where}": 0.75,
    }
    assert ratios_of(case, [{"way": "flex", "forward_ms": 1.0}]) == {}


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel runs on CUDA only")
@pytest.mark.parametrize("lengths", [(130, 126, 44), (700, 68)])
def test_flex_attention_gives_what_the_flash_kernel_gives_and_repeats_its_bits(lengths):
    flex = torch.compile(packed_attention.flex_attention, dynamic=False)
    device = torch.device("cuda")
    case = make_case("SmolLM2-135M", lengths, device, torch.bfloat16, flex)
    gaps = parity(case, ["flash", "flash deterministic", "flex"])
    assert len(gaps) == 8
