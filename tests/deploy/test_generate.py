"""Generation from the command line: what is refused, and that a seed decides the text."""

import pytest

from tiny import save_teacher
from tiny_onn.deploy.generate import run_generate
from tiny_onn.errors import UserError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_teacher(tmp_path_factory.mktemp("teacher")))


def generate(teacher, prompt="the cat", seed=0, temperature=1.0):
    return run_generate(
        teacher, prompt=prompt, max_new_tokens=8, temperature=temperature, seed=seed, device="cpu"
    )


def test_the_seed_decides_the_text(teacher):
    texts = [generate(teacher, seed=seed) for seed in (2**40, 2**40, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_temperature_zero_takes_the_likeliest(teacher):
    assert len({generate(teacher, seed=seed, temperature=0.0) for seed in range(3)}) == 1


@pytest.mark.parametrize(("prompt", "said"), [("", "got an empty text"), ("a\udcff", "not UTF-8")])
def test_a_bad_prompt_is_refused(teacher, prompt, said):
    with pytest.raises(UserError, match=f"^--prompt: .*{said}"):
        generate(teacher, prompt=prompt)
