"""A teacher loads frozen and ready, or one line says what is wrong with it."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tiny import SIZES, make_dense, make_ids, make_student, save_teacher
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.teacher.load import load_dense, teacher_for

pytestmark = pytest.mark.usefixtures("quiet")

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "good")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def load(path, **options):
    return load_dense(TeacherConfig(path=str(path), **options), CPU)


def refusal(path, **options):
    """The one line that loading ends with."""
    with pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_teacher_loads_frozen_and_ready_for_packed_rows(saved, dtype):
    dense, tokenizer = load(saved, dtype=dtype)
    assert dense.dtype == getattr(torch, dtype)
    assert not dense.training
    assert not any(p.requires_grad for p in dense.parameters())
    assert dense.config._attn_implementation == DOCUMENT_ATTENTION
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"
    expected = make_dense("llama", dtype=dtype, vocab_size=320)
    if dtype == "float32":
        assert torch.equal(dense(make_ids()).logits, expected(make_ids()).logits)


def test_home_and_relative_paths_are_understood(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    monkeypatch.chdir(saved.parent)
    for path in ("~/good", "./good", "good"):
        assert load(path)[0].config.model_type == "llama"


def test_a_hub_id_loads_from_the_local_cache_without_network(saved, tmp_path, monkeypatch, offline):
    commit = "0123456789" * 4
    entry = tmp_path / "models--someone--something"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    shutil.copytree(saved, entry / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    dense, tokenizer = load("someone/something")
    assert dense.config.model_type == "llama"
    assert len(tokenizer) <= 320
    message = refusal("someone/something", revision="v2")
    assert f"it is not in the local cache ({tmp_path}) at revision v2" in message


def test_a_hub_id_without_network_or_cache_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("nobody/nothing")
    assert message.startswith("teacher.path: got nobody/nothing, expected a folder with a model")
    assert f"no folder {Path.cwd() / 'nobody/nothing'} is there" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "use a local folder or embedded, the model among the packages; a hub id" in message
    assert "a hub id needs a network or a local cache" in message


@pytest.mark.parametrize("name", ["a b", "one/two/three"])
def test_names_that_are_no_hub_ids_are_refused(name, offline):
    assert refusal(name).startswith(f"teacher.path: got {name}, expected")


def test_a_missing_folder_is_refused(tmp_path):
    for path in (tmp_path / "none", "./none", "~/none"):
        assert "expected a folder with a model, which is not there" in refusal(path)


def test_a_folder_without_configuration_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonesuch"}', "[]"])
def test_a_configuration_of_no_model_is_refused(copied, text):
    (copied / "config.json").write_text(text)
    assert re.match(rf"teacher\.path: got {copied}(: config\.json|, expected)", refusal(copied))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral", "opt", "glm4"])
def test_unsupported_architectures_are_refused_before_any_weight_is_read(family, tmp_path):
    # There are no weights to read.
    sizes = {name: value for name, value in SIZES.items() if "token" not in name}
    AutoConfig.for_model(family, **sizes, pad_token_id=0).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert message.startswith(f"teacher.path: got {tmp_path}: architecture ")
    assert f"(model_type '{family}') cannot be converted" in message


def test_mlp_biases_are_refused_before_any_weight_is_read(tmp_path):
    AutoConfig.for_model("llama", **SIZES, mlp_bias=True).save_pretrained(tmp_path)
    assert "layer 0's MLP has biases" in refusal(tmp_path)


def test_a_student_is_refused_as_a_teacher(tmp_path):
    make_student(make_dense("llama")).save_pretrained(tmp_path)
    assert "a Tiny-ONN student, expected a dense model" in refusal(tmp_path)


def test_pickled_weights_are_refused_unread(copied):
    weights = load_file(copied / WEIGHTS)
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / WEIGHTS).unlink()
    message = refusal(copied)
    assert "expected a causal language model in safetensors format" in message


@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_damaged_weights_are_refused(copied, keep):
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content[: int(keep if keep != 0.5 else len(content) / 2)])
    assert "in safetensors format" in refusal(copied)


def test_weights_that_lack_a_tensor_are_refused(copied):
    weights = load_file(copied / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / WEIGHTS, metadata={"format": "pt"})
    message = refusal(copied)
    assert "lack 1 of the model's tensors (model.layers.1.mlp.up_proj.weight first)" in message


def test_weights_of_another_shape_are_refused(copied):
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"intermediate_size": 96}))
    assert refusal(copied).startswith(f"teacher.path: got {copied}, expected")


def test_a_teacher_without_tokenizer_is_refused(copied):
    for file in copied.glob("token*"):
        file.unlink()
    assert "with its tokenizer" in refusal(copied)


def test_a_shared_teacher_is_the_dense_model_and_a_separate_one_a_copy():
    dense = make_dense("llama")
    assert teacher_for(dense, TeacherConfig(placement="shared")) is dense
    copy = teacher_for(dense, TeacherConfig(placement="separate"))
    assert torch.equal(copy(make_ids()).logits, dense(make_ids()).logits)
    theirs = {p.data_ptr() for p in dense.parameters()}
    assert not theirs & {p.data_ptr() for p in copy.parameters()}
    assert copy.config._attn_implementation == DOCUMENT_ATTENTION


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"train\.device: got cuda:99, expected a device of this"):
        pick_device("cuda:99")
    with pytest.raises(UserError, match=r"train\.device: got .*gpu.*, expected"):
        pick_device("gpu")
