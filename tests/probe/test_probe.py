"""The verb `probe` on a dense model, a finished run and one in the middle."""

import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console

from tiny import make_rows, write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.probe import measure as measure_module
from tiny_onn.probe.measure import measure_documents, sample_documents
from tiny_onn.probe.probe import run_probe
from tiny_onn.probe.summary import quantities
from tiny_onn.report.probe import console_tables, markdown, tables
from tiny_onn.runs.students import load_student

RULES = {"parameters", "input", "output", "gain", "magnitude", "relative", "own gain"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    config = write_run(
        folder,
        data={"held_out_fraction": 0.3},
        train={"tokens": 256, "save_every_tokens": 64},
    )
    run_distill(config, out=folder / "run")
    return folder


def probed(model, out, **changes):
    options = {"device": "cpu", "max_tokens": 60, "document_tokens": 12, "fit_tokens": 120}
    return run_probe(str(model), out=out, **{**options, **changes})


@pytest.fixture(scope="module")
def of_student(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("student")
    return probed(run / "run", out), out


def test_a_student_is_probed_for_what_it_has_and_for_what_it_lacks(of_student):
    found, out = of_student
    assert found["loss"] == "forward_kl"
    assert (found["num_documents"], found["num_tokens"]) == (5, 50)
    assert found["num_first_tokens"] == 5
    assert found["intervals"] == "tokens"
    assert list(found["layers"]) == ["0", "1"]
    for record in found["layers"].values():
        for kind in ("remove", "add", "remove_first_token"):
            assert set(record[kind]["rules"]) == RULES
            level = {name: value[0] for name, value in record[kind]["levels"].items()}
            assert level["worst"] <= level["random"] <= level["best"]
            for rule in record[kind]["rules"].values():
                for end in ("min", "max"):
                    assert level["worst"] - 1e-9 <= rule[f"truth_at_{end}"][0]
                    assert rule[f"truth_at_{end}"][0] <= level["best"] + 1e-9
            # Every expert of a token has the same gradient at its output.
            assert record[kind]["rules"]["output"]["constant"][0] == 1
            assert math.isnan(record[kind]["rules"]["output"]["spearman"][0])
        assert record["remove"]["mean_candidates"] + record["add"]["mean_candidates"] > 6
    read = json.loads((out / "probe.json").read_text())
    assert read.keys() == found.keys()


def test_own_gain_ranks_as_the_truth_does_in_the_last_layer(of_student):
    # The last layer's output reaches no other token, so that both gains are one.
    rules = of_student[0]["layers"]["1"]["remove"]["rules"]
    assert rules["own gain"]["spearman"][0] == pytest.approx(rules["gain"]["spearman"][0], abs=0.01)
    assert rules["own gain"]["spearman"][0] > 0.5


def test_no_number_or_word_is_cut_on_a_narrow_terminal(of_student):
    console = Console(width=80, file=io.StringIO(), record=True)
    for table in console_tables(of_student[0]):
        console.print(table)
    shown = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for _, header, rows in tables(of_student[0]):
        for word in " ".join([*header, *(cell for row in rows for cell in row)]).split():
            assert word.replace("correlation", "corr.") in shown


def test_the_report_holds_a_row_per_rule_and_a_picture(of_student):
    found, out = of_student
    text = markdown(json.loads((out / "probe.json").read_text()))
    for layer in ("Layer 0", "Layer 1"):
        assert text.count(f"**{layer}, ") == 4
    assert text.count("| gain |") == 8
    assert len(list(console_tables(found))) == 8
    page = (out / "probe.html").read_text()
    assert page.count("<svg") == 10
    assert "http" not in page
    assert "<script" not in page


def test_a_dense_model_is_converted_with_all_experts_on(run, tmp_path):
    found = probed(run / "teacher", tmp_path, num_experts=6, layers=[1], max_tokens=400)
    assert (found["loss"], found["conversion"]) == ("next_token", "slices, all experts on")
    assert found["num_experts"] == 6
    assert list(found["layers"]) == ["1"]
    assert found["intervals"] == "documents"
    (record,) = found["layers"].values()
    assert record["add"] is None
    assert record["remove"]["mean_candidates"] == 6


def test_the_kl_of_a_fresh_conversion_is_zero_and_removal_can_only_harm(run, tmp_path):
    found = probed(run / "teacher", tmp_path, num_experts=6, layers=[0], loss="forward-kl")
    assert abs(found["mean_loss"]) < 1e-5
    assert found["layers"]["0"]["remove"]["levels"]["worst"][0] > -1e-5


def test_without_fitting_text_nothing_is_predicted(run, tmp_path):
    found = probed(run / "run", tmp_path, fit_tokens=0, layers=[0])
    assert found["layers"]["0"]["predictable"] is None
    assert found["fit_tokens"] == 0


def test_a_run_in_the_middle_gives_its_newest_checkpoint(run, tmp_path):
    middle = tmp_path / "run"
    shutil.copytree(run / "run", middle)
    shutil.rmtree(middle / "student")
    finished = load_student(str(run / "run"), torch.device("cpu")).student
    newest = load_student(str(middle), torch.device("cpu")).student
    # The newest checkpoint is the end of this run: all of the student but what is measured after.
    for name, tensor in finished.state_dict().items():
        if not name.endswith(("settled", "threshold_table")):
            assert torch.equal(newest.state_dict()[name], tensor), name
    found = probed(middle, tmp_path / "out", layers=[0], fit_tokens=0)
    assert found["conversion"] == "student"
    (newer,) = sorted((middle / "checkpoints").glob("step-*"))[-1:]
    shutil.rmtree(newer)
    earlier = load_student(str(middle), torch.device("cpu")).student
    assert not torch.equal(
        earlier.banks()[0].experts.down_proj, newest.banks()[0].experts.down_proj
    )


def test_an_interrupted_probe_keeps_what_it_measured(of_student, run, tmp_path, monkeypatch):
    def interrupted(*arguments):
        losses = measure_documents(*arguments)
        yield from (next(losses) for _ in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_module, "measure_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probed(run / "run", tmp_path)
    kept, whole = json.loads((tmp_path / "probe.json").read_text()), of_student[0]
    assert (whole["complete"], kept["complete"]) == (True, False)
    assert (whole["num_documents"], kept["num_documents"]) == (5, 3)
    assert kept["layers"]["1"]["predictable"] is None
    # The same documents alone measure the same.
    monkeypatch.undo()
    alone = probed(run / "run", tmp_path, max_tokens=36, fit_tokens=0)
    assert alone["num_documents"] == 3
    again = json.loads((tmp_path / "probe.json").read_text())
    assert again["layers"] == kept["layers"]


def test_an_oracle_has_no_gate_to_probe(tmp_path):
    config = write_run(
        tmp_path, router={"selection": "oracle", "objective": "none"}, train={"tokens": 64}
    )
    run_distill(config, out=tmp_path / "run")
    with pytest.raises(UserError, match="'oracle', expected one with a gate"):
        probed(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experts", [{"weighting": "ramp"}, {"token_scale": True}])
def test_weights_that_an_inactive_expert_lacks_are_not_probed(experts, tmp_path):
    config = write_run(
        tmp_path, experts=experts, router={"budget_form": "threshold"}, train={"tokens": 64}
    )
    run_distill(config, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"^MODEL: got .*, expected one without, .*; probe its"):
        probed(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_documents_are_beginnings_and_the_fit_reads_others():
    rows = make_rows([20, 30, 25, 40, 9, 31], 64)
    probed_ids, fitted_ids = sample_documents(rows, 8, 20, 30)
    assert [ids.shape[1] for ids in probed_ids] == [8, 8, 8]
    starts = [rows[0].input_ids[:, :8], rows[0].input_ids[:, 20:28]]
    for got, expected in zip(probed_ids, starts, strict=False):
        assert torch.equal(got, expected)
    assert sum(ids.shape[1] for ids in fitted_ids) >= 30
    text = torch.cat(list(probed_ids), dim=1)[0].tolist()
    for ids in fitted_ids:
        assert ids[0, :6].tolist() not in [text[i : i + 6] for i in range(len(text))]


def test_quantities_are_what_their_names_say():
    gain = torch.tensor([[0.5, -2.0, 1.0, -0.1]])
    found = quantities(gain, torch.tensor([[1.0, math.e, 0.0, 2.0]]))
    assert found["gain above 0"].tolist() == [[0.5, 0.0, 1.0, 0.0]]
    assert found["gain in the top half"].tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert found["log magnitude"][0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [2]}, "--layers: got 2, expected 0 to 1"),
        ({"loss": "mse"}, "--loss: got mse, expected one of auto"),
    ],
)
def test_mistakes_are_told(run, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        probed(run / "run", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
