"""A wrong way to attend is not timed, and ratios name what was measured."""

from dataclasses import replace

import pytest
import torch

from benchmarks.packed_attention import make_case, parity, ratios_of
from tiny_onn.data.packing import build_row

CPU = torch.device("cpu")


@pytest.fixture
def eager():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_documents_other_than_those_of_the_peer_are_not_timed():
    case = make_case("tiny", (130, 126, 44), CPU, torch.float32)
    assert max(parity(case, ["loop", "flex"]).values()) < 1e-6
    others = build_row([[0] * length for length in (130, 125, 45)], row_tokens=300, pad_token_id=0)
    with pytest.raises(SystemExit, match=r"flex.*no time is reported"):
        parity(replace(case, row=others), ["loop", "flex"])


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
    case = make_case("SmolLM2-135M", lengths, torch.device("cuda"), torch.bfloat16)
    gaps = parity(case, ["flash", "flash deterministic", "flex"])
    assert len(gaps) == 8
