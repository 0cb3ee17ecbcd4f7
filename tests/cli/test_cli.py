"""The command line: help, exit statuses, and one line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.config.template import config_template
from tiny_onn.errors import UserError
from tiny_onn.parallel import World
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import create_run_folder

FINISHED = types.SimpleNamespace(interrupted=False)
VERBS = (
    "demo",
    "plan",
    "cache",
    "distill",
    "watch",
    "eval",
    "probe",
    "report",
    "compare",
    "generate",
    "chat",
    "export",
    "config",
)


@pytest.fixture(autouse=True)
def handlers():
    """Handle signals after each test as before it; an interrupted program does no more."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run_cli(*arguments, cwd=None):
    """Run the real program."""
    command = [sys.executable, "-m", "tiny_onn.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def status_of(arguments):
    """Return the exit status of `main`, whether it returns or exits."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replace a verb's module, whose real run takes minutes, and return the calls it got.

    The models `m` and `runs/x` are folders, which is all that the command line looks at.
    """
    monkeypatch.chdir(tmp_path)
    for model in ("m", "runs/x"):
        Path(model).mkdir(parents=True)

    def install(module, function, result=None):
        calls = []

        def record(*arguments, **keywords):
            calls.append((arguments, keywords))
            if isinstance(result, BaseException):
                raise result
            print("progress")
            return result

        stub = types.ModuleType(f"tiny_onn.{module}")
        setattr(stub, function, record)
        monkeypatch.setitem(sys.modules, f"tiny_onn.{module}", stub)
        return calls

    return install


def test_help_names_every_verb():
    command = [sys.executable, "-m", "tiny_onn.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb, capsys):
    assert status_of([verb, "--help"]) == 0
    assert f"Example: tiny-onn {verb}" in capsys.readouterr().out


def test_help_of_distill_points_to_the_settings_instead_of_listing_them(capsys):
    assert status_of(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    assert "tiny-onn config" in text
    assert "num_experts" not in text
    assert "--experts" not in text


def test_version_is_printed():
    done = run_cli("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny-onn ")


MALFORMED = [
    [],
    ["frobnicate"],
    ["--frob"],
    ["demo", "extra"],
    ["demo", "--set"],
    ["distill", "a.toml", "b.toml"],
    ["distill", "--optim.lr", "3"],
    ["eval"],
    ["eval", "model", "--max-tokens", "1.5"],
    ["generate", "model", "--prompt", "x", "--seed", "x"],
    ["chat"],
    ["chat", "model", "--prompt", "x"],
    ["config", "--json"],
]


@pytest.mark.parametrize("arguments", MALFORMED, ids=" ".join)
def test_malformed_command_line_exits_with_2(arguments, capsys):
    assert status_of(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err != ""


def test_a_misspelt_verb_gets_the_nearest(capsys):
    assert status_of(["distil", "--preset", "demo"]) == 2
    said = capsys.readouterr().err
    assert "tiny-onn: error: got distil, expected a verb; did you mean distill?" in said


MISTAKES = [
    (["distill"], "got neither RUN.toml nor --preset"),
    (["distill", "--resume"], "--resume: got no --out"),
    (["distill", "--set", "train.seed=1"], "got neither RUN.toml nor --preset"),
    (["distill", "--preset", "demo", "--allow-change", "train.tokens"], "got no --resume"),
    (["distill", "missing.toml"], "missing.toml: cannot read it (No such file or directory)"),
    (["distill", "."], "cannot read it (Is a directory)"),
    (["distill", "--preset", "nope"], 'preset: got "nope", expected one of demo'),
    (["distill", "--preset", "demo", "--set", "train.seed=-1"], "train.seed: got -1"),
    (["distill", "--preset", "demo", "--set", "train.sed=1"], "did you mean train.seed?"),
    (["distill", "--preset", "demo", "--set", "seed"], "expected SECTION.KEY=VALUE"),
    (["distill", "--resume", "--out", "nowhere"], "config.json: cannot read it"),
    (["cache", "--out", "x"], "cache: got neither RUN.toml nor --preset"),
    (["cache", "--preset", "model-card"], "--out: got none, expected the folder of the cache"),
    (["cache", "--preset", "demo", "--out", "x"], "loss.states_coef: got 64.0 with a cache"),
    (
        ["cache", "--preset", "demo", "--format", "int4"],
        "--format: got int4, expected one of bfloat16",
    ),
    (["config", "broken.toml"], "broken.toml: got malformed TOML"),
    (["config", "--set", "a\nb.c=1"], 'got unknown section "a\\nb"'),
    (["eval", "m", "--device", "tpu"], '--device: got "tpu", expected auto, cpu, cuda or cuda:N'),
    (["eval", "m", "--max-tokens", "-1"], "--max-tokens: got -1, expected an integer from 0"),
    (["eval", "m", "--budget", "x"], "--budget: got x, expected numbers with commas"),
    (["eval", "m", "--budget", "8", "--frontier"], "--frontier: got --budget too"),
    (["eval", "m", "--limit", "5"], "--limit: got no --tasks, which it is for"),
    (["eval", "m", "--tasks", "a,,b"], "--tasks: got a,,b, expected names with commas"),
    (["eval", "m", "--tasks", "a", "--frontier"], "--frontier: got --tasks too"),
    (["eval", "m", "--tasks", "a", "--stride", "3"], "--stride: got --tasks too"),
    (["eval", "m", "--tasks", "a", "--max-tokens", "3"], "--max-tokens: got --tasks too"),
    (["eval", "m", "--tasks", "a", "--budget", "8,4"], "--budget: got 8,4 with --tasks"),
    (["eval", "m", "--tasks", "a", "--limit", "0"], "--limit: got 0, expected an integer from 1"),
    (["eval", "m", "--tasks", "a"], "MODEL: got m, expected a run folder"),
    (["probe", "m", "--layers", "1,x"], "--layers: got 1,x, expected integers"),
    (["probe", "m", "--document-tokens", "2"], "--document-tokens: got 2"),
    (["probe", "m", "--loss", "mse"], "--loss: got mse, expected one of auto, forward-kl"),
    (["probe", "m", "--init", "x"], "--init: got x, expected one of random, slices"),
    (["report"], "RUN: got none, expected the folder of a run"),
    (["report", "nowhere"], "RUN: got nowhere, expected the folder of a run"),
    (["report", "m", "--device", "tpu"], '--device: got "tpu"'),
    (["compare"], "RUN: got none, expected the folder of a run"),
    (["compare", "m", "--k", "0"], "--k: got 0, expected a number of experts above 0"),
    (["compare", "m", "--json", "--markdown"], "--markdown: got --json too"),
    (["generate", "m", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: got 0"),
    (["generate", "m", "--prompt", "x", "--temperature", "-1"], "--temperature: got -1.0"),
    (["generate", "m", "--prompt", "x", "--temperature", "nan"], "--temperature: got nan"),
    (["generate", "m", "--prompt", "x", "--seed", "-1"], "--seed: got -1"),
    (["generate", "m", "--prompt", "x", "--seed", "9" * 30], "--seed: got 999"),
    (["generate", "m", "--prompt", "x", "--top-p", "0"], "--top-p: got 0.0, expected a number"),
    (["generate", "m", "--prompt", "x", "--top-k", "-1"], "--top-k: got -1, expected an integer"),
    (["generate", "m", "--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty: got"),
    (["generate", "m", "--prompt", "x", "--device", "tpu"], '--device: got "tpu"'),
    (["generate", "m", "--prompt", ""], "--prompt: got an empty text"),
    (["chat", "m", "--temperature", "-1"], "--temperature: got -1.0"),
    (["chat", "./m"], "MODEL: got ./m, expected a folder with a model"),
    (["generate", "./m", "--prompt", "x"], "MODEL: got ./m, expected a folder with a model"),
    (["probe", "./m"], "MODEL: got ./m, expected a folder with a model"),
    (["eval", "m"], "MODEL: got m, expected a run folder"),
    (["eval", "m", "--frontier"], "MODEL: got m, expected a run folder"),
    (["compare", "nowhere"], "RUN: got nowhere, expected the folder of a run"),
    (["plan", "--preset", "demo", "--device", "RTX 9"], "--device: got RTX 9, expected auto, cpu"),
    (["plan", "--preset", "demo", "--device", "1,2,x"], "--device: got 1,2,x, expected three"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistake_exits_with_2_and_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_bytes(b"[\n\n\xff")
    assert status_of(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tiny-onn: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.toml"]


RESUME = ["distill", "--resume", "--out", "run"]
SEVERAL = "runs: got a folder of runs, expected a run; name one of runs/one, runs/two"
MISTAKES_WITH_A_STUDENT = [
    *(
        (verb, SEVERAL)
        for verb in (
            ["generate", "runs", "--prompt", "x"],
            ["chat", "runs"],
            ["eval", "runs"],
            ["eval", "runs", "--tasks", "arc_easy"],
            ["export", "runs", "--to", "gguf", "--out", "x"],
            ["distill", "--resume", "--out", "runs"],
            ["watch", "runs"],
        )
    ),
    (["generate", ".", "--prompt", "x"], ".: got a folder of runs, expected a run; name one of ru"),
    *(
        ([*verb, "--budget", budget], f"--budget: got {budget}, expected 1 to 32, the experts of")
        for verb in (
            ["eval", "run"],
            ["eval", "run", "--tasks", "arc_easy"],
            ["export", "run", "--to", "gguf", "--out", "x"],
            ["generate", "run", "--prompt", "x"],
            ["chat", "run"],
        )
        for budget in ("0", "33", "nan")
    ),
    (["eval", "run", "--budget", "16,40"], "--budget: got 40, expected 1 to 32"),
    (["eval", "student", "--budget", "9"], "--budget: got 9, expected 3 to 8, the experts of a la"),
    (["eval", "student", "--budget", "3.5"], "--budget: got 3.5, expected a whole number with"),
    (["eval", "old_student", "--budget", "4"], "--budget: got a student with router.selection ="),
    (
        ["eval", "run", "--out", "x"],
        "--out: got x, expected --budget, --frontier or --tasks",
    ),
    (["eval", "run", "--text", "nowhere.txt"], "--text: nowhere.txt: no such file or folder"),
    (["eval", "run", "--text", "empty.txt"], "--text: empty.txt: no text in it"),
    (["eval", "student", "--budget", "4", "--text", "nowhere.txt"], "--text: nowhere.txt"),
    (["export", "run", "--to", "gguf", "--out", "x", "--text", "a.txt"], "--text: a.txt"),
    *(
        ([*verb, "empty.txt/x"], f"{verb[-1]}: got {place}, expected a folder to write to, and em")
        for verb, place in (
            (["eval", "run", "--out"], "empty.txt/x"),
            (["eval", "run", "--tasks", "arc_easy", "--out"], "empty.txt/x"),
            (["export", "run", "--to", "gguf", "--out"], "empty.txt/x"),
            (["report", "run", "--out"], "empty.txt"),
            (["plan", "--preset", "demo", "--html"], "empty.txt"),
        )
    ),
]


def write_students(folder):
    """Write what the command line reads of a run and of two students before it loads them."""
    create_run_folder(folder / "run", load_config(None, "demo", []), argv=[])
    routing = {"selection": "top_k", "num_shared": 2}
    tables = {
        "student": {"num_experts": 8, "routing": routing},
        "old_student": {"num_experts": 8, "selection": "top_any"},
    }
    for name, table in tables.items():
        (folder / name).mkdir()
        write_json(folder / name / "config.json", {"model_type": "tiny_onn", **table})
    (folder / "empty.txt").touch()
    for name in ("one", "two"):
        create_run_folder(folder / "runs" / name, RunConfig(), argv=[])
        (folder / "runs" / name / "metrics.jsonl").touch()


@pytest.mark.parametrize(("arguments", "message"), MISTAKES_WITH_A_STUDENT, ids=str)
def test_mistake_about_a_student_is_told_from_its_settings(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_students(tmp_path)
    assert status_of(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


ANSWERED_WITHOUT_TORCH = [
    [],
    ["--help"],
    ["--version"],
    *([verb, "--help"] for verb in VERBS),
    *MALFORMED,
    *(arguments for arguments, _ in MISTAKES),
    ["config"],
    ["config", "--preset", "model-card", "--set", "train.seed=7"],
    # Each kind of mistake in a setting, through each verb that takes settings.
    *(
        [*verb, "--set", mistake]
        for verb in (["config"], ["demo"], ["plan"], ["distill", "--preset", "demo"], RESUME)
        for mistake in (
            "router.target=3",
            "train.seed=x",
            "train.seed=-1",
            "train.seed=[",
            "optim.decay_fraction=1.0",
            "train.device=tpu",
            "router.selection=static",
        )
    ),
    [*RESUME, "--set", "train.tokens=9"],
    [*RESUME, "--allow-change", "train.seed"],
    [*RESUME, "--allow-change", "seed"],
    *(arguments for arguments, _ in MISTAKES_WITH_A_STUDENT),
]
ANSWER_ALL = """
import contextlib, io, json, sys
from tiny_onn.cli import main as cli

for arguments in json.loads(sys.argv[1]):
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
    loaded = sorted({"torch", "transformers", "datasets"} & sys.modules.keys())
    print(json.dumps([arguments, status, loaded]))
"""


def test_help_settings_and_mistakes_answer_without_torch(tmp_path):
    (tmp_path / "broken.toml").write_bytes(b"[\n\n\xff")
    write_students(tmp_path)
    command = [sys.executable, "-c", ANSWER_ALL, json.dumps(ANSWERED_WITHOUT_TORCH)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer for answer in answers if answer[2]] == []
    mistaken = [answer for answer in answers if answer[1] not in (0, 2)]
    assert (len(answers), mistaken) == (len(ANSWERED_WITHOUT_TORCH), [])
    through_settings = [answer for answer in answers if "--set" in answer[0] and answer[1] == 0]
    assert [answer[0][0:3] for answer in through_settings] == [["config", "--preset", "model-card"]]


def test_modules_of_the_settings_are_imported_without_torch():
    settings = ("schema", "read", "checks", "routing_checks", "changes", "describe", "template")
    modules = ("errors", "console", *(f"config.{name}" for name in settings))
    program = "".join(f"import tiny_onn.{name}\n" for name in (*modules, "runs.folder"))
    program += "import sys\nprint({'torch', 'transformers', 'datasets'} & sys.modules.keys())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_mistake_in_the_real_program_shows_no_traceback(tmp_path):
    done = run_cli("distill", "missing.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tiny-onn: error: missing.toml: ")
    assert done.stderr.count("\n") == 1


def test_argument_that_is_no_utf8_is_told(tmp_path):
    command = [sys.executable, "-m", "tiny_onn.cli", "config", "--set", b"teacher.path=\xff"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "teacher.path: got " in done.stderr
    assert "Traceback" not in done.stderr


def test_config_prints_the_template_and_the_effective_settings(capsys, tmp_path):
    assert status_of(["config"]) == 0
    assert capsys.readouterr().out == config_template()
    assert status_of(["config", "--preset", "model-card", "--set", "train.seed=7"]) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path, None, []) == load_config(None, "model-card", ["train.seed=7"])


@pytest.mark.parametrize("arguments", [["config"], ["--help"], ["distill", "--help"]], ids=" ".join)
def test_reader_that_leaves_early_is_no_error(arguments):
    command = [sys.executable, "-m", "tiny_onn.cli", *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["config"], ["plan", "--preset", "demo", "--json"]])
def test_a_full_disk_under_standard_output_is_told_in_one_line(arguments):
    command = [sys.executable, "-m", "tiny_onn.cli", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tiny-onn: error: standard output, or a file: got 'No space left")
    assert done.stderr.count("\n") == 1


def test_a_mistake_has_its_status_where_its_line_cannot_be_written():
    command = [sys.executable, "-m", "tiny_onn.cli", "config", "--preset", "none"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


def test_distill_passes_the_resolved_settings(stand_in, tmp_path, capsys):
    calls = stand_in("distill.loop", "run_distill", FINISHED)
    out = str(tmp_path / "run")
    arguments = ["distill", "--preset", "demo", "--set", "train.seed=1", "--set", "train.tokens=9"]
    assert status_of([*arguments, "--out", out]) == 0
    assert (
        f"tiny-onn: the student is {out}/student; `tiny-onn report {out}`"
        in capsys.readouterr().err
    )
    config = load_config(None, "demo", ["train.seed=1", "train.tokens=9"])
    options = {"resume": False, "allow_change": (), "track": (), "argv": sys.argv}
    options["world"] = World()
    assert calls == [((config,), {"out": Path(out), **options})]


@pytest.mark.parametrize("arguments", [["--preset", "demo"], ["demo.toml"]])
def test_run_folder_is_named_after_the_settings_and_the_time(
    arguments, stand_in, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("demo.toml").write_text("")
    calls = stand_in("distill.loop", "run_distill", FINISHED)
    assert status_of(["distill", *arguments]) == 0
    out = calls[0][1]["out"]
    assert out.parent == Path("runs")
    name, day, clock = out.name.split("-")
    assert (name, len(day), len(clock)) == ("demo", 8, 6)


def test_resuming_needs_only_the_folder(stand_in, tmp_path):
    config = RunConfig()
    create_run_folder(tmp_path / "run", config, argv=[])
    calls = stand_in("distill.loop", "run_distill", FINISHED)
    assert status_of(["distill", "--resume", "--out", str(tmp_path / "run")]) == 0
    options = {"resume": True, "allow_change": (), "track": (), "argv": sys.argv}
    options["world"] = World()
    assert calls == [((config,), {"out": tmp_path / "run", **options})]


def test_resuming_takes_settings_over_the_runs_own(stand_in, tmp_path):
    out = tmp_path / "run"
    create_run_folder(out, load_config(None, "demo", ["train.seed=3"]), argv=[])
    calls = stand_in("distill.loop", "run_distill", FINISHED)
    arguments = ["--set", "train.tokens=9", "--allow-change", "train.tokens"]
    assert status_of(["distill", "--resume", "--out", str(out), *arguments]) == 0
    ((config,), options) = calls[0]
    assert config == load_config(None, "demo", ["train.seed=3", "train.tokens=9"])
    assert options["allow_change"] == ("train.tokens",)


def test_demo_passes_folder_and_overrides(stand_in):
    calls = stand_in("studies.demo", "run_demo")
    assert status_of(["demo", "--set", "train.seed=3", "--out", "here"]) == 0
    assert calls == [((Path("here"), ("train.seed=3",)), {})]


def test_eval_as_json_prints_nothing_else(stand_in, capsys):
    result = {"forward_kl": 0.25, "cost": {"ffn_flops": 3}}
    calls = stand_in("evaluation.evaluate", "run_eval", result)
    assert status_of(["eval", "runs/x", "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    assert printed.err == "progress\n"
    options = {"text": None, "device": "cpu", "max_tokens": 8192, "checkpoint": "newest"}
    rest = {"stride": None, "teacher": None, "quantize": "none"}
    assert calls == [(("runs/x",), options | rest)]


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("evaluation.evaluate", "run_eval", ["eval", "m", "--json"]),
        ("evaluation.harness", "run_tasks", ["eval", "m", "--tasks", "arc", "--json"]),
        ("probe.probe", "run_probe", ["probe", "m", "--json"]),
        ("deploy.generate", "run_generate", ["generate", "m", "--prompt", "x"]),
        ("deploy.chat", "run_chat", ["chat", "m"]),
    ],
)
def test_every_verb_that_reads_a_teacher_passes_its_new_place(
    stand_in, module, function, arguments
):
    calls = stand_in(module, function, {})
    assert status_of([*arguments, "--teacher", "b/t"]) == 0
    assert calls[0][1]["teacher"] == "b/t"


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("evaluation.evaluate", "run_eval", ["eval", "m", "--json"]),
        ("evaluation.frontier", "run_frontier", ["eval", "m", "--budget", "4", "--json"]),
        ("evaluation.harness", "run_tasks", ["eval", "m", "--tasks", "arc", "--json"]),
        ("deploy.generate", "run_generate", ["generate", "m", "--prompt", "x"]),
        ("deploy.chat", "run_chat", ["chat", "m"]),
    ],
)
def test_every_verb_that_runs_a_student_passes_the_format_of_its_experts(
    stand_in, module, function, arguments
):
    calls = stand_in(module, function, {})
    assert status_of([*arguments, "--quantize", "int8"]) == 0
    assert calls[0][1]["quantize"] == "int8"


def test_eval_at_budgets_prints_a_table_of_points(stand_in, capsys, monkeypatch):
    point = {"budget": 8.0, "mean_k": 8.1}
    calls = stand_in("evaluation.frontier", "run_frontier", {"points": [point]})
    table = types.ModuleType("tiny_onn.report.frontier")
    vars(table)["frontier_tables"] = str
    monkeypatch.setitem(sys.modules, "tiny_onn.report.frontier", table)
    assert status_of(["eval", "m", "--budget", "8,4.5", "--out", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"points": [point]}
    ((arguments, keywords),) = calls
    assert (arguments, keywords["budgets"], keywords["out"]) == (("m",), [8.0, 4.5], Path("x"))
    assert status_of(["eval", "m", "--frontier"]) == 0
    assert calls[1][1]["budgets"] == ()
    assert calls[1][1]["out"] is None
    assert status_of(["eval", "m", "--frontier", "--teacher", "b/t"]) == 0
    assert [keywords["teacher"] for _, keywords in calls] == [None, None, "b/t"]


def test_eval_of_tasks_passes_its_options_and_prints_a_table(stand_in, capsys):
    row = {"task": "arc", "metric": "acc", "filter": "none", "num_documents": 9}
    row |= {"student": 0.5, "teacher": 0.75, "difference": -0.25, "interval": [-0.5, 0.125]}
    other = row | {"metric": "perplexity", "interval": None}
    calls = stand_in("evaluation.harness", "run_tasks", {"rows": [row, other]})
    options = ["--tasks-folder", "x", "--limit", "9", "--budget", "8", "--num-fewshot", "0"]
    assert status_of(["eval", "m", "--tasks", "arc, b", *options]) == 0
    ((arguments, keywords),) = calls
    assert (arguments, keywords["budget"]) == (("m",), 8.0)
    assert keywords["out"] is None
    assert keywords["options"] == {
        "tasks": ["arc", "b"],
        "tasks_folder": Path("x"),
        "num_fewshot": 0,
        "limit": 9,
        "batch_size": 8,
        "chat": False,
    }
    table = capsys.readouterr().out
    assert "-0.5 to +0.125" in table
    assert "-0.25" in table
    assert status_of(["eval", "m", "--tasks", "arc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [row, other]}


def test_probe_passes_its_options(stand_in, capsys):
    calls = stand_in("probe.probe", "run_probe", {"layers": {}})
    assert status_of(["probe", "m", "--layers", "4,15", "--loss", "next-token", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"layers": {}}
    ((arguments, keywords),) = calls
    assert (arguments, keywords["layers"], keywords["loss"]) == (("m",), [4, 15], "next-token")


def test_generate_passes_its_options(stand_in):
    calls = stand_in("deploy.generate", "run_generate")
    assert status_of(["generate", "m", "--prompt", "x y", "--temperature", "0"]) == 0
    ((arguments, keywords),) = calls
    assert arguments == ("m",)
    assert (keywords["prompt"], keywords["temperature"], keywords["seed"]) == ("x y", 0.0, 0)
    assert keywords["compiled"] is False


@pytest.mark.parametrize("prompt", [[], ["--prompt", "-"]], ids=str)
def test_generate_reads_a_prompt_from_standard_input(stand_in, monkeypatch, prompt):
    calls = stand_in("deploy.generate", "run_generate")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("h\u00e9\n\n".encode())))
    assert status_of(["generate", "m", *prompt]) == 0
    assert calls[0][1]["prompt"] == "h\u00e9\n"


def test_generate_without_a_prompt_names_the_ways_to_give_one(stand_in, monkeypatch, capsys):
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert status_of(["generate", "m"]) == 2
    assert "--prompt: got none, expected a text; give one, or" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert status_of(["generate", "m"]) == 2
    assert "a byte that is not UTF-8 at 1" in capsys.readouterr().err


def test_chat_passes_its_options(stand_in):
    calls = stand_in("deploy.chat", "run_chat")
    options = ["--budget", "8", "--system", "be brief", "--top-k", "5", "--compile"]
    assert status_of(["chat", "m", *options]) == 0
    ((arguments, keywords),) = calls
    assert (arguments, keywords["budget"], keywords["system"]) == (("m",), 8.0, "be brief")
    assert (keywords["top_k"], keywords["top_p"], keywords["temperature"]) == (5, None, 0.7)
    assert keywords["compiled"] is True


def test_interrupt_exits_with_130_and_one_line(stand_in, capsys):
    stand_in("studies.demo", "run_demo", KeyboardInterrupt())
    assert status_of(["demo", "--out", "x"]) == 130
    assert capsys.readouterr().err == "tiny-onn: interrupted\n"


# Ctrl-C comes while a library is imported that makes an error of its own of the interrupt.
SWALLOWED = """
import os, signal, sys
from pathlib import Path

library = '''
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("half a module")
'''
Path("{library}.py").write_text(library)
sys.path.insert(0, ".")
signal.signal(signal.SIGINT, signal.default_int_handler)
from tiny_onn.cli.__main__ import main
sys.argv = ["tiny-onn", "plan", "--preset", "demo"]
sys.exit(main())
"""


@pytest.mark.parametrize("library", ["tyro", "torch"])
def test_ctrl_c_while_libraries_are_imported_ends_at_once_in_one_line(tmp_path, library):
    command = [sys.executable, "-c", SWALLOWED.format(library=library)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=30, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tiny-onn: interrupted\n")


# Signals come while the interpreter waits for a thread, and while it calls functions at its exit.
INTERRUPTED = """
import atexit, os, signal, sys, threading, time
from tiny_onn.cli import main as cli

def send():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.1)

def work():
    returned.wait()
    send()
    time.sleep({seconds})

def interrupt(_):
    threading.Thread(target=work).start()
    raise KeyboardInterrupt

returned = threading.Event()
atexit.register(send)
cli._run, cli.ENDING_S = interrupt, {ending}
status = cli.main(["config"])
returned.set()
sys.exit(status)
"""


@pytest.mark.parametrize(("ending", "seconds"), [(60, 0), (0, 60)])
def test_signals_after_an_interrupt_leave_the_end_alone_unless_it_takes_long(ending, seconds):
    code = INTERRUPTED.format(ending=ending, seconds=seconds)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (130, "tiny-onn: interrupted\n")


def test_run_that_stopped_early_exits_with_130(stand_in, capsys):
    stand_in("distill.loop", "run_distill", types.SimpleNamespace(interrupted=True))
    assert status_of(["distill", "--preset", "demo", "--out", "x"]) == 130
    saved, end = capsys.readouterr().err.splitlines()
    assert saved == "tiny-onn: the run is saved; resume it with `tiny-onn distill --resume --out x`"
    assert end == "tiny-onn: interrupted"


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_is_interrupted_without_saving_says_how_to_go_on(stand_in, capsys, saved):
    stand_in("distill.loop", "run_distill", KeyboardInterrupt())
    create_run_folder(Path("x"), RunConfig(), argv=[])
    stand_in("runs.checkpoint", "valid_checkpoints", [Path("x/checkpoints/step-0000001")] * saved)
    what = "goes on from the last checkpoint" if saved else "starts the run again"
    assert status_of(["distill", "--preset", "demo", "--out", "x"]) == 130
    told = f"tiny-onn: `tiny-onn distill --resume --out x` {what}\ntiny-onn: interrupted\n"
    assert capsys.readouterr().err == told


def test_mistake_found_while_running_is_put_in_one_line(stand_in, capsys):
    stand_in("studies.demo", "run_demo", UserError("a\nb"))
    assert status_of(["demo", "--out", "x"]) == 2
    assert capsys.readouterr().err == "tiny-onn: error: a b\n"


def test_what_the_file_system_refuses_is_no_defect(stand_in, capsys):
    stand_in("studies.demo", "run_demo", PermissionError(13, "Permission denied", "runs/x"))
    assert status_of(["demo", "--out", "x"]) == 2
    told = "tiny-onn: error: runs/x: got 'Permission denied', expected free disk and permission"
    assert capsys.readouterr().err.startswith(told)


def test_a_default_folder_that_cannot_be_written_to_is_refused_first(stand_in, capsys):
    calls = stand_in("studies.demo", "run_demo", {})
    Path("runs/x").rmdir()
    Path("runs").rmdir()
    Path("runs").touch()
    assert status_of(["demo"]) == 2
    told = capsys.readouterr().err
    assert "--out: got runs, expected a folder to write to, and runs is no folder" in told
    assert calls == []


def test_defect_is_not_dressed_up_as_a_mistake(stand_in):
    stand_in("studies.demo", "run_demo", ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["demo", "--out", "x"])
