"""A student's README in the hub's format, and the upload of its folder to a stand-in of the hub."""

import base64
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from export_cases import run_without_package
from serving import serving
from tiny import change, save_teacher, write_run
from tiny_onn.cli.export import TARGETS
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.deploy.export import run_export
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.runs.model_card import licence_of, write_export_card, write_model_card

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, with a teacher whose README states a licence."""
    folder = tmp_path_factory.mktemp("card")
    config = write_run(folder, train={"tokens": 256, "eval_every_tokens": 0})
    (Path(config.teacher.path) / "README.md").write_text("---\nlicense: mit\n---\n\n# A teacher\n")
    result = run_distill(config, out=folder / "run")
    return config, folder / "run", result


def metadata(folder):
    """What the hub reads of a folder's README."""
    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


def test_a_student_s_card_holds_what_its_run_measured(run):
    config, folder, result = run
    card = ModelCard.load(folder / "student" / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert card.data.eval_results is not None
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-generation"
    (kl,) = [r for r in card.data.eval_results if r.metric_type == "kl"]
    assert kl.metric_value == round(result.after.forward_kl, 4)
    after = result.after
    assert f"| student | {after.forward_kl:.4f} | {after.top1_agreement:.1%} |" in card.text
    assert f"{result.tokens:,} tokens in" in card.text
    assert f"seed {config.train.seed}." in card.text
    environment = json.loads((folder / "environment.json").read_text())
    assert f"tiny-onn {environment['tiny_onn']}" in card.text
    # The folders of the machine that trained it are nobody's business.
    assert str(folder.parent) not in card.text


@pytest.mark.parametrize("learn", [False, True])
def test_a_card_says_what_was_trained(run, tmp_path, learn):
    config, folder, _ = run
    changes: dict[str, Any] = {"optim": {"norm_lr": 2e-3}, "loss": {"label_coef": 0.2}}
    changed = change(config, **changes) if learn else config
    write_model_card(tmp_path, changed, folder, step=None)
    text = (tmp_path / "README.md").read_text()
    assert ("gains of norms were trained" in text) == learn
    assert ("attention and norms are its own" in text) != learn
    assert ("0.002 (norms)" in text) == learn
    assert ("cross-entropy to the text in the loss: 0.2" in text) == learn


def test_the_numbers_are_those_of_the_step(run, tmp_path):
    config, folder, _ = run
    write_model_card(tmp_path, config, folder, step=1)
    text = (tmp_path / "README.md").read_text()
    assert "No numbers of this student are recorded" in text
    assert metadata(tmp_path)["license"] == "mit"


def test_an_export_says_what_it_loses_and_keeps_the_numbers(run, tmp_path):
    _, folder, result = run
    table_row = f"| student | {result.after.forward_kl:.4f} |"
    for source, out in ((folder, tmp_path / "of_run"), (folder / "student", tmp_path / "alone")):
        lost = run_export(str(source), to="transformers", out=out)
        text = (out / "README.md").read_text()
        assert lost in text
        assert table_row in text
        assert text.count("\n---\n") == 1
        assert metadata(out)["license"] == "mit"
        assert metadata(out)["tags"][-1] == "transformers"
        assert "model-index" not in metadata(out), "the results are the student's"


def example_of(folder):
    """The language and the lines of the only block of code in a folder's README."""
    (block,) = re.findall(r"```(\w+)\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return block


def test_the_example_of_a_student_s_card_runs(run):
    student = run[1] / "student"
    language, lines = example_of(student)
    names: dict[str, Any] = {}
    exec(lines.replace("FOLDER", str(student)), names)
    assert language == "python"
    assert names["student"](**names["tokenizer"]("A list is", return_tensors="pt")).logits.ndim == 3


@pytest.mark.parametrize("to", TARGETS)
def test_the_example_of_an_export_s_card_runs_in_its_folder(run, tmp_path, to):
    out = tmp_path / "out"
    run_export(str(run[1]), to=to, out=out)
    language, lines = example_of(out)
    if language == "python":
        written = run_without_package(lines, cache=tmp_path / "cache", folder=out)
        assert written.startswith("A list is")
    elif to == "vllm":
        # vLLM asks for its own torch; `python -m experiments.vllm` runs it.
        assert shlex.split(lines)[:3] == ["vllm", "serve", "."]
        assert "AutoModelForCausalLM" in json.loads((out / "config.json").read_text())["auto_map"]
    else:
        program, *options = shlex.split(lines)
        model = out / options[options.index("-m") + 1]
        assert gguf.GGUFReader(model).fields["general.architecture"].contents() == "glm4moe"
        if shutil.which(program):
            done = subprocess.run([program, *options], cwd=out, capture_output=True, check=True)
            assert b"A list is" in done.stdout


def test_the_example_of_an_older_card_is_left_out_of_an_export(run, tmp_path):
    student = shutil.copytree(run[1] / "student", tmp_path / "student")
    card = student / "README.md"
    card.write_text(card.read_text().replace("  # https://github.com/", "  # pip install "))
    run_export(str(student), to="dense", out=tmp_path / "out")
    assert "from tiny_onn" not in example_of(tmp_path / "out")[1]


def test_an_export_of_a_student_without_a_card_has_a_short_one(run, tmp_path):
    _, folder, _ = run
    student = tmp_path / "student"
    student.mkdir()
    for file in (folder / "student").iterdir():
        if file.name != "README.md":
            (student / file.name).write_bytes(file.read_bytes())
    lost = run_export(str(student), to="dense", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert lost in text
    assert "| student |" not in text


def test_a_licence_is_the_one_that_the_teacher_states(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    assert licence_of(TeacherConfig(path=str(teacher))) is None
    (teacher / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert licence_of(TeacherConfig(path=str(teacher))) == "gemma"
    assert licence_of(TeacherConfig(path="embedded")) == "apache-2.0"
    for absent in ("nobody/nothing", str(tmp_path / "gone"), "gone/for/long"):
        assert licence_of(TeacherConfig(path=absent)) is None


def test_a_card_that_its_owner_changed_is_kept_whole(run, tmp_path):
    _, folder, _ = run
    readme = tmp_path / "README.md"
    readme.write_text((folder / "student" / "README.md").read_text() + "\nMine\n\n---\n\nToo\n")
    write_export_card(tmp_path, readme, to="gguf", example="", lost="something", budget=12.0)
    text = readme.read_text()
    assert "wrote this folder at a mean of 12 experts per token: something." in text
    assert "| student |" in text
    assert text.endswith("Mine\n\n---\n\nToo\n")


@contextmanager
def hub(received):
    """The address of a stand-in of the hub that takes commits of one repository."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            address = f"http://{self.headers['Host']}/owner/student"
            if "/preupload/" in self.path:
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": path, **modes} for path in files]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        received[value["path"]] = base64.b64decode(value["content"])
                answer = {
                    "commitUrl": f"{address}/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            else:
                answer = {"url": address, "name": "owner/student", "id": "owner/student"}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            """Keep the test's output clean."""

    with serving(Hub) as address:
        yield address


PUSH = """
import sys
from huggingface_hub import HfApi
from tiny_onn import TinyOnnForCausalLM

if sys.argv[1] == "push_to_hub":
    TinyOnnForCausalLM.from_pretrained(sys.argv[2]).push_to_hub("owner/student", token="hf_x")
else:
    HfApi(token="hf_x").upload_folder(repo_id="owner/student", folder_path=sys.argv[2])
"""


@pytest.mark.parametrize("way", ["push_to_hub", "upload_folder"])
def test_a_student_is_uploaded_by_the_libraries_own_methods(run, tmp_path, way):
    _, folder, _ = run
    received = {}
    with hub(received) as address:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        environment |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PUSH, way, str(folder / "student")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors"):
        assert received[name] == (folder / "student" / name).read_bytes()
    if way == "upload_folder":
        assert received["README.md"] == (folder / "student" / "README.md").read_bytes()


def test_an_export_of_a_run_with_a_damaged_record_is_refused_in_one_line(run, tmp_path):
    damaged = shutil.copytree(run[1], tmp_path / "run")
    (damaged / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: cannot read it .*restore the file or rem"):
        run_export(str(damaged), to="transformers", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
