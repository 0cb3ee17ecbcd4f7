"""Model folders of strangers: refused before they cost anything; their code does not run."""

import json
import os
import pickle
import shutil
import sys

import huggingface_hub.constants
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file

from reliability.fuzz_targets import Bomb
from tiny import (
    CONFIG,
    change,
    make_dense,
    make_student,
    make_tokenizer,
    save_teacher,
    write_corpus,
)
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.conversion.pipeline import prepare
from tiny_onn.errors import UserError
from tiny_onn.planning.sources import load_shape
from tiny_onn.runs.students import is_student, load_student
from tiny_onn.teacher.load import load_dense

pytestmark = pytest.mark.usefixtures("quiet")

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    make_student(make_dense(vocab_size=320)).save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    return folder


@pytest.fixture
def teacher(saved, tmp_path):
    return shutil.copytree(saved / "teacher", tmp_path / "teacher")


@pytest.fixture
def student(saved, tmp_path):
    return shutil.copytree(saved / "student", tmp_path / "student")


def refusal(folder):
    """The one line that loading a teacher or student ends with."""
    with pytest.raises(UserError) as caught:
        if is_student(str(folder)):
            load_student(str(folder), CPU)
        else:
            load_dense(TeacherConfig(path=str(folder), dtype="float32"), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "config.json has num_hidden_layers = 1000000000, expected at"),
        ("hidden_size", 10**400, "config.json has hidden_size = 0x"),
        ("rope_theta", float("inf"), "config.json has rope_theta = inf"),
        ("quantization_config", {"quant_method": "gptq"}, "its weights are quantised"),
        ("transformers_weights", "../x.safetensors", "names its own weights file"),
    ],
)
def test_configurations_are_bounded_before_a_model_is_built(teacher, name, value, said):
    set_config(teacher, **{name: value})
    assert said in refusal(teacher)
    with pytest.raises(UserError, match=r"teacher\.path: got "):
        load_shape(teacher, TeacherConfig())


def test_a_configuration_larger_than_its_weights_is_refused_before_memory_is_taken(teacher):
    # 80 GB if it were built.
    set_config(teacher, hidden_size=2**20, head_dim=8)
    assert "config.json describes a model of" in refusal(teacher)


@pytest.mark.parametrize("content", ["[1]", "3", "", "{", "[" * 100_000, "\udcff"])
def test_a_configuration_that_is_no_object_is_told(teacher, content):
    (teacher / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert ": config.json " in refusal(teacher)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe"])
def test_a_file_with_a_byte_order_mark_is_told_with_the_remedy(teacher, student, name, mark):
    for folder in (teacher, student):
        (folder / name).write_bytes(mark + (folder / name).read_bytes())
    said = f"{name} begins with a byte order mark, expected plain UTF-8; save it without the mark"
    assert said in refusal(teacher)
    if mark == b"\xef\xbb\xbf":
        assert said in refusal(student)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "..", "", 3, "m.bin"]
)
def test_an_index_names_files_of_its_own_folder_only(teacher, saved, name):
    shutil.copytree(saved / "teacher", teacher.parent / "other")
    names = dict.fromkeys(load_file(teacher / WEIGHTS), name)
    (teacher / WEIGHTS).unlink()
    (teacher / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    assert "names the file" in refusal(teacher)


def test_an_index_of_plain_names_loads(teacher):
    weights = load_file(teacher / WEIGHTS)
    (teacher / WEIGHTS).rename(teacher / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"),
    }
    (teacher / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert load_dense(TeacherConfig(path=str(teacher)), CPU)[0].config.model_type == "llama"


def test_a_missing_shard_is_told(teacher):
    (teacher / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": "model-2.safetensors"}}
    (teacher / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in refusal(teacher)


@pytest.mark.parametrize("length", [10**9, 2**63, 2**64 - 1])
def test_an_oversize_header_is_refused(teacher, length):
    (teacher / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    assert "SafetensorError" in refusal(teacher)


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_nothing_is_unpickled(saved, tmp_path, kind, name):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    canary = tmp_path / "RAN"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(str(canary))))
    assert str(folder) in refusal(folder)
    assert not canary.exists()
    # The bomb works.
    pickle.loads((folder / name).read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: first(weights).view(-1)[0].fill_(float("nan")), "holds NaN or infinite"),
        (lambda weights: first(weights).fill_(float("-inf")), "holds NaN or infinite"),
        (lambda weights: weights.pop(next(iter(weights))), "of the model's tensors ("),
    ],
)
def test_damaged_tensors_are_named(saved, tmp_path, kind, change, said):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    set_weights(folder, change)
    assert said in refusal(folder)


def first(weights):
    return next(iter(weights.values()))


def test_tensors_that_the_configuration_has_no_place_for_are_named(teacher):
    set_weights(teacher, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}))
    message = refusal(teacher)
    assert "hold 1 tensors that its config.json has no place for (model.layers.2.mlp" in message


def test_quantised_tensors_are_named(teacher):
    name = "model.layers.0.mlp.up_proj.weight"
    set_weights(teacher, lambda w: w.update({name: w[name].to(torch.int8)}))
    assert f"holds {name} as I8, expected one of F64, F32, F16, BF16" in refusal(teacher)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_logits_that_are_no_numbers_are_told(saved, tmp_path, kind):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    # Each weight is finite; the attention's scores are not.
    set_weights(folder, lambda w: [v.mul_(1e30) for k, v in w.items() if "self_attn" in k])
    assert "logits hold NaN or infinite numbers" in refusal(folder)


def test_a_model_that_does_not_run_is_told(teacher):
    set_config(teacher, output_hidden_states=["a"])
    assert "it does not run on 24 tokens (TypeError" in refusal(teacher)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_pipes_are_not_opened(teacher, student, name):
    for folder in (teacher, student):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        message = refusal(folder)
        assert "expected a regular file" in message or "expected a run folder" in message


def test_an_adapter_is_refused(teacher):
    (teacher / "adapter_config.json").write_text("{}")
    assert "adapter_config.json makes it an adapter" in refusal(teacher)


def test_a_file_is_no_folder(teacher):
    message = refusal(teacher / WEIGHTS)
    assert "expected a folder with a model" in message


def test_a_tokenizer_that_its_library_cannot_parse_is_told(teacher):
    file = teacher / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": 3}))
    assert "with its tokenizer (" in refusal(teacher)


def test_a_students_teacher_is_a_name(student):
    set_config(student, teacher=["embedded"])
    assert "teacher or teacher_revision in config.json is no string" in refusal(student)


@pytest.mark.parametrize("trusted", [False, True])
def test_remote_code_runs_only_when_asked(teacher, tmp_path, monkeypatch, trusted):
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    canary = tmp_path / "RAN"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nraise ValueError('ran')\n"
    (teacher / "configuration_evil.py").write_text(code)
    set_config(teacher, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    config = TeacherConfig(path=str(teacher), trust_remote_code=trusted)
    with pytest.raises(UserError, match="ran" if trusted else "if you trust its author"):
        load_dense(config, CPU)
    assert canary.exists() == trusted


def test_a_hub_id_is_read_at_one_commit_which_the_conversion_records(saved, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    entry = tmp_path / "models--someone--something"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "v1").write_text(commit)
    shutil.copytree(saved / "teacher", entry / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    sources = (str(write_corpus(tmp_path / "corpus")),)
    for revision in ("v1", commit):
        config = change(
            CONFIG,
            teacher={"path": "someone/something", "revision": revision},
            data={"sources": sources},
        )
        conversion = prepare(config).conversion
        assert conversion is not None
        assert conversion.teacher_commit == commit
    local = change(config, teacher={"path": str(saved / "teacher")})
    conversion = prepare(local).conversion
    assert conversion is not None
    assert conversion.teacher_commit is None
