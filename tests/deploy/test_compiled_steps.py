"""Answers whose steps are compiled: the same text, few compilations, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tiny_onn.deploy.answers import Speaker, load_speaker
from tiny_onn.deploy.compiled_steps import MIN_CACHE_TOKENS, check_controller, fixed_cache
from tiny_onn.deploy.generate import run_generate
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM

pytestmark = pytest.mark.usefixtures("quiet")
CPU = torch.device("cpu")
GREEDY: Any = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}


def load(model: str) -> Speaker:
    return load_speaker(model, CPU)


def answered(speaker: Speaker, text: str = "the cat") -> list[tuple[int, float | None]]:
    answer = speaker.answer(speaker.prompt_ids(text), GREEDY)
    return [(token.id, token.num_experts) for token in answer.tokens]


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_cache_of_fixed_length_changes_no_token(kind, request):
    speaker = load(request.getfixturevalue(kind))
    assert answered(replace(speaker, compiled=True)) == answered(speaker)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_answers_share_one_compiled_step(kind, request):
    speaker, graphs = load(request.getfixturevalue(kind)), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    # A CPU's steps are compiled too, without a compiler behind the graph.
    options: Any = CompileConfig(backend=backend, mode=None, fullgraph=True)  # pyright: ignore[reportArgumentType]
    options._compile_all_devices = True
    config: Any = speaker.network.generation_config
    config.compile_config = options
    texts = "the cat", "the cat sat on the mat"
    wanted = [answered(speaker, text) for text in texts]
    assert not graphs
    compiled = replace(speaker, compiled=True)
    assert [answered(compiled, text) for text in texts] == wanted
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, MIN_CACHE_TOKENS), (MIN_CACHE_TOKENS, MIN_CACHE_TOKENS), (1025, 2048)],
)
def test_lengths_are_powers_of_two(tokens, length, teacher):
    assert fixed_cache(load(teacher).network, tokens).get_max_length() == length


def test_a_cpu_is_refused(teacher):
    with pytest.raises(UserError, match=r"^--compile: got the device cpu, expected a GPU"):
        run_generate(teacher, prompt="the cat", device="cpu", compiled=True, **GREEDY)


def test_quantised_experts_are_refused(student):
    with pytest.raises(UserError, match=r"^--compile: got it with --quantize nf4"):
        load_speaker(student, torch.device("cuda"), quantize="nf4", compiled=True)


def test_a_budget_that_follows_sequences_is_refused(student):
    network = TinyOnnForCausalLM.from_pretrained(student)
    network.routing_controller = "sequence"
    with pytest.raises(UserError, match=r"^--compile: got a student with the routing_controller"):
        check_controller(network)
