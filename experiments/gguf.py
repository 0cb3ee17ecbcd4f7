"""What does a student lose in llama.cpp, and how fast is it there beside its dense teacher?

    pip install llama-cpp-python && python -m experiments.gguf RUN [--text FILE] [--tokens 2048]

RUN is a run's folder or a student's. The student is exported twice, with its threshold and with a
fixed number of experts, and its teacher as the dense GGUF of its own architecture. All read the
same rows of text, one after another from the first token: perplexity, KL to the student, and
agreement with it on the likeliest token. Speeds are tokens per second of reading the text and of
writing, medians of `--repeats` turns in which all files take part. Ends in one JSON line.
"""

import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import environment, report
from experiments.options import parser, results_folder
from tiny_onn.data.rows import held_out_rows, text_rows
from tiny_onn.deploy.export import run_export
from tiny_onn.deploy.exporting import MEASURED_TOKENS
from tiny_onn.deploy.gguf_files import FORMATS, decoder_tensors, write_gguf
from tiny_onn.deploy.to_gguf import fixed_rule
from tiny_onn.errors import UserError
from tiny_onn.model.router import temporary_rules
from tiny_onn.runs.students import LoadedStudent, load_student, load_teacher_of
from tiny_onn.teacher.load import quiet_transformers

WINDOW = 512
"""Number of tokens that a model reads at once, with nothing before them."""
WRITTEN = 32
# A model: logits (T, V) of the tokens that follow each of T token ids.
Predict = Callable[[list[int]], Tensor]


def windows(loaded: LoadedStudent, text: Path | None, tokens: int) -> list[list[int]]:
    """The text as token ids, in pieces of `WINDOW`."""
    data = loaded.config.data
    rows = (
        held_out_rows(data, loaded.tokenizer, data.row_tokens, tokens)
        if text is None
        else text_rows(text, loaded.tokenizer, data, tokens)
    )
    ids = torch.cat([row.input_ids[0] for row in rows])[:tokens].tolist()
    pieces = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [piece for piece in pieces if len(piece) > 1]


def write_teacher(folder: Path, loaded: LoadedStudent) -> None:
    """The student's teacher as the GGUF files of its own architecture."""
    dense = load_teacher_of(loaded, torch.device("cpu"))
    config = dense.config
    arch = {
        "llama": gguf.MODEL_ARCH.LLAMA,
        "mistral": gguf.MODEL_ARCH.LLAMA,
        "qwen2": gguf.MODEL_ARCH.QWEN2,
        "qwen3": gguf.MODEL_ARCH.QWEN3,
    }[config.model_type]
    state = dict(dense.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if arch == gguf.MODEL_ARCH.LLAMA:
        # llama.cpp's Llama rotates neighbouring pairs, transformers' the two halves of a head.
        for name, tensor in state.items():
            for kind, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
            ):
                if f"{kind}.weight" in name:
                    halves = tensor.unflatten(0, (heads, 2, -1))
                    state[name] = halves.transpose(1, 2).reshape(tensor.shape)
    tensors = decoder_tensors(arch, config, state)
    folder.mkdir()
    for form in FORMATS:
        path, name = folder / f"model-{form}.gguf", gguf.MODEL_ARCH_NAMES[arch]
        write_gguf(path, name, config, loaded.tokenizer, tensors, fields={}, form=form)


def scores(logits: Tensor, student: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sums over predictions: loss, KL from the student's, agreement with it."""
    ours, theirs = student.log_softmax(-1), logits.float().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return float(F.nll_loss(theirs, labels, reduction="sum")), float(kl), float(agree)


def measure(pieces: list[list[int]], student: Predict, predict: Predict) -> dict[str, float]:
    """Quality of one way to predict, over all pieces."""
    sums, count = np.zeros(3), 0
    for ids in pieces:
        labels = torch.tensor(ids[1:])
        sums += scores(predict(ids)[:-1], student(ids)[:-1], labels)
        count += len(labels)
    loss, kl, agreement = sums / count
    return {"perplexity": math.exp(loss), "kl": kl, "agreement": agreement}


class Runner:
    """The GGUF files, run by llama.cpp in turns.

    Args:
        files: the files by name.
        threads: number of threads of llama.cpp.
    """

    def __init__(self, files: dict[str, Path], threads: int) -> None:
        try:
            llama_cpp: Any = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise SystemExit("this study needs llama.cpp: pip install llama-cpp-python") from error
        self.files, self.threads, self.library = files, threads, llama_cpp
        self.speeds = {name: ([], []) for name in files}

    def turn(self, name: str, use: Callable[[Predict], None]) -> None:
        """Load a file, let `use` read pieces with it, and write some tokens."""
        model: Any = self.library.Llama(
            str(self.files[name]),
            n_ctx=WINDOW + WRITTEN,
            n_batch=WINDOW,
            logits_all=True,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            verbose=False,
        )
        read, write = self.speeds[name]

        def predict(ids: list[int]) -> Tensor:
            model.reset()
            start = time.perf_counter()
            model.eval(ids)
            read.append(len(ids) / (time.perf_counter() - start))
            return torch.tensor(np.array(model.scores[: len(ids)]))

        use(predict)
        start = time.perf_counter()
        for _ in range(WRITTEN):
            model.eval([model.sample(temp=0.0)])
        write.append(WRITTEN / (time.perf_counter() - start))
        model.close()

    def medians(self, name: str) -> dict[str, float]:
        """Median speeds of a file."""
        kinds = zip(("read", "write"), self.speeds[name], strict=True)
        return {f"{kind} tokens/s": statistics.median(values) for kind, values in kinds}


def export(arguments, loaded: LoadedStudent, folder: Path) -> dict[str, Path]:
    """Write all files, and return them by name."""
    for name, fixed in (("threshold", False), ("fixed k", True)):
        out = folder / name
        run_export(arguments.student, to="gguf", out=out, fixed_k=fixed, text=arguments.fit)
    write_teacher(folder / "dense teacher", loaded)
    names = ("threshold", "fixed k", "dense teacher")
    return {
        f"{name}, {form}": folder / name / f"model-{form}.gguf"
        for name in names
        for form in FORMATS
    }


def study(arguments, loaded: LoadedStudent, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Measure the student and all files; returns a row for each."""
    network, pieces = loaded.student, windows(loaded, arguments.text, arguments.tokens)
    # The files round the experts too, so that what is left is the export's own.
    network.round_experts()
    network.float()
    network.set_attn_implementation("sdpa")

    @torch.no_grad()
    def ours(ids: list[int]) -> Tensor:
        return network(torch.tensor([ids])).logits[0]

    kept = {tuple(ids): ours(ids) for ids in pieces}

    def student(ids: list[int]) -> Tensor:
        return kept[tuple(ids)]

    rows: dict[str, dict[str, Any]] = {"student": measure(pieces, student, student)}
    routers = [bank.router for bank in network.banks()]
    with temporary_rules(routers, [fixed_rule(router.rule) for router in routers]):
        rows["student at fixed k"] = measure(pieces, student, ours)
    runner = Runner(files, arguments.threads)
    for turn in range(arguments.repeats):
        for name, path in files.items():

            def use(predict: Predict, name: str = name, first: bool = turn == 0) -> None:
                if first:
                    rows[name] = measure(pieces, student, predict)
                else:
                    predict(pieces[0])

            runner.turn(name, use)
            rows[name] |= {"bytes": path.stat().st_size, **runner.medians(name)}
    return rows


def main() -> None:
    """Export, measure, print."""
    options = parser(__doc__)
    options.add_argument("student", help="a run's folder, or a student's")
    options.add_argument("--text", type=Path, help="a file or folder of text; default: held-out")
    options.add_argument(
        "--fit", type=Path, help="text to fit to; default: the run's training text"
    )
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    quiet_transformers()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            loaded = load_student(arguments.student, torch.device("cpu"))
            files = export(arguments, loaded, Path(temporary))
            rows = study(arguments, loaded, files)
        except UserError as error:
            raise SystemExit(str(error)) from error
    ratios: dict[str, float | None] = {
        f"{name} / dense teacher, {form}, {kind}": rows[f"{name}, {form}"][f"{kind} tokens/s"]
        / rows[f"dense teacher, {form}"][f"{kind} tokens/s"]
        for name in ("threshold", "fixed k")
        for form in FORMATS
        for kind in ("read", "write")
    }
    report(
        "gguf",
        [{"model": name, **row} for name, row in rows.items()],
        ratios,
        results_folder(arguments),
        settings={
            "tokens": arguments.tokens,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "fitted_tokens": MEASURED_TOKENS,
            "llama_cpp_python": version("llama-cpp-python"),
        },
        environment=environment(arguments.device),
    )


if __name__ == "__main__":
    main()
