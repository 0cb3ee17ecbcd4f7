"""Runs at equal compute: what is read between measurements, what is said where nothing can be."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from run_records import write_records
from tiny import CONFIG, change
from tiny_onn.cli import main as cli
from tiny_onn.errors import UserError
from tiny_onn.report.comparing import common_k, compare, points_of
from tiny_onn.report.exact_k import at_k, between
from tiny_onn.runs.records import EvaluationRecord
from tiny_onn.studies.report import print_comparison, read_run, run_compare


def evaluation(mean_k, kl, **changes):
    """A last evaluation, as far as a comparison reads it."""
    flops = 10.0 * mean_k
    record = {field.name: 0.0 for field in fields(EvaluationRecord)} | {
        "kind": "end",
        "step": 4,
        "tokens": 1000,
        "num_tokens": 500,
        "mean_k": mean_k,
        "forward_kl": kl,
        "top1_agreement": 1 - kl / 10,
        "student_nll": 2 + kl,
        "teacher_nll": 2.0,
        "teacher_entropy": 2.0,
        "uniform_nll": 9.0,
        "unigram_nll": 5.0,
        "dead_experts": 0.0,
        "ffn_flops": flops,
        "dense_ffn_flops": 80.0,
        "total_flops": 100 + flops,
        "layers": {
            "num_tokens": 500,
            "mean_k": [mean_k],
            "load": [[5] * 8],
            "expert_norm": [1.0],
            "load_entropy": [math.log(8)],
            "max_load_share": [0.125],
        },
    }
    return record | changes


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder with an evaluation and perhaps a frontier, and read it back."""

    def make(name, mean_k, kl, frontier=(), config=CONFIG, **changes):
        folder = write_records(tmp_path / name, config, [evaluation(mean_k, kl, **changes)])
        if frontier:
            points = [evaluation(k, value) for k, value in frontier]
            (folder / "frontier.json").write_text(json.dumps({"step": 4, "points": points}))
        return read_run(folder)

    return make


CONTROL = change(CONFIG, router={"selection": "static", "objective": "none"})


def test_a_run_is_read_at_exactly_the_k_of_its_control(make_run):
    student = make_run("student", 4.2, 0.30, [(6.0, 0.1), (3.0, 0.6), (2.0, 0.9)])
    control = make_run("static", 4.0, 0.5, config=CONTROL)
    found = compare([student, control])
    assert found.mean_k == 4.0
    first, second = found.rows
    assert (first.name, second.name) == ("student", "static")
    # Between (3, 0.6) and (4.2, 0.3), the run's own evaluation, where log KL falls evenly.
    assert first.forward_kl == pytest.approx(0.6 * 0.5 ** (1 / 1.2))
    assert (first.deployed_kl, first.deployed_perplexity) == (0.30, pytest.approx(math.exp(2.3)))
    assert [end["mean_k"] for end in first.between] == [3.0, 4.2]
    assert "student k = 3.000 and k = 4.200" in found.caption()
    assert first.ffn_flops == pytest.approx(40.0)
    assert first.perplexity == pytest.approx(math.exp(2.35))
    assert (first.mean_k, first.measured_k, first.equal) == (4.0, 4.2, True)
    assert second.settings == {"router.selection": "static", "router.objective": "none"}


def test_a_kl_that_each_expert_lowers_by_the_same_share_is_read_exactly(make_run):
    def even(k):
        return math.exp(-k / 2)

    curve = [(k, even(k)) for k in (2.0, 3.0, 6.0, 8.0)]
    points = points_of(make_run("student", 8.0, even(8.0), curve))
    for k in (2.5, 4.0, 5.5, 7.0):
        point = at_k(points, k)
        assert point is not None
        assert point["forward_kl"] == pytest.approx(even(k))


def test_a_kl_of_zero_or_none_at_all_is_read_on_a_straight_line():
    low, high = {"mean_k": 2.0, "forward_kl": 0.4}, {"mean_k": 4.0, "forward_kl": 0.0}
    assert between(low, high, 3.0)["forward_kl"] == pytest.approx(0.2)
    assert math.isnan(between(low, {**high, "forward_kl": math.nan}, 3.0)["forward_kl"])


def test_an_interval_at_the_compared_k_is_shown_with_the_thresholds_read_between(make_run):
    run = make_run("student", 4.2, 0.30, [(6.0, 0.1), (3.0, 0.6)])
    frontier = {
        "points": [point | {"thresholds": [0.1, 0.3]} for point in run.frontier["points"]],
        "exact": [{"mean_k": 4.0, "forward_kl": 0.33, "intervals": {"forward_kl": [0.25, 0.45]}}],
    }
    control = make_run("static", 4.0, 0.5, config=CONTROL)
    found = compare([replace(run, frontier=frontier), control], 4.0)
    # What eval read at that k counts, and not what the run's other points would give.
    assert (found.rows[0].forward_kl, found.rows[0].interval) == (0.33, [0.25, 0.45])
    assert "0.2500 to 0.4500" in found.markdown()
    assert "k = 3.000 (threshold 0.2, mean over layers)" in found.caption()


def test_nothing_is_read_beyond_the_measurements(make_run):
    points = points_of(make_run("student", 4.0, 0.3, [(6.0, 0.1), (2.0, 0.9)]))
    assert at_k(points, 1.9) is None
    assert at_k(points, 6.5) is None
    measured = at_k(points, 4.002)
    assert measured is not None
    assert (measured["mean_k"], measured["forward_kl"]) == (4.0, 0.3)


def test_a_run_at_another_k_is_marked_and_far_ones_come_last(make_run):
    near, far = make_run("near", 4.04, 0.4), make_run("far", 8.0, 0.01)
    runs = [make_run("a", 4.0, 0.5), make_run("b", 4.0, 0.45), near, far]
    found = compare(runs)
    assert [row.name for row in found.rows] == ["near", "b", "a", "far"]
    assert [row.equal for row in found.rows] == [False, True, True, False]
    assert "4.04 *" in found.markdown()
    assert "--frontier --out RUN" in found.caption()


def test_other_text_is_marked_and_comes_last(make_run):
    runs = [make_run("a", 4.0, 0.5), make_run("b", 4.0, 0.1, teacher_nll=2.5)]
    rows = compare(runs).rows
    assert [(row.name, row.same_text) for row in rows] == [("a", True), ("b", False)]
    assert "other text" in compare(runs).caption()


def test_a_frontier_on_other_text_leaves_the_last_evaluation_out(make_run):
    run = make_run("student", 4.0, 0.3, [(6.0, 0.1), (2.0, 0.9)], num_tokens=100)
    assert [point["mean_k"] for point in points_of(run)] == [2.0, 6.0]


def test_the_common_k_is_one_that_most_runs_can_be_read_at(make_run):
    wide = make_run("wide", 5.0, 0.2, [(8.0, 0.1), (2.0, 0.9)])
    static, random = make_run("s", 4.0, 0.5, config=CONTROL), make_run("r", 4.0, 0.6)
    assert common_k([wide, static, random]) == 4.0
    assert compare([wide, static], mean_k=3.0).mean_k == 3.0


def test_a_run_on_other_text_has_no_say_in_the_common_k(make_run):
    student = make_run("student", 4.2, 0.30, [(6.0, 0.1), (3.0, 0.6)])
    control = make_run("static", 4.0, 0.5, config=CONTROL)
    others = [make_run(name, 4.2, 0.3, teacher_nll=2.5) for name in ("x", "y")]
    assert compare([student, control, *others]).mean_k == compare([student, control]).mean_k == 4.0


def test_a_run_that_did_not_finish_is_marked(make_run):
    run = make_run("a", 4.0, 0.5)
    done = replace(run, summary={"interrupted": False}, name="b")
    assert [row.finished for row in compare([run, done]).rows] == [False, True]
    table = compare([run, done]).tables()[1]
    assert [row[-1].endswith(", unfinished") for row in table.rows] == [True, False]


def test_a_diverged_run_comes_last(make_run):
    runs = [make_run("bad", 4.0, float("nan")), make_run("good", 4.0, 0.5)]
    found = compare(runs)
    assert [row.name for row in found.rows] == ["good", "bad"]


def test_the_verb_prints_a_table_json_or_markdown(make_run, tmp_path, capsys):
    make_run("a|b", 4.0, 0.5)
    make_run("c", 4.0, 0.25, config=CONTROL)
    folders = [str(tmp_path / "a|b"), str(tmp_path / "c")]
    assert cli.main(["compare", *folders]) == 0
    shown = capsys.readouterr().out
    assert "What differs in the settings" in shown
    assert shown.index("0.2500") < shown.index("0.5000")
    assert cli.main(["compare", *folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == ["c", "a|b"]
    assert cli.main(["compare", *folders, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "At equal compute:"
    assert lines[4].startswith("| run | k | KL |")
    assert "a\\|b" in lines[7]


def test_no_word_of_a_comparison_is_cut_on_a_narrow_terminal(make_run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("recommended", "static")
    found = compare([make_run(name, 4.0, kl) for name, kl in zip(names, (0.5, 0.25), strict=True)])
    rows = [replace(row, tokens=500_000_000, interval=(0.2345, 0.3456)) for row in found.rows]
    found = replace(found, rows=rows)
    print_comparison(found)
    shown = capsys.readouterr().out
    for _, header, cells in found.tables():
        for word in " ".join([*header, *(cell for row in cells for cell in row)]).split():
            assert word in shown
    assert "0.2345 to 0.3456" in shown


def test_markup_in_a_name_is_printed_as_it_is(make_run, capsys):
    print_comparison(compare([make_run("[red]a", 4.0, 0.5)]))
    assert "[red]a" in capsys.readouterr().out


def test_runs_without_an_evaluation_are_left_out_or_refused(make_run, tmp_path, capsys):
    make_run("done", 4.0, 0.5)
    young = write_records(tmp_path / "young", CONFIG, [])
    found = run_compare([tmp_path / "done", young])
    assert [row.name for row in found.rows] == ["done"]
    assert "young: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="RUN: got young without an evaluation"):
        run_compare([young])


@pytest.mark.parametrize("mean_k", [0.5, 8.5])
def test_a_budget_that_no_student_can_have_is_refused(make_run, tmp_path, mean_k):
    make_run("done", 4.0, 0.5)
    with pytest.raises(UserError, match=rf"--k: got {mean_k:g}, expected a number from 1 to 8"):
        run_compare([tmp_path / "done"], mean_k)


@pytest.mark.parametrize("verb", [["compare", "a", "b"], ["watch", "a", "--once"]], ids=str)
def test_runs_are_compared_and_watched_without_torch(make_run, tmp_path, verb):
    make_run("a", 4.0, 0.3)
    make_run("b", 4.0, 0.5)
    program = (
        "import sys\n"
        "from tiny_onn.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "print(status, sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program, *verb]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr
