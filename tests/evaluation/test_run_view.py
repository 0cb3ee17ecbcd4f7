"""What a report shows of single tokens, held to the definitions."""

import json

import numpy as np
import pytest
import torch

from tiny import make_dense, make_rows, make_student, make_tokenizer, write_run
from tiny_onn.config.schema import LossConfig
from tiny_onn.distill.loop import run_distill
from tiny_onn.evaluation.run_view import VIEW_NAME, correlation, measure_view, view_of_run
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import recorded_routings

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def measured():
    dense = make_dense(vocab_size=320)
    student = make_student(dense)
    rows = make_rows([7, 40, 17], 64)
    view = measure_view(student, dense, make_tokenizer(), rows, LossConfig(chunk_tokens=16))
    return dense, student, rows[0], view


def test_the_passage_is_the_longest_document_where_all_are_short(measured):
    _, _, row, view = measured
    decoded = [make_tokenizer().decode([token]) for token in row.input_ids[0, 7:47].tolist()]
    assert view["passage"]["text"] == decoded


def test_numbers_of_a_token_are_those_of_both_models(measured):
    dense, student, row, view = measured
    logits = [model(row.input_ids, **packed_kwargs(row)).logits[0] for model in (dense, student)]
    teacher, ours = (each.double().log_softmax(-1)[7:47] for each in logits)
    kl = (teacher.exp() * (teacher - ours)).sum(-1)
    assert view["passage"]["kl"] == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-6)
    following = row.labels[0, 7:46]
    nll = -ours[:-1].gather(-1, following[:, None])[:, 0]
    assert view["passage"]["student_nll"][:-1] == pytest.approx(nll.tolist(), rel=2e-3)


def test_experts_of_a_token_are_bits_of_a_number(measured):
    _, student, row, view = measured
    with recorded_routings(student.banks()) as routings:
        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    active = torch.stack([routing.active for routing in routings])[:, 7:47]
    for token, layers in enumerate(view["passage"]["active"]):
        for layer, bits in enumerate(layers):
            on = [bool(int(bits, 16) >> expert & 1) for expert in range(8)]
            assert on == active[layer, token].tolist()
    k = active.sum(-1).float().mean(0)
    assert view["passage"]["k"] == pytest.approx(k.tolist())


def test_coactivation_is_the_correlation_over_counted_tokens(measured):
    _, student, row, view = measured
    with recorded_routings(student.banks()) as routings:
        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    assert [table["layer"] for table in view["coactivation"]] == [0, 1]
    assert view["num_tokens"] == 61
    for table, routing in zip(view["coactivation"], routings, strict=True):
        active = routing.active[row.router_mask[0]].numpy().astype(float)
        varies = active.std(0) > 0
        expected = np.corrcoef(active[:, varies].T)
        found = np.array(table["phi_percent"])[varies][:, varies]
        assert found == pytest.approx(100 * expected, abs=0.51)


def test_an_expert_that_never_changes_correlates_with_nothing():
    active = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    assert correlation(active).tolist() == pytest.approx(
        np.array([[0, 0, 0], [0, 1, -1], [0, -1, 1]])
    )


def test_a_view_is_kept_and_measured_again_for_another_step(tmp_path):
    config = write_run(tmp_path, train={"tokens": 128})
    run_distill(config, out=tmp_path / "run")
    view = view_of_run(tmp_path / "run", "cpu")
    file = tmp_path / "run" / VIEW_NAME
    assert json.loads(file.read_text()) == view
    assert view["step"] == 2
    marked = {**view, "num_tokens": -1}
    file.write_text(json.dumps(marked))
    assert view_of_run(tmp_path / "run", "cpu") == marked
    for stale in (json.dumps({**marked, "step": 1}), json.dumps({**marked, "format": 0}), "{"):
        file.write_text(stale)
        assert view_of_run(tmp_path / "run", "cpu") == view
