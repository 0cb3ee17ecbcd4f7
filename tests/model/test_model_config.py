"""The student's configuration answers for its backbone, and stores nothing of it twice."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from tiny import FAMILIES, OTHERS, make_dense, make_ids, make_student, make_tokenizer
from tiny_onn.config.schema import ExpertsConfig, RouterConfig
from tiny_onn.errors import UserError
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.router import RoutingRule
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.runs.students import load_student

pytestmark = pytest.mark.usefixtures("quiet")

# These values describe a configuration itself, and each configuration has its own.
OWN = ("model_type", "architectures", "transformers_version")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_attribute_of_the_backbone_is_readable(family):
    dense = make_dense(family)
    config = make_student(dense).config
    for name in dense.config.to_dict():
        if name not in OWN and not name.startswith("_"):
            assert getattr(config, name) == getattr(dense.config, name), name
    assert config.max_position_embeddings == 128
    assert config.num_attention_heads == 4
    assert config.rope_scaling == dense.config.rope_scaling


@pytest.mark.parametrize("name", ["nonsense", "n_positions", "_nonsense", "__deepcopy__", ""])
def test_what_neither_has_is_not_there(name):
    config = make_student(make_dense()).config
    assert not hasattr(config, name)
    with pytest.raises(AttributeError, match=f"'TinyOnnConfig' object has no attribute '{name}'"):
        getattr(config, name)


def test_an_empty_object_answers_for_nothing():
    assert not hasattr(TinyOnnConfig.__new__(TinyOnnConfig), "vocab_size")


def test_how_the_dense_model_was_stored_says_nothing_about_the_student(tmp_path):
    dense = make_dense()
    dense.config.quantization_config = {"quant_method": "fp8"}
    config = make_student(dense).config
    assert not hasattr(config, "quantization_config")
    assert "quantization_config" not in config.to_dict()
    assert "quantization_config" not in config.to_diff_dict()


def test_nothing_of_the_backbone_is_stored_twice(tmp_path):
    config = make_student(make_dense("gemma2")).config
    before = config.to_dict()
    assert config.vocab_size
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for table in (stored, config.to_dict(), config.to_diff_dict()):
        assert not {"vocab_size", "hidden_size", "rope_parameters", "head_dim"} & set(table)
        assert table["backbone"]["vocab_size"] == config.vocab_size
    read = TinyOnnConfig.from_pretrained(tmp_path)
    assert read.to_dict() == before


def test_copies_are_equal_and_apart():
    config = make_student(make_dense("gemma2")).config
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        twin.max_position_embeddings = 7
        assert (twin.backbone.max_position_embeddings, config.max_position_embeddings) == (7, 128)


def test_a_value_is_written_where_it_is_read(tmp_path):
    config = make_student(make_dense()).config
    config.max_position_embeddings, config.pad_token_id, config.note = 64, 5, "mine"
    assert config.backbone.max_position_embeddings == 64
    assert (config.backbone.pad_token_id, config.pad_token_id) == (0, 5)
    assert not hasattr(config.backbone, "note")
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path, use_cache=False)
    assert (read.max_position_embeddings, read.pad_token_id, read.note) == (64, 5, "mine")
    assert read.backbone.use_cache is False


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_generation_reads_the_backbones_configuration(cache, tmp_path):
    make_student(make_dense("gemma2")).save_pretrained(tmp_path)
    student: Any = TinyOnnForCausalLM.from_pretrained(tmp_path)
    options = GenerationConfig(max_new_tokens=6, do_sample=False, cache_implementation=cache)
    plain = GenerationConfig(max_new_tokens=6, do_sample=False, use_cache=False)
    ids = make_ids(1, 12)
    got = student.generate(ids, generation_config=options)
    assert torch.equal(got, student.generate(ids, generation_config=plain))


def test_growing_the_vocabulary_grows_what_the_configuration_says():
    student = make_student(make_dense("llama"))
    student.resize_token_embeddings(70, mean_resizing=False)
    assert student.config.vocab_size == student.config.backbone.vocab_size == 70


def test_a_students_folder_that_makes_no_sense_is_refused():
    for changes in ({"num_shared": 8}, {"num_shared": -1}):
        with pytest.raises(UserError, match=r"experts.num_shared: got .*, expected 0 to 7 .*;"):
            make_student(make_dense(), target_k=8.0, **changes)
    with pytest.raises(UserError, match=r"router.target_k: got 4, expected 5 to 8"):
        make_student(make_dense(), num_shared=4)


def test_a_saved_student_comes_back_and_an_older_one_has_none(tmp_path):
    student = make_student(make_dense(), num_shared=3)
    student.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert again.banks()[0].router.rule == student.banks()[0].router.rule
    assert again.banks()[0].router.rule.num_shared == 3
    ids = make_ids()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)
    table = json.loads((tmp_path / "config.json").read_text())
    del table["routing"]["num_shared"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    older = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert older.banks()[0].router.rule.num_shared == 0


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"selection": "top_k", "target_k": 3.0}, 3),
        ({"selection": "static", "target_k": 3.0}, 3),
        ({"selection": "random", "target_k": 3.0}, 3),
        ({"selection": "top_k", "target_k": 3.0, "num_shared": 1}, 3),
        ({"selection": "budget"}, 8),
        ({"selection": "top_any", "weighting": "mean"}, 8),
        ({"selection": "oracle", "target_k": 3.0, "oracle_budget": True}, 8),
        ({"selection": "oracle", "target_k": 3.0, "oracle_budget": False}, 3),
    ],
    ids=str,
)
def test_sizes_are_told_by_the_names_that_engines_ask_for(changes, most, tmp_path):
    student = make_student(make_dense(), **changes)
    config = student.config
    assert (config.num_experts, config.moe_intermediate_size, config.expert_dim) == (8, 6, 6)
    assert config.num_experts_per_tok == most
    with torch.no_grad(), recorded_routings(student.banks()) as routings:
        student.eval()(make_ids())
    assert max(int(routing.active.sum(-1).max()) for routing in routings) <= most
    config.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["moe_intermediate_size"] == 6
    assert "expert_dim" not in table
    assert TinyOnnConfig.from_pretrained(tmp_path).moe_intermediate_size == 6


def test_a_configuration_of_an_earlier_version_keeps_its_width():
    backbone = make_dense().config.to_dict()
    assert TinyOnnConfig(backbone, num_experts=8, expert_dim=5).moe_intermediate_size == 5
    assert TinyOnnConfig(backbone, num_experts=8, expert_dim=0).moe_intermediate_size == 6


# Every option differs from its default.
UNUSUAL = {
    "selection": "oracle",
    "weighting": "sigmoid",
    "target_k": 3.5,
    "budget_form": "cumulative",
    "at_least_one": "always",
    "oracle_budget": True,
    "num_shared": 2,
    "straight_through": "threshold",
}


def saved_table(folder):
    """Return a student's config.json whose routing options all differ from their defaults."""
    student = make_student(make_dense(), **UNUSUAL)
    student.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def write_table(folder, table):
    (folder / "config.json").write_text(json.dumps(table))


def test_every_routing_option_comes_from_the_setting_of_its_name_and_is_stored_in_one_table(
    tmp_path,
):
    defaults = dataclasses.asdict(RoutingRule())
    assert {name for name, value in UNUSUAL.items() if value != defaults[name]} == set(defaults)
    settings = [dataclasses.asdict(section()) for section in (ExpertsConfig, RouterConfig)]
    for name in defaults:
        assert sum(name in section for section in settings) == 1, name
    table = saved_table(tmp_path)
    assert table["routing"] == UNUSUAL
    assert not set(UNUSUAL) & set(table)
    assert TinyOnnConfig.from_pretrained(tmp_path).routing_rule() == RoutingRule(**UNUSUAL)


def test_a_student_of_before_the_routing_table_routes_as_it_did(tmp_path):
    table = saved_table(tmp_path)
    flat = {**table, **table.pop("routing")}
    del flat["routing"]
    write_table(tmp_path, flat)
    read = TinyOnnConfig.from_pretrained(tmp_path)
    assert read.routing_rule() == RoutingRule(**UNUSUAL)
    assert not hasattr(read, "selection")
    read.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["routing"] == UNUSUAL


def test_a_scale_of_sequences_is_stored_and_is_1_in_students_of_before(tmp_path):
    student = make_student(make_dense())
    student.config.sequence_scale = 1.02
    student.save_pretrained(tmp_path)
    assert TinyOnnConfig.from_pretrained(tmp_path).sequence_scale == 1.02
    table = json.loads((tmp_path / "config.json").read_text())
    del table["sequence_scale"]
    write_table(tmp_path, table)
    assert TinyOnnConfig.from_pretrained(tmp_path).sequence_scale == 1.0
    for bad in (float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"^sequence_scale: got (inf|nan), expected a finite"):
            TinyOnnConfig(sequence_scale=bad)


@pytest.mark.parametrize("options", [{}, {"target_k": 3}])
def test_an_option_that_is_not_stored_has_its_default(options, tmp_path):
    table = saved_table(tmp_path)
    write_table(tmp_path, table | {"routing": options})
    rule = RoutingRule(target_k=float(options.get("target_k", 16)))
    assert TinyOnnConfig.from_pretrained(tmp_path).routing_rule() == rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"routing": {"warmth": 3}},
            "routing: got the unknown option 'warmth', expected one of sel",
        ),
        ({"routing": {"\x1b[2J": 3}}, r"unknown option '\\x1b\[2J', expected one of"),
        (
            {"routing": {"selection": "best"}},
            'routing.selection: got "best", expected one of "top_k"',
        ),
        ({"routing": {"target_k": "4"}}, 'routing.target_k: got "4", expected a number'),
        ({"routing": {"oracle_budget": 1}}, "routing.oracle_budget: got 1, expected true or false"),
        (
            {"routing": {"num_shared": 1.5}},
            "routing.num_shared: got 1.5, expected a 64-bit integer",
        ),
        ({"routing": 3}, "routing: got 3, expected a table of options"),
        ({"target_k": 3}, "target_k: got a value beside `routing`, expected .* move it there"),
        ({"sequence_scale": 0}, "sequence_scale: got 0, expected a finite number above 0; restore"),
        ({"sequence_scale": "1"}, 'sequence_scale: got "1", expected a finite number'),
        ({"sequence_scale": True}, "sequence_scale: got true, expected a finite number"),
    ],
)
def test_routing_that_cannot_be_read_is_refused_in_one_line(changes, message, tmp_path):
    table = saved_table(tmp_path)
    write_table(tmp_path, table | changes)
    with pytest.raises(UserError, match=message):
        TinyOnnConfig.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^MODEL: got .*{message}") as caught:
        load_student(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(caught.value)
