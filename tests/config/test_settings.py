"""Settings: layering, strictness, ranges, round trips, documentation."""

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_onn.config.checks import RANGES, validate
from tiny_onn.config.describe import field_docs
from tiny_onn.config.read import (
    config_diff,
    config_from_json,
    load_config,
    preset_names,
    resolved_json,
)
from tiny_onn.config.schema import RunConfig
from tiny_onn.config.template import config_template
from tiny_onn.errors import UserError

CHECKS = {name: accepts for _, accepts, names in RANGES for name in names.split()}
SETTINGS = tuple(
    (section, key, hint)
    for section, cls in get_type_hints(RunConfig).items()
    for key, hint in get_type_hints(cls).items()
)
PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)


def values_of(name, hint):
    """A strategy of the values that the setting's type and range allow."""
    if name == "train.device":
        return st.sampled_from(["auto", "cpu", "cuda", "cuda:1"])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(PRINTABLE, min_size=1, max_size=3).map(tuple)
    if hint in (str, bool):
        return PRINTABLE if hint is str else st.booleans()
    if hint is int:
        return st.integers(0, 2**63 - 1).filter(CHECKS[name])
    return st.floats(0, 1e300 if CHECKS[name](2) else 1).filter(CHECKS[name])


TABLES = st.fixed_dictionaries(
    {
        section: st.fixed_dictionaries(
            {key: values_of(f"{section}.{key}", hint) for key, hint in get_type_hints(cls).items()}
        )
        for section, cls in get_type_hints(RunConfig).items()
    }
)


def mend_routing(router, experts, smk):
    """Make the drawn settings of routing go together."""
    selection = router["selection"]
    if selection in ("static", "random", "oracle"):
        router |= {"objective": "none", "balance_rate": 0.0, "revive_after_steps": 0}
    if selection == "top_any":
        router["objective"] = "task"
        experts |= {"weighting": "mean", "gate_init": "random"}
    else:
        router |= {"at_least_one": "evaluation", "reseed_every_steps": 0}
    if selection != "oracle":
        router["oracle_budget"] = False
    if selection != "budget" and not router["oracle_budget"]:
        router["budget_scope"] = "layer"
    if router["objective"] != "smk" or smk["surprise"] != "gain":
        smk["net_gain"] = False
    smk["net_gain"] &= experts["compensation"] == "mean"
    has_threshold = selection == "budget" and router["budget_form"] == "threshold"
    if experts["weighting"] == "ramp" and not has_threshold:
        experts["weighting"] = "unit"
    passes = router["objective"] == "task" and experts["weighting"] in ("unit", "mean")
    if router["straight_through"] == "threshold" and not (has_threshold and passes):
        router["straight_through"] = "softmax"
    if router["objective"] != "smk" or smk["candidates"] == "all" or experts["num_experts"] == 1:
        smk["explore_fraction"] = 0.0
    if router["objective"] != "smk" or smk["candidates"] == "active":
        smk["lesson_share"] = 1.0


def config_of(tables):
    """Build the configuration of drawn values, with the combinations mended."""
    # Every num_experts allows a single active expert.
    tables["router"]["target_k"] = 1.0
    tables["experts"] |= {"num_shared": 0, "keep_massive": False}
    mend_routing(tables["router"], tables["experts"], tables["smk"])
    annealable = tables["experts"]["num_experts"] > 1 and tables["router"]["selection"] != "top_any"
    if not annealable:
        tables["router"]["anneal_fraction"] = 0.0
    if not annealable or not tables["train"]["blockwise_tokens"]:
        tables["router"]["blockwise_anneal_fraction"] = 0.0
    if tables["smk"]["targets"] == "helpful":
        tables["smk"] |= {"surprise": "gain", "direction": "max"}
    tables["train"]["expert_path"] = "auto"
    if tables["optim"]["name"] == "adafactor" or tables["train"]["checkpointing"] == "selective":
        tables["train"]["shard"] = "none"
    if tables["loss"]["states_coef"] or tables["train"]["blockwise_tokens"]:
        tables["teacher"]["cache"] = "none"
    for prefix in ("", "gate_"):
        optim = tables["optim"]
        if optim[f"{prefix}warmup_fraction"] + optim[f"{prefix}decay_fraction"] > 1:
            optim[f"{prefix}decay_fraction"] = 0.0
    data = tables["data"]
    if data["held_out_fraction"] + data["settling_fraction"] >= 1:
        data["settling_fraction"] = 0.0
    sections = get_type_hints(RunConfig)
    return RunConfig(**{name: cls(**tables[name]) for name, cls in sections.items()})


@settings(deadline=None, max_examples=40)
@given(TABLES)
def test_json_round_trip_gives_the_same_settings(tables):
    config = config_of(tables)
    assert config_from_json(resolved_json(config)) == config


@settings(deadline=None, max_examples=40)
@given(TABLES)
def test_printed_toml_loads_to_the_same_settings(tmp_path_factory, tables):
    config = config_of(tables)
    path = tmp_path_factory.mktemp("run") / "run.toml"
    path.write_text(config_template(config), encoding="utf-8")
    assert load_config(path, None, []) == config


def test_template_file_loads_to_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(config_template(), encoding="utf-8")
    assert load_config(path, None, []) == RunConfig()


def test_later_layers_win(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "model-card"\n[data]\nrow_tokens = 64\n[train]\nseed = 1\n')
    config = load_config(path, None, ["train.seed=2", "train.seed=3"])
    assert config.teacher.path == "Qwen/Qwen3-0.6B"
    assert config.data.row_tokens == 64
    assert config.train.seed == 3
    assert config.loss == RunConfig().loss


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_and_says_what_it_is(name):
    config = load_config(None, name, [])
    assert config != RunConfig()
    text = (files("tiny_onn.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ")


def test_model_card_preset_is_the_published_recipe():
    config = load_config(None, "model-card", [])
    assert config.experts.num_experts == 32
    assert config.experts.init == config.experts.gate_init == "random"
    assert (config.router.selection, config.router.objective) == ("budget", "smk")
    assert config.router.target_k == 16.0
    smk = config.smk
    assert (smk.surprise, smk.direction, smk.candidates) == ("parameters", "min", "active")
    assert config.data.row_tokens == 32768
    assert config.train.tokens == 500_000_000


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("router.target_k=8", "router", "target_k", 8.0),
        ("teacher.path=/a/b#c", "teacher", "path", "/a/b#c"),
        ('teacher.path="x = y"', "teacher", "path", "x = y"),
        ("teacher.path=a=b", "teacher", "path", "a=b"),
        ("router.selection = top_k", "router", "selection", "top_k"),
        ("train.compile=false", "train", "compile", False),
        ('data.sources=["a.txt", "b"]', "data", "sources", ("a.txt", "b")),
        ("train.tokens=1_000", "train", "tokens", 1000),
        ("train.device=cuda:1", "train", "device", "cuda:1"),
    ],
)
def test_override_is_a_toml_value_or_a_bare_word(override, section, key, expected):
    value = getattr(getattr(load_config(None, None, [override]), section), key)
    assert value == expected
    assert type(value) is type(expected)


MISTAKES = [
    (["teacher.cache=x", "loss.states_coef=1"], "loss.states_coef: got 1.0 .* hidden states of ea"),
    (["teacher.cache=x", "train.blockwise_tokens=9"], "blockwise_tokens: got 9 .* expected 0, "),
    (["router.target_kk=3"], 'unknown setting "router.target_kk".* did you mean router.target_k?'),
    (["train.expert_lr=1"], "did you mean optim.expert_lr?"),
    (["optimizer.eps=1"], 'unknown section "optimizer".* did you mean optim?'),
    (["zzz.q=1"], "`tiny-onn config` lists all settings"),
    (["router"], 'got "router", expected SECTION.KEY=VALUE'),
    (["router=3"], "expected SECTION.KEY=VALUE"),
    (["=3"], "expected SECTION.KEY=VALUE"),
    (["a.b.c=3"], 'unknown setting "a.b.c"|unknown section "a"'),
    (["train.tokens=true"], "train.tokens: got true, expected a 64-bit integer"),
    (["train.tokens=1.5"], "train.tokens: got 1.5, expected a 64-bit integer"),
    (["train.tokens=0x" + "f" * 9000], "train.tokens: got 0xfff"),
    (["train.tokens=" + "9" * 9000], 'train.tokens: got "999.*, expected a 64-bit integer'),
    (["train.compile=1"], "train.compile: got 1, expected true or false"),
    (["train.compile=yes"], 'train.compile: got "yes", expected true or false'),
    (["loss.temperature=nan"], "loss.temperature: got nan, expected a number"),
    (["loss.temperature=inf"], "loss.temperature: got inf, expected a number"),
    (["loss.temperature=1" + "0" * 400], "loss.temperature: got 0x.*, expected a number"),
    (["loss.temperature=false"], "loss.temperature: got false, expected a number"),
    (["router.selection=topk"], 'got "topk", expected one of "top_k", "top_any", "budget"'),
    (["router.selection=[1]"], 'got a list, expected one of "top_k"'),
    (["data.sources=embedded"], 'data.sources: got "embedded", expected a non-empty list'),
    (["data.sources=[]"], "data.sources: got a list, expected a non-empty list"),
    (['data.sources=["a", 3]'], r"data.sources\[1\]: got 3, expected a non-empty string"),
    (['data.sources=["a"'], "data.sources: got malformed TOML"),
    (["teacher.revision=123"], "teacher.revision: got 123, expected a non-empty string"),
    (["teacher.revision=2024-01-01"], "teacher.revision: got a date, expected a non-empty string"),
    (["teacher.path="], 'teacher.path: got "", expected a non-empty string'),
    (["teacher.path='a\\u0007b\udcff'"], "teacher.path: got .*, expected a non-empty string"),
    (["train.tokens=1\nseed = 3"], "train.tokens: got several lines"),
    (["train.tokens=" + "[" * 20000], "train.tokens: got malformed TOML"),
    (["train.device=gpu"], 'train.device: got "gpu", expected auto, cpu, cuda or cuda:N'),
    (["train.device=cuda:x"], "train.device: got "),
    (["router.target_k=33"], "router.target_k: got 33.0, expected at most experts.num_experts"),
    (["router.target_k=0.5"], "router.target_k: got 0.5, expected a number >= 1"),
    (["router.target_k=8.5", "router.selection=top_k"], "router.target_k: got 8.5, .* whole"),
    (["router.selection=random"], 'router.objective: got "smk", expected "none"'),
    (["router.selection=static", "router.objective=task"], 'router.objective: got "task"'),
    (["optim.warmup_fraction=0.6"], "optim.decay_fraction: got 0.5 after .* 0.6"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistake_in_an_override_is_told_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, None, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


OUTSIDE = {
    "an integer from 0 to 16,777,216": -1,
    "an integer >= 1": 0,
    "an integer from 3 to 16,777,216": 2,
    "an integer from 1 to 16,777,216": 2**24 + 1,
    "an integer >= 0": -1,
    "a number >= 1": 0.99,
    "a number > 0": 0.0,
    "a number >= 0": -0.1,
    "a number > 0 and < 1": 1.0,
    "a number > 0 and <= 1": 1.5,
    "a number >= 0 and < 1": 1.0,
    "a number from 0 to 1": 1.01,
}


@pytest.mark.parametrize(
    ("name", "expected"), [(name, rule) for rule, _, names in RANGES for name in names.split()]
)
def test_value_out_of_range_names_the_setting(name, expected):
    with pytest.raises(UserError, match=f"^{name}: got .*, expected {expected}; the default is"):
        load_config(None, None, [f"{name}={OUTSIDE[expected]}"])


def test_every_number_has_one_range_and_every_range_a_setting():
    numbers = [f"{section}.{key}" for section, key, hint in SETTINGS if hint in (int, float)]
    ranged = [name for _, _, names in RANGES for name in names.split()]
    assert sorted(numbers) == sorted(ranged)


def test_validate_accepts_the_controls_and_the_baselines():
    for overrides in (
        ["router.selection=random", "router.objective=none", "router.target_k=8"],
        ["router.selection=top_k", "router.objective=task", "experts.weighting=softmax"],
        ["router.target_k=32", "router.selection=top_k"],
        ["router.target_k=12.5"],
    ):
        validate(load_config(None, None, overrides))


def test_a_file_with_a_byte_order_mark_or_windows_lines_is_read(tmp_path):
    path = tmp_path / "run.toml"
    for content in (b"[train]\nseed = 3\n", b"[train]\r\nseed = 3\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + content)
            assert load_config(path, None, []).train.seed == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_utf_16_is_refused_with_the_remedy(tmp_path, encoding):
    path = tmp_path / "run.toml"
    path.write_bytes("[train]\nseed = 3\n".encode(encoding))
    with pytest.raises(UserError, match=r"malformed TOML .*; save it as UTF-8; it may be UTF-16$"):
        load_config(path, None, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\n", "malformed TOML"),
        (b"[train]\ntokens = 1\ntokens = 2\n", "malformed TOML"),
        (b"\xff\xfe[train]", "malformed TOML .*utf-8"),
        (b"x = " + b"[" * 20000, "malformed TOML"),
        (b"router = 3\n", r"router: got 3, expected a table; write \[router\]"),
        (b"[[router]]\n", "router: got a list, expected a table"),
        (b"target_k = 3\n", "did you mean router.target_k?"),
        (b"[router.target_k]\n", "router.target_k: got a dict, expected a number"),
        (b'preset = "nope"\n', 'preset: got "nope", expected one of demo'),
        (b"preset = 3\n", "preset: got 3, expected one of demo"),
        (b"preset = [1]\n", "preset: got a list, expected one of demo"),
    ],
)
def test_malformed_file_is_told(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(path, None, [])


def test_missing_file_and_folder_are_told(tmp_path):
    with pytest.raises(UserError, match=r"missing.toml: cannot read it \(No such file"):
        load_config(tmp_path / "missing.toml", None, [])
    with pytest.raises(UserError, match=r"cannot read it \(Is a directory\)"):
        load_config(tmp_path, None, [])


def test_two_different_presets_are_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "demo"\n')
    assert load_config(path, "demo", []) == load_config(None, "demo", [])
    with pytest.raises(UserError, match=r'preset: got model-card from --preset and "demo" from'):
        load_config(path, "model-card", [])


@pytest.mark.parametrize("name", ["../presets/demo", "", "demo.toml"])
def test_preset_is_a_name_and_no_path(name):
    with pytest.raises(UserError, match=r"^preset: got "):
        load_config(None, name, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("[]", "got a list, expected an object"),
        ("{}", "got no teacher.path, expected every setting"),
        ('{"train": {"tokens": NaN}}', "train.tokens: got nan"),
        ('{"train": null}', "train: got a NoneType, expected a table"),
    ],
)
def test_json_that_is_no_run_is_told(text, message):
    with pytest.raises(UserError, match=f"somewhere.json: .*{message}"):
        config_from_json(text, "somewhere.json")


def test_json_without_one_setting_is_refused():
    text = resolved_json(RunConfig()).replace('"seed": 0,', "")
    with pytest.raises(UserError, match=r"got no train\.seed"):
        config_from_json(text)


def test_diff_names_each_changed_setting():
    changed = load_config(None, None, ["router.target_k=8", 'data.sources=["a"]'])
    assert config_diff(RunConfig(), RunConfig()) == []
    assert config_diff(RunConfig(), changed) == [
        "router.target_k: 16.0 -> 8.0",
        'data.sources: ["embedded"] -> ["a"]',
    ]


def test_every_setting_has_its_documentation():
    docs = list(field_docs())
    assert [(doc.section, doc.field) for doc in docs] == [item[:2] for item in SETTINGS]
    template = " ".join(config_template().replace("\n# ", " ").split())
    for doc in docs:
        assert doc.doc.endswith(".")
        assert doc.doc in template
        assert f"{doc.field} = {doc.default}  # {doc.type}" in config_template()


def test_missing_file_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError):
        load_config(Path(tmp_path / "a" / "b.toml"), None, [])
    assert list(tmp_path.iterdir()) == []
