"""What `eval` measures beyond a run's own records: definitions, domains, intervals, exact k."""

import json
import math

import pytest
import torch

from tiny import CONFIG, make_dense, make_student, make_tokenizer, write_run
from tiny_onn.cli import main as cli
from tiny_onn.config.schema import DataConfig
from tiny_onn.data.passages import text_passages
from tiny_onn.distill.loop import run_distill
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.evaluation.document_sums import interval, resampled
from tiny_onn.evaluation.evaluate import load_for_eval, run_eval
from tiny_onn.evaluation.exact import at_exactly
from tiny_onn.evaluation.measure import measure
from tiny_onn.evaluation.tally import BINS, calibration_error
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.report.exact_k import between
from tiny_onn.teacher.held_out import HeldOut, TaughtText

ROW = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two folders of texts."""
    folder = tmp_path_factory.mktemp("texts")
    for domain, words in (("prose", "the quick fox jumps "), ("code", "def f(x): return x\n")):
        (folder / domain).mkdir()
        for number in range(4):
            (folder / domain / f"{number}.txt").write_text(f"{number} " + words * (2 + number))
    return folder


def models():
    """A teacher of the test tokenizer's vocabulary and its student."""
    dense = make_dense(vocab_size=320)
    return dense, make_student(dense, selection="top_k", objective="none")


def taught(dense, texts, **changes):
    """The texts with their teacher."""
    options = {"stride": None, "max_tokens": 0} | changes
    passages = text_passages(texts, DataConfig(row_tokens=ROW), make_tokenizer(), **options)
    return TaughtText(dense, passages), passages


def test_the_numbers_of_a_runs_records_are_measured_alike(texts):
    dense, student = models()
    text, passages = taught(dense, texts)
    (found,) = measure(student, text, make_tokenizer())
    expected = evaluate(student, HeldOut(dense, list(passages)), CONFIG.loss).as_dict()
    for name, value in found.evaluation.as_dict().items():
        assert value == pytest.approx(expected[name], rel=1e-5), name


@torch.no_grad()
def test_windows_and_bytes_are_those_of_a_plain_loop(texts):
    dense, student = models()
    path, tokenizer, stride = texts / "code" / "3.txt", make_tokenizer(), 8
    text, _ = taught(dense, path, stride=stride)
    (found,) = measure(student, text, tokenizer)
    ids = [*tokenizer(path.read_text())["input_ids"], tokenizer.eos_token_id]
    total, done = 0.0, 1
    for start in range(0, len(ids), stride):
        window = torch.tensor([ids[start : start + ROW]])
        hidden = last_hidden_states(student, window)[0]
        log_p = head_of(student).logits(hidden).log_softmax(-1)
        end = start + window.shape[1]
        for place in range(done, end):
            total -= float(log_p[place - 1 - start, ids[place]])
        done = end
        if end == len(ids):
            break
    numbers = found.numbers()
    assert numbers["num_tokens"] == len(ids) - 1
    assert numbers["student_nll"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    # All but the first token's text is predicted, and the end of the document spells nothing.
    num_bytes = len(path.read_bytes()) - len(tokenizer.decode(ids[:1]))
    assert numbers["num_bytes"] == num_bytes
    bits = total / math.log(2) / num_bytes
    assert numbers["student_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_longer_past_changes_the_perplexity(texts):
    dense, student = models()
    nlls = [
        measure(student, taught(dense, texts, stride=stride)[0], make_tokenizer())[0]
        for stride in (None, 4)
    ]
    assert nlls[0].evaluation.student_nll != nlls[1].evaluation.student_nll


def test_domains_add_up_and_budgets_are_measured_in_one_pass(texts):
    dense, student = models()
    text, _ = taught(dense, texts)
    rule = student.banks()[0].router.rule
    found = measure(student, text, make_tokenizer(), [None, 8.0, 2.0], sources=(str(texts),))
    assert student.banks()[0].router.rule == rule
    assert [round(m.evaluation.mean_k, 3) for m in found] == [4, 8, 2]
    assert found[1].evaluation.forward_kl == pytest.approx(0, abs=1e-7)
    domains = found[0].domains(0)
    assert set(domains) == {str(texts / "prose"), str(texts / "code")}
    for name in ("forward_kl", "top5_agreement", "nll_difference"):
        total = sum(d[name] * d["num_tokens"] for d in domains.values())
        assert total / found[0].evaluation.num_tokens == pytest.approx(found[0].numbers()[name])
    low, high = found[0].intervals(0)["forward_kl"] or (0, 0)
    assert low < found[0].evaluation.forward_kl < high


def test_spread_is_that_of_tokens(texts):
    dense = make_dense(vocab_size=320)
    student = make_student(dense, selection="budget")
    text, _ = taught(dense, texts)
    (found,) = measure(student, text, make_tokenizer())
    spread = found.spread()
    assert spread["k"]["p5"] <= spread["k"]["p50"] <= spread["k"]["p95"]
    by_k = found.flops[0]
    assert spread["ffn_flops"]["std"] == pytest.approx(by_k * spread["k"]["std"])
    at_8 = between(
        {"mean_k": 0.0, "ffn_flops": found.evaluation.ffn_flops - by_k * found.evaluation.mean_k},
        {"mean_k": found.evaluation.mean_k, "ffn_flops": found.evaluation.ffn_flops},
        8.0,
    )["ffn_flops"]
    gate = at_8 - found.evaluation.dense_ffn_flops
    assert 0 < gate < found.evaluation.dense_ffn_flops
    assert spread["total_flops"]["std"] > 0


def test_a_calibration_error_is_the_gap_of_confidence_and_truth():
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    bins[:, 7], bins[:, 14] = torch.tensor([10.0, 5.0, 5.0]), torch.tensor([30.0, 29.0, 20.0])
    assert calibration_error(bins) == pytest.approx(9 / 40)
    assert calibration_error(torch.zeros(3, BINS)) is None


def test_intervals_follow_the_documents():
    equal = torch.tensor([[2.0, 1.0]] * 9, dtype=torch.float64)
    drawn = resampled(equal, 0)
    assert torch.equal(drawn[:, 0], torch.full((1000,), 18.0, dtype=torch.float64))
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)).double()
    low, high = interval(resampled(values, 0)[:, 0] / 400, 400) or (0, 0)
    # The standard error of the mean of 400 draws of variance 1 is 1/20.
    assert high - low == pytest.approx(4 / 20, rel=0.15)
    assert low < values.mean() < high
    assert interval(drawn[:, 0], 1) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    config = write_run(
        folder, num_files=80, experts={"calibration_tokens": 1024}, train={"tokens": 128}
    )
    run_distill(config, out=folder / "run")
    return folder / "run"


def test_a_budget_is_read_at_exactly_its_k_between_two_measurements_beside_it(run):
    bench = load_for_eval(str(run), text=None, device="cpu", max_tokens=512)
    # A surer gate than the one whose thresholds were measured misses every budget.
    for bank in bench.loaded.student.banks():
        bank.router.weight.mul_(3)
    (deployed,) = bench.measure([None])
    assert abs(deployed.evaluation.mean_k - 4) > 0.2
    wanted = 4.0
    points = [deployed, *bench.surround([deployed], [wanted])]
    found = at_exactly(points, wanted, 0)
    assert found is not None
    low, high = found["between"]
    assert 0.9 * wanted <= low["mean_k"] < wanted < high["mean_k"] <= 1.1 * wanted
    assert low["thresholds"] != high["thresholds"]
    assert found["mean_k"] == wanted
    share = (wanted - low["mean_k"]) / (high["mean_k"] - low["mean_k"])
    logs = [math.log(end["forward_kl"]) for end in (low, high)]
    expected = math.exp(logs[0] + share * (logs[1] - logs[0]))
    assert found["forward_kl"] == pytest.approx(expected)
    first, last = found["intervals"]["forward_kl"]
    assert first < found["forward_kl"] < last
    assert at_exactly([deployed], wanted, 0) is None


def test_eval_gives_everything_as_json_and_as_a_table(run, capsys):
    assert cli.main(["eval", str(run), "--device", "cpu", "--max-tokens", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["at_k"]["mean_k"] == found["budget"]["target_k"] == 4
    for name in ("reverse_kl", "top5_agreement", "student_bits_per_byte", "domains", "spread"):
        assert found[name]
    assert set(found["intervals"]) > {"forward_kl", "nll_difference", "bits_per_byte_difference"}
    assert cli.main(["eval", str(run), "--device", "cpu", "--max-tokens", "512"]) == 0
    shown = capsys.readouterr().out
    for part in ("deployed", "at k = 4", "at exactly k", "bits per byte", "calibration error"):
        assert part in " ".join(shown.split())


def test_a_student_without_measured_thresholds_has_no_numbers_at_k_and_says_why(run, monkeypatch):
    load = load_for_eval

    def unmeasured(*arguments, **options):
        bench = load(*arguments, **options)
        for bank in bench.loaded.student.banks():
            bank.router.threshold_table.zero_()
            bank.router.settled.sub_(0.04)
        return bench

    monkeypatch.setattr("tiny_onn.evaluation.evaluate.load_for_eval", unmeasured)
    found = run_eval(str(run), text=None, device="cpu", max_tokens=512)
    assert found["at_k"] is None
    assert "without measured thresholds" in found["at_k_missing"]
