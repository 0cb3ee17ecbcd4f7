"""What cannot be distilled faithfully is refused by name when it is loaded, in one line."""

import json
import socket
import time
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tiny import CONFIG, FAMILIES, OTHERS, SIZES, make_dense, save_teacher
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.deploy.generate import run_generate
from tiny_onn.errors import UserError
from tiny_onn.planning.plan import plan
from tiny_onn.probe.probe import run_probe
from tiny_onn.runs.students import load_student
from tiny_onn.teacher import model_paths
from tiny_onn.teacher.load import load_dense
from tiny_onn.teacher.model_files import check_config_table
from tiny_onn.teacher.model_paths import find_model
from tiny_onn.teacher.packed_check import check_packing

pytestmark = pytest.mark.usefixtures("quiet")

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
GPU = "48,91,864"


class Around(nn.Module):
    """Attention with something wrong with it."""

    def __init__(self, inner: nn.Module, fault: str) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if self.fault == "forgets bounds":
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "document_bounds")
            kwargs = {name: value for name, value in kwargs.items() if name not in names}
        if self.fault == "forgets blocks":
            kwargs = {name: value for name, value in kwargs.items() if name != "document_blocks"}
        if self.fault == "fails":
            raise KeyError("a key of the family's own")
        output, weights = self.inner(hidden_states, **kwargs)
        if self.fault == "looks ahead":
            output = output + nn.functional.pad(hidden_states[:, 1:], (0, 0, 0, 1))
        if self.fault == "looks back":
            output = output + nn.functional.pad(hidden_states[:, :-1], (0, 0, 1, 0))
        return output, weights


def refusal_of(model):
    with pytest.raises(UserError) as caught:
        check_packing(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusals(folder):
    """What distill and plan say of a model's folder."""
    messages = []
    for work in (
        lambda: load_dense(TeacherConfig(path=str(folder), dtype="float32"), CPU),
        lambda: plan(CONFIG, str(folder), GPU),
    ):
        with pytest.raises(UserError) as caught:
            work()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("teacher.path: ")
        messages.append(str(caught.value))
    return messages


@DTYPES
@pytest.mark.parametrize("num_layers", [2, 12])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_supported_families_keep_documents_apart(family, dtype, num_layers):
    check_packing(make_dense(family, dtype=dtype, num_hidden_layers=num_layers))


@DTYPES
def test_a_family_that_drops_the_bounds_is_refused_by_name(dtype):
    message = refusal_of(make_dense("stablelm", dtype=dtype))
    assert message.startswith("architecture StableLmForCausalLM (model_type 'stablelm') cannot be")
    assert "in a row of packed documents a document sees the ones before it" in message


def test_a_teacher_that_drops_the_bounds_is_refused_on_loading(tmp_path):
    folder = save_teacher(tmp_path / "teacher", "stablelm")
    with pytest.raises(UserError, match=r"teacher\.path: got .*StableLm.*packed documents"):
        load_dense(TeacherConfig(path=str(folder), dtype="float32"), CPU)


@DTYPES
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("forgets bounds", "since its layers do not hand the documents' bounds on"),
        ("forgets blocks", "since its layers do not hand the documents' blocks on"),
        ("looks back", "a document sees the ones before it"),
        ("looks ahead", "a token sees later ones"),
        ("fails", 'does not run on 24 tokens (KeyError: "a key of the family\'s own")'),
    ],
)
def test_one_faulty_layer_of_many_is_enough(fault, said, dtype):
    model: Any = make_dense("gemma2", dtype=dtype, num_hidden_layers=6)
    layer = model.model.layers[4]
    layer.self_attn = Around(layer.self_attn, fault)
    assert said in refusal_of(model)


@pytest.mark.parametrize("vocab_size", [2, 3, 5])
def test_small_vocabularies_are_checked_too(vocab_size):
    sizes = {"vocab_size": vocab_size, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    check_packing(make_dense("llama", **sizes))
    assert "packed documents" in refusal_of(make_dense("stablelm", **sizes))


def test_a_window_that_attention_is_not_told_of_is_found():
    model: Any = make_dense("gemma2", sliding_window=64)
    check_packing(model)
    assert model.config.sliding_window == 64
    assert model.model.layers[0].self_attn.sliding_window == 64
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert "its attention is of another kind" in refusal_of(model)


@pytest.mark.parametrize("family", ["granite_swa", "doge"])
def test_attention_of_another_kind_is_refused_by_name(family):
    message = refusal_of(make_dense(family, head_dim=8))
    assert f"(model_type '{family}') cannot be used: attention: got " in message
    assert "set_attn_implementation" not in message


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid", "mamba", "jamba", "falcon_h1"])
def test_layers_without_attention_are_refused_before_any_weight_is_read(family, tmp_path):
    options = SIZES | HYBRID if family == "qwen3_5_text" else {}
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    for message in refusals(tmp_path):
        assert f"(model_type '{family}') cannot be converted: layer 0 has no module" in message


@pytest.mark.parametrize(
    ("family", "remedy"),
    [
        ("gemma3", "save its text part (model_type 'gemma3_text') as a Gemma3ForCausalLM"),
        ("gemma3n", "save its text part (model_type 'gemma3n_text') as a Gemma3nForCausalLM"),
        ("llava", "save its text part (model_type 'llama') as a LlamaForCausalLM"),
        ("qwen2_5_vl", "is no causal language model of transformers either"),
        ("qwen3_vl", "is no causal language model of transformers either"),
        ("emu3", "is no causal language model of transformers either"),
        ("qwen3_5", "its text part is not supported: architecture Qwen3_5ForCausalLM"),
        ("mllama", "is no causal language model of transformers either"),
    ],
)
def test_multimodal_models_are_called_so(family, remedy, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    for message in refusals(tmp_path):
        assert f"it is a multimodal model (model_type '{family}')" in message
        assert remedy in message
        assert "tokenizer.json" not in message


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_models_that_are_no_causal_ones_are_called_so(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    for message in refusals(tmp_path):
        assert f"model_type '{family}', which is no causal language model" in message


def test_a_teacher_with_dropout_loads_and_is_planned(tmp_path):
    folder = save_teacher(tmp_path / "teacher", "llama", attention_dropout=0.1)
    assert not load_dense(TeacherConfig(path=str(folder), dtype="float32"), CPU)[0].training
    assert plan(CONFIG, str(folder), GPU).sizes.layers == SIZES["num_hidden_layers"]


def test_two_sets_of_weights_deserve_a_line(tmp_path, capsys):
    folder = save_teacher(tmp_path / "teacher")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    load_dense(TeacherConfig(path=str(folder), dtype="float32"), CPU)
    assert "model.safetensors is read, the shards are not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size_per_layer_input", 262144),
        ("hidden_size_per_layer_input", 4096),
        ("block_size", 2048),
        ("layer_rope_theta", 10000),
        ("num_experts_per_tok", 1025),
    ],
)
def test_sizes_of_layers_are_no_numbers_of_layers(key, value):
    check_config_table({key: value, "text_config": {key: value}}, "config.json")


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "layers",
        "encoder_layers",
        "decoder_layers",
        "num_blocks",
        "depth",
        "decoder_num_hidden_layers",
        "num_layers_per_stack",
        "num_stages",
        "num_experts",
        "n_routed_experts",
        "num_nextn_predict_layers",
        "num_codebooks",
    ],
)
def test_numbers_of_layers_are_bounded(key):
    check_config_table({"text_config": {key: 1024}}, "config.json")
    with pytest.raises(UserError, match=f"{key} = 1025, expected at most 1024"):
        check_config_table({"text_config": {key: 1025}}, "config.json")


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub at a port on which nobody listens, and an empty cache, in an empty folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}"
        )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Whoever runs the tests may have set it.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("name", ["models/qwen3", "teacher"])
def test_a_mistyped_folder_is_told_without_a_wait(name, unreachable):
    started = time.monotonic()
    for message in refusals(name):
        assert f"no folder {unreachable / name} is there" in message
        assert "could not be reached" in message
    for work in (
        lambda: run_generate(name, prompt="a", max_new_tokens=1, temperature=0.0, seed=0),
        lambda: run_probe(name, out=unreachable / "probe"),
    ):
        with pytest.raises(UserError, match=rf"^MODEL: got {name}, .* could not be reached"):
            work()
    assert time.monotonic() - started < 15
    with pytest.raises(UserError, match=f"no folder {unreachable / name} is there"):
        load_student(name, CPU)


@pytest.mark.parametrize("name", ["a/b", "a/b/c", "b/", "b\\c", "", "~nobody-here/x", "x" * 5000])
def test_names_that_are_no_hub_ids_are_missing_folders(name, unreachable):
    for message in refusals(name):
        assert "expected a folder with a model, which is not there" in message
        assert "reached" not in message
        assert len(message) < 1000


def test_a_hub_that_is_silent_is_not_waited_for(unreachable, monkeypatch):
    monkeypatch.setattr(model_paths, "HUB_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1"):
            find_model("someone/something", "MODEL")
