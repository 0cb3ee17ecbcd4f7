"""A dense model that chats and a student of it, in folders, as users have them."""

import pytest
import torch

from tiny import make_student, save_teacher
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.teacher.load import load_dense

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['content'] == 'no' %}"
    "{{ raise_exception('no system message') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a dense model without a chat template."""
    return str(save_teacher(tmp_path_factory.mktemp("teacher"), max_position_embeddings=4096))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The folder of its student, whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("student")
    config = TeacherConfig(path=teacher, dtype="float32")
    dense, tokenizer = load_dense(config, torch.device("cpu"))
    network = make_student(dense)
    for bank in network.banks():
        # A table with which the mean k can be chosen: thresholds that fall as k rises.
        bank.router.threshold_table.copy_(torch.linspace(0.5, 0.0, 8))
        bank.router.threshold_table[-1] = -1.0
    network.config.teacher = teacher
    network.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)
