"""A row's passes replayed from CUDA graphs give the bits of passes that the host launches."""

from dataclasses import replace

import pytest
import torch

from tiny import VOCAB, make_dense, normal
from tiny_onn.config.read import load_config
from tiny_onn.conversion.convert import convert
from tiny_onn.data.packing import build_row
from tiny_onn.device import prepare_device
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.step import distill_step
from tiny_onn.model.expert_path import set_objective
from tiny_onn.teacher.cache import encoded

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Compiling warns of what it does, and the backward pass opens the GPU in a thread of its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = 512
ROWS = ([100, 200, 212], [512], [90, 300, 122], [512], [60] * 8, [512], [2, 510], [500])


def rows_of(*documents):
    generator = torch.Generator().manual_seed(0)
    for lengths in documents:
        fragments = [
            torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths
        ]
        yield build_row(fragments, row_tokens=TOKENS, pad_token_id=0)


def train(settings, rows, rows_per_step, graphs):
    config = load_config(None, None, [f"train.cuda_graphs={str(graphs).lower()}", *settings])
    config, device = prepare_device(config)
    dense = make_dense(
        "qwen3",
        dtype="bfloat16",
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        max_position_embeddings=TOKENS,
    )
    torch.nn.Module.to(dense, device)
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator)
    teacher = replace(config.teacher, dtype="bfloat16")
    set_objective(student.banks(), config)
    training = assemble(replace(config, teacher=teacher), student, dense)
    found = []
    for step in range(0, len(rows), rows_per_step):
        result = distill_step(
            training.student,
            training.teacher,
            training.optimizer,
            rows[step : step + rows_per_step],
            training.config,
            step=step,
            passes=training.passes,
        )
        measured = [result.loss, result.forward_kl, result.expert_grad_norm, result.gate_grad_norm]
        measured += [*result.token_losses, result.stats.load_LE, result.stats.gate_entropy_L]
        measured += [part for tally in result.tallies for part in tally]
        if result.states_error is not None:
            measured.append(result.states_error)
        found.append([value.clone() for value in map(torch.as_tensor, measured)])
    return found, student.state_dict(), training.passes


RECIPES = {
    "card": [
        "router.selection=top_k",
        "smk.surprise=parameters",
        "smk.direction=min",
        "smk.candidates=active",
    ],
    "budget": ["loss.states_coef=1.0", "router.revive_after_steps=1", "router.balance_rate=0.01"],
    "mean outputs": ["experts.compensation=mean", "optim.master_dtype=bfloat16"],
    "task": ["router.objective=task"],
    "regression": ["router.objective=regression"],
    "sparse": ["train.expert_path=sparse", "smk.lesson_share=0.25"],
    "sparse, top k": [
        "train.expert_path=sparse",
        "smk.lesson_share=0.25",
        "router.selection=top_k",
    ],
}


@gpu
@pytest.mark.compiled
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_change_no_bit(recipe, checkpointing):
    if recipe.startswith("sparse"):
        pytest.importorskip("triton")
    settings = [f"train.checkpointing={checkpointing}", *RECIPES[recipe]]
    assert_graphs_change_no_bit(settings, list(rows_of(*ROWS)))


@gpu
@pytest.mark.compiled
@pytest.mark.parametrize("states_format", ["bfloat16", "int8"])
def test_graphs_read_the_stored_states_of_every_row(states_format):
    rows = []
    for seed, row in enumerate(rows_of(*ROWS)):
        states_TD, scales = encoded(normal(TOKENS, 64, seed=seed), states_format)
        rows.append(replace(row, teacher_states=states_TD, teacher_scales=scales))
    assert_graphs_change_no_bit(RECIPES["card"], rows)


def assert_graphs_change_no_bit(recipe, rows):
    """Steps of one row and of two give the same bits with graphs and without."""
    settings = [
        "experts.num_experts=4",
        "experts.init=slices",
        "experts.gate_init=random",
        "router.target_k=2.0",
        f"data.row_tokens={TOKENS}",
        "loss.chunk_tokens=128",
        *recipe,
    ]
    torch._dynamo.reset()
    for rows_per_step in (1, 2):
        plain, weights, passes = train(settings, rows, rows_per_step, graphs=False)
        assert passes._graph is None
        graphed, others, passes = train(settings, rows, rows_per_step, graphs=True)
        assert passes._graph is not None
        for step, (ours, theirs) in enumerate(zip(graphed, plain, strict=True)):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other), step
        for name, tensor in weights.items():
            assert torch.equal(tensor, others[name]), name
