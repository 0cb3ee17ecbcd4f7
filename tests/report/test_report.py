"""Pages about real runs: whole and safe HTML that needs nothing else, and true sentences."""

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import vl_convert

from tiny_onn.errors import UserError
from tiny_onn.evaluation.run_view import VIEW_NAME
from tiny_onn.report.page import code, library, report_page, script_json
from tiny_onn.report.run_data import distinct
from tiny_onn.report.sentences import health_of
from tiny_onn.runs.folder import read_run_config, runs_in
from tiny_onn.studies.report import read_run, run_report

pytestmark = pytest.mark.usefixtures("quiet")

VOID = ("meta", "input", "br")
HOSTILE = "</script><img src=x onerror=alert(1)>`&\"'{{ 7 * 7 }}"


class Checked(HTMLParser):
    """Collects elements and text, and fails where an element is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.classes = [], [], [], []
        self.text, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("src", "href", "action", "data") if name in values]
        self.classes.append((tag, values.get("class") or ""))
        assert not any(name.startswith("on") for name in values), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def read_page(text):
    page = Checked()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def page(runs):
    return run_report([runs]).read_text(encoding="utf-8")


def test_a_page_is_whole_needs_no_network_and_is_small(runs, page):
    assert (runs / "report.html").is_file()
    found = read_page(page)
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert len(page.encode()) < 3_000_000
    # The three scripts are data, library and ours.
    assert len(found.scripts) == 3


def test_a_page_shows_every_part_of_a_run(page):
    found = read_page(page)
    text = " ".join(found.text)
    for heading in ("Is it healthy?", "Does it beat its controls?", "Did it learn?"):
        assert heading in text
    charts = json.loads(found.scripts[0])["charts"]
    expected = {"kl", "k", "lr", "frontier"}
    alone = {"load", "histogram", "pairs", "agreement", "layers", "surprise"}
    assert set(charts) == expected | {f"{name}-0" for name in alone} | {"load-1", "histogram-1"}
    for name in ("untrained", "router.selection", "train.seed", "transformers", "FFN MFLOPs"):
        assert name in text


def test_every_figure_is_a_specification_that_the_library_takes(page):
    charts = json.loads(read_page(page).scripts[0])["charts"]
    for key, spec in charts.items():
        drawn = vl_convert.vegalite_to_svg({**spec, "width": 400})
        assert drawn.startswith("<svg"), key
        assert 'aria-roledescription="' in drawn


def test_heatmaps_have_a_frame_for_each_record_with_layers(runs, page):
    run = read_run(runs / "student")
    frames = {row["frame"] for row in _chart(page, "load-0")["data"]["values"]}
    # Evaluations at 0, 2, 4 and 6 steps, and steps 2, 4 and 6.
    assert frames == set(range(len(list(run.with_layers())))) == set(range(7))
    for row in _chart(page, "load-0")["data"]["values"]:
        assert all(0 <= share <= 1 for share in row["value"])


def _chart(page, key):
    return json.loads(read_page(page).scripts[0])["charts"][key]


def test_the_same_run_gives_the_same_bytes(runs, page, tmp_path):
    again = run_report([runs], out=tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page
    # What the models told is read back, not measured again.
    view = runs / "student" / VIEW_NAME
    before = view.stat().st_mtime_ns
    view.unlink()
    measured = run_report([runs], out=tmp_path / "measured.html")
    assert view.stat().st_mtime_ns != before
    assert measured.read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("page")  # it writes the view
def test_text_of_settings_and_tokens_cannot_become_markup(runs):
    run = read_run(runs / "student")
    view = json.loads((runs / "student" / VIEW_NAME).read_text())
    view["passage"]["text"][0] = HOSTILE
    config = {**run.config, "data": {**run.config["data"], "sources": [HOSTILE]}}
    health = {
        "verdict": "suspicious",
        "findings": [
            {"severity": "suspicious", "code": "x", "what": HOSTILE, "advice": HOSTILE},
        ],
    }
    hostile = replace(
        run, name=HOSTILE, config=config, health=health, view=view, view_missing=HOSTILE
    )
    found = read_page(report_page([hostile, replace(hostile, name="b", view=None)]))
    assert "img" not in [tag for tag, _ in found.classes]
    assert any("onerror=alert(1)" in text for text in found.text)
    assert json.loads(found.scripts[0])["passages"]["tokens-0"]["text"][0] == HOSTILE
    # Nothing is a template twice.
    assert "49" not in "".join(text for text in found.text if "onerror" in text)


def test_numbers_that_are_no_numbers_do_not_break_the_page(runs):
    run = read_run(runs / "student")
    bad = {"loss": float("nan"), "forward_kl": float("inf")}
    records = [{**record, **bad} if record["kind"] == "step" else record for record in run.records]
    last = {**records[-1], "forward_kl": float("nan"), "student_nll": float("inf")}
    page = report_page([replace(run, records=[*records[:-1], last])])
    json.loads(read_page(page).scripts[0], parse_constant=pytest.fail)


def test_a_run_whose_models_are_gone_gets_a_page_that_says_so(runs, tmp_path, capsys):
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("config.json", "environment.json", "metrics.jsonl", "summary.json"):
        (folder / name).write_bytes((runs / "student" / name).read_bytes())
    text = " ".join(read_page(run_report([folder]).read_text("utf-8")).text)
    assert "The models could not be loaded: MODEL: got" in text
    assert "is made without single tokens" in capsys.readouterr().err
    without = run_report([folder], models=False).read_text("utf-8")
    assert "was asked not to load the models" in without


def test_a_run_without_an_evaluation_or_a_step_gets_a_page(runs, tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    for name in ("config.json", "environment.json"):
        (folder / name).write_bytes((runs / "student" / name).read_bytes())
    (folder / "metrics.jsonl").touch()
    text = " ".join(read_page(run_report([folder], models=False).read_text("utf-8")).text)
    assert "too early to tell" in text
    assert "No training step was recorded yet." in text
    assert "stopped after 0 of 384 training tokens" in text


def test_a_control_is_called_one_and_not_judged_as_a_student(runs):
    run = read_run(runs / "static")
    assert health_of(run).startswith("This run is a control to compare with")
    assert '<article class="card control">' in report_page([run])


def test_a_single_step_is_a_point_and_no_frontier_draws_none(runs):
    run = read_run(runs / "student")
    page = report_page([replace(run, records=run.records[:2], frontier=None)])
    charts = json.loads(read_page(page).scripts[0])["charts"]
    assert charts["kl"]["layer"][0]["mark"]["point"]
    assert "frontier" not in charts
    assert "One budget of each run was measured." in page
    assert "In the only recorded step" in page


def test_runs_are_found_in_a_folder_the_student_first(runs, tmp_path):
    assert [path.name for path in runs_in(runs)] == ["student", "static"]
    assert runs_in(runs / "static") == [runs / "static"]
    with pytest.raises(UserError, match=r"RUN: got .*, expected the folder of a run"):
        runs_in(tmp_path)


def test_runs_of_one_name_are_told_apart(runs):
    run = read_run(runs / "static")
    assert [r.name for r in distinct([run, run, run])] == ["static", "static (2)", "static (3)"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"step": 2}, "measured at another step"),
        ({"experts_stored_as": "int8"}, "measured with experts in int8"),
    ],
)
def test_a_frontier_of_another_student_is_left_out(runs, tmp_path, capsys, change, why):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl", "frontier.json"):
        (folder / name).write_bytes((runs / "student" / name).read_bytes())
    assert read_run(folder).frontier is not None
    other = json.loads((folder / "frontier.json").read_text()) | change
    (folder / "frontier.json").write_text(json.dumps(other))
    assert read_run(folder).frontier is None
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(runs, tmp_path, text):
    (tmp_path / "config.json").write_bytes((runs / "student" / "config.json").read_bytes())
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: .*, expected a JSON object"):
        read_run(tmp_path)


def test_a_record_without_a_field_is_named(runs, tmp_path):
    (tmp_path / "config.json").write_bytes((runs / "student" / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"kind": "spike", "step": 1, "tokens": 2}\n')
    assert read_run(tmp_path).tokens == 2
    (tmp_path / "metrics.jsonl").write_text('{"kind": "end", "step": 1, "tokens": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: got no dead_experts in record 1"):
        read_run(tmp_path)


def test_curves_of_the_stages_are_apart(runs):
    run = read_run(runs / "student")
    block = {**run.steps[0], "kind": "blockwise", "loss": 0.5, "errors": [0.4, 0.6]}
    # The loss has a chart of its own where it is not the KL.
    matched = [
        {**record, "states_error": 0.2, "loss": number / 8}
        for number, record in enumerate(run.records)
    ]
    page = report_page([replace(run, records=[block, *matched])])
    values = {
        key: {row["value"] for row in _chart(page, key)["data"]["values"]}
        for key in ("blocks", "loss", "states")
    }
    assert values["blocks"] == {0.5}
    assert values["states"] == {0.2}
    assert len(values["loss"]) == 6


def test_several_runs_share_the_room_of_one(runs):
    run = read_run(runs / "student")
    many = [*run.with_layers()] * 40
    long = replace(run, records=many, view=None)
    frames = [
        len({row["frame"] for row in _chart(page, "load-0")["data"]["values"]})
        for page in (report_page([long]), report_page(distinct([long] * 100)))
    ]
    # 40,000 numbers of 2 layers and 8 experts, at most 60 frames; then a hundredth of them.
    assert frames == [60, 25]


def test_a_page_that_cannot_be_written_is_refused(runs):
    with pytest.raises(UserError, match=r"--out: got .*, expected a file to write to"):
        run_report([runs / "static"], out=runs, models=False)


def test_code_is_marked_and_everything_escaped():
    assert code("say `a < b` now") == "say <code>a &lt; b</code> now"
    assert code("one ` alone <i>") == "one ` alone &lt;i&gt;"
    assert "<" not in script_json({"a": "</script>"})
    assert "vegaEmbed" in library()


def test_the_report_package_loads_no_torch():
    program = (
        "import sys, tiny_onn.report.page, tiny_onn.report.comparing;"
        "print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_settings_of_the_run_are_its_own(runs):
    assert read_run(runs / "static").selection == read_run_config(runs / "static").router.selection
