"""An exported folder opens without this package and computes what our student computes."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from export_cases import logits_of, run_without_package, save_student
from tiny import make_ids
from tiny_onn.deploy.export import run_export
from tiny_onn.deploy.to_transformers import CODE_FILE
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.runs.students import load_student

pytestmark = pytest.mark.usefixtures("quiet")

OPEN = """
import sys
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

ids = load_file(sys.argv[1])["ids"]
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits, hidden = model(ids).logits, base(ids).last_hidden_state
        written = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
    results = {"logits": logits, "hidden": hidden, "written": written}
    save_file(results, folder + ".results")
    experts = model.model.layers[0].mlp.experts
    print(sorted(name for name, p in experts.named_parameters() if p.ndim == 3))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("text-generation", folder, trust_remote_code=True)
print(len(pipe("the quick", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 9)
assert not any(name.split(".")[0] == "tiny_onn" for name in sys.modules)
"""
RULES = {
    "threshold, means, scale": {"compensation": "mean", "learn_scale": True},
    "cumulative": {"budget_form": "cumulative"},
    "shared experts": {"num_shared": 2, "compensation": "mean"},
    "mean weights": {"weighting": "mean"},
    "top-k, softmax": {"selection": "top_k", "weighting": "softmax"},
    "top-k, shared, sigmoid": {"selection": "top_k", "weighting": "sigmoid", "num_shared": 1},
    "static": {"selection": "static"},
}
CASES = {name: ("llama", rule) for name, rule in RULES.items()} | {
    family: (family, {"compensation": "mean"}) for family in ("qwen3", "gemma2", "cohere")
}


def export(tmp_path, family, to="transformers", **changes):
    student = save_student(tmp_path / "student", family, **changes)
    return student, tmp_path / "out", run_export(str(student), to=to, out=tmp_path / "out")


def opened(tmp_path, folders, ids):
    """What a program without the package computes with each folder, and the lines it prints."""
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    arguments = (tmp_path / "ids.safetensors", *folders)
    said = run_without_package(OPEN, *arguments, cache=tmp_path / "cache").splitlines()
    return [load_file(f"{folder}.results") for folder in folders], said


def test_they_compute_what_our_students_do(tmp_path):
    students, folders = [], []
    for number, (family, rule) in enumerate(CASES.values()):
        place = tmp_path / f"case{number}"
        student, folder, _ = export(place, family, **rule)
        students.append(student)
        folders.append(folder.rename(tmp_path / f"export{number}"))
    ids = make_ids()
    results, said = opened(tmp_path, folders, ids)
    for name, student, got in zip(CASES, students, results, strict=True):
        ours = load_student(str(student), torch.device("cpu")).student
        with torch.no_grad():
            logits, hidden = ours(ids).logits, last_hidden_states(ours, ids)
            model: Any = ours
            written = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
        close: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4, "msg": name}
        torch.testing.assert_close(got["logits"], logits, **close)
        torch.testing.assert_close(got["hidden"], hidden, **close)
        assert torch.equal(got["written"], written), name
    assert said == [str(["down_proj", "gate_up_proj"])] * len(CASES) + ["True"]


def test_its_fields_are_those_that_engines_read(tmp_path):
    _, folder, lost = export(tmp_path, "llama")
    table = json.loads((folder / "config.json").read_text())
    assert set(table["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    # `transformers serve` asks transformers itself for this class.
    assert hasattr(transformers, *table["architectures"])
    assert table["hidden_size"] == 32
    assert table["num_experts"] == 8
    assert table["moe_intermediate_size"] == 6
    # Probabilities above the threshold of 0.08 are at most 12, but there are 8 experts.
    assert table["num_experts_per_tok"] == 8
    assert "trust" in lost
    code = (folder / CODE_FILE).read_text()
    assert "import tiny_onn" not in code
    assert "from tiny_onn" not in code
    assert "noqa" not in code


def test_a_high_threshold_leaves_few_places(tmp_path):
    student = save_student(tmp_path / "student")
    weights = load_file(student / "model.safetensors")
    weights |= {n: torch.full_like(w, 0.3) for n, w in weights.items() if n.endswith(".settled")}
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    run_export(str(student), to="vllm", out=tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert table["num_experts_per_tok"] == 4
    assert table["architectures"] == ["TinyOnnForCausalLM"]
    ids = make_ids()
    (got,), _ = opened(tmp_path, [tmp_path / "out"], ids)
    torch.testing.assert_close(got["logits"], logits_of(student, ids), atol=2e-4, rtol=1e-4)


def test_vllm_refuses_an_activation_that_its_backend_ignores(tmp_path):
    with pytest.raises(UserError, match=r"^--to vllm: got a student with the activation 'gelu"):
        export(tmp_path, "gemma2", to="vllm")
    assert not (tmp_path / "out").exists()


def test_a_budget_is_exported_as_a_budget(tmp_path):
    student = save_student(tmp_path / "student", selection="top_k")
    run_export(str(student), to="transformers", out=tmp_path / "out", budget=2.0)
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert table["num_experts_per_tok"] == 2


@pytest.mark.parametrize("to", ["transformers", "gguf"])
@pytest.mark.parametrize("selection", ["top_any", "oracle"])
def test_a_selection_without_a_gate_is_refused(tmp_path, to, selection):
    with pytest.raises(UserError, match=rf"^--to {to}: got a student with router.selection"):
        export(tmp_path, "llama", to=to, selection=selection)
