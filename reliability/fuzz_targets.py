"""What `fuzz_inputs.py` tries: per kind of input, how cases are made and how the code reads one.

A case is plain data, so that it can be printed; `Target.prepare` writes it into a folder and
returns what reads it as a user's command would. That must end in success or in a `UserError`.
"""

import gzip
import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tiny import CONFIG, make_dense, make_student, make_tokenizer, save_teacher
from tiny_onn.config.read import config_from_json, load_config, resolved_json
from tiny_onn.config.schema import RunConfig, TeacherConfig
from tiny_onn.config.template import config_template
from tiny_onn.data.sources import read_documents
from tiny_onn.data.stream import check_vocabulary
from tiny_onn.planning.plan import DOCUMENT_TOKENS, EFFICIENCY, plan
from tiny_onn.runs.students import is_student, load_student
from tiny_onn.teacher.load import load_dense

Reading = Callable[[], object]
CPU = torch.device("cpu")
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One kind of input."""

    cases: st.SearchStrategy[Any]
    prepare: Callable[[Any, Path], Callable[[], object]]
    seeds: tuple[Any, ...] = ()
    """Cases that are always tried, before the generated ones."""
    large: tuple[Any, ...] = ()
    """More such cases, of 100 MB and the like: the long form only."""


def content_of(content: bytes | tuple[bytes, bytes, int, bytes]) -> bytes:
    """A case's bytes; large ones are written as head, repeated unit, times, tail."""
    if isinstance(content, bytes):
        return content
    head, unit, times, tail = content
    return head + unit * times + tail


# Edits of bytes: what, where (a share of the length), with what.
EDITS = st.one_of(
    st.just([]),
    st.lists(
        st.tuples(
            st.sampled_from(("flip", "insert", "delete", "cut", "repeat")),
            st.floats(0, 1),
            st.binary(min_size=1, max_size=8),
        ),
        max_size=4,
    ),
)


def edited(content: bytes, edits: Sequence[tuple[str, float, bytes]]) -> bytes:
    """The bytes after all edits."""
    for kind, share, data in edits:
        at = int(share * len(content))
        if kind == "flip":
            mixed = bytes(a ^ b for a, b in zip(content[at : at + len(data)], data, strict=False))
            content = content[:at] + mixed + content[at + len(mixed) :]
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(data) :]
        elif kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + content[at // 2 : at] + content[at:]
    return content


TEXT = st.text(st.characters(), max_size=20)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from((0, -1, 1, 2, 2**31, 2**63 - 1, 2**64, 10**400, 1e308)),
    st.floats(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)

# --- settings ---

NAMES = [
    f"{section}.{key}"
    for section, keys in json.loads(resolved_json(RunConfig())).items()
    for key in keys
]
TOML_VALUES = st.one_of(
    VALUES.map(lambda value: json.dumps(value)[:500]),
    st.sampled_from(
        (
            "nan",
            "-inf",
            "0x" + "f" * 5000,
            "9" * 5000,
            "1979-05-27T07:32:00Z",
            "'''a\n'''",
            "{}",
            "[[]]",
        )
    ),
    st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 1500).map(lambda depth: "{a=" * depth + "1" + "}" * depth),
    TEXT,
)
LINES = st.one_of(
    st.tuples(st.sampled_from(NAMES), TOML_VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.sampled_from(NAMES).map(lambda name: f"[{name.partition('.')[0]}]"),
    st.tuples(TEXT, TOML_VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.integers(1, 20_000).map(lambda depth: "a." * depth + "a = 1"),
)
TOML_FILES = st.one_of(
    st.binary(max_size=200),
    st.lists(LINES, max_size=5).map(lambda lines: "\n".join(lines).encode("utf-8", "replace")),
    EDITS.map(lambda edits: edited(config_template().encode(), edits)),
)


def toml_file(case: bytes | tuple[Any, ...], folder: Path) -> Reading:
    (folder / "run.toml").write_bytes(content_of(case))
    return lambda: load_config(folder / "run.toml", None, ())


def overrides(case: list[str], _: Path) -> Reading:
    return lambda: load_config(None, "demo", case)


def settings_json(case: bytes, _: Path) -> Reading:
    return lambda: config_from_json(case.decode("utf-8", "replace"))


# --- text ---


def packed(content: bytes, packing: str) -> bytes:
    """The content as a .gz or .zst file holds it."""
    if packing == ".gz":
        return gzip.compress(content, 1, mtime=0)
    if packing == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def read_all(path: Path) -> None:
    # Nothing is kept: what reading itself holds is measured.
    for _ in read_documents(str(path), "text"):
        pass


def text(case: tuple[Any, str, str, list[Any]], folder: Path) -> Reading:
    content, ending, packing, edits = case
    path = folder / f"a{ending}{packing}"
    path.write_bytes(edited(packed(content_of(content), packing), edits))
    return lambda: read_all(path)


def text_cases(ending: str, contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Any]:
    packings = st.sampled_from(("", "", ".gz", ".zst"))
    return st.tuples(contents, st.just(ending), packings, EDITS)


TXT = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(st.text(min_size=1, max_size=8), st.integers(0, 40_000)).map(
        lambda pair: (pair[0] * pair[1]).encode("utf-8", "surrogatepass")[: 2**18]
    ),
    st.text(max_size=50).map(lambda text: text.encode("utf-16", "surrogatepass")),
)
JSON_LINES = st.lists(
    st.one_of(
        VALUES.map(lambda value: json.dumps({"text": value})),
        TEXT.map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
        VALUES.map(json.dumps),
        st.integers(1, 100_000).map(lambda depth: '{"text":' * depth),
        st.integers(1, 5000).map(lambda digits: '{"text": "a", "n": ' + "9" * digits + "}"),
        TEXT,
    ).map(lambda line: line.encode("utf-8", "surrogatepass")),
    max_size=5,
).map(b"\n".join)

COLUMNS: tuple[Callable[[list[str | None]], pa.Array], ...] = (
    lambda texts: pa.array(texts, pa.string()),
    lambda texts: pa.array(texts, pa.large_string()),
    lambda texts: pa.array(texts, pa.string()).dictionary_encode(),
    lambda texts: pa.array([None if t is None else t.encode() for t in texts], pa.binary()),
    lambda texts: pa.array(
        [None if t is None else t.encode() + b"\xff" for t in texts], pa.binary()
    ).cast(pa.string(), safe=False),
    lambda texts: pa.array([None if t is None else [t] for t in texts], pa.list_(pa.string())),
    lambda texts: pa.array([{"text": t} for t in texts], pa.struct([("text", pa.string())])),
    lambda texts: pa.array([None for _ in texts], pa.null()),
    lambda texts: pa.array([None if t is None else len(t) for t in texts], pa.int64()),
    lambda texts: pa.array(
        [None if t is None else t.encode()[:4].ljust(4) for t in texts], pa.binary(4)
    ),
    lambda texts: pa.array([None if t is None else 1.5 for t in texts], pa.float64()),
    lambda texts: pa.array([None if t is None else bool(t) for t in texts], pa.bool_()),
)
PARQUET = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from(("text", "text", "text.a", "other", "", "a\nb")),
            st.one_of(st.just(0), st.integers(0, len(COLUMNS) - 1)),
        ),
        max_size=3,
    ),
    st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    st.sampled_from(("none", "snappy", "gzip", "zstd")),
    EDITS,
)


def parquet(case: tuple[Any, ...], folder: Path) -> Reading:
    columns, texts, compression, edits = case
    texts = [t if t is None or isinstance(t, str) else t[0] * t[1] for t in texts]
    arrays = [COLUMNS[kind](texts) for _, kind in columns]
    table = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
    path = folder / "a.parquet"
    pq.write_table(table, path, compression=compression)
    if edits:
        path.write_bytes(edited(path.read_bytes(), edits))
    return lambda: read_all(path)


ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(("file", "folder", "link", "pipe", "socket", "device", "locked")),
        st.lists(
            st.sampled_from(
                ("a", "b.txt", "c.jsonl", "d.parquet", ".h.txt", "e\n\x1b[31m.txt", "f.TXT.GZ")
            ),
            min_size=1,
            max_size=3,
        ),
        st.sampled_from(("", "a", "b.txt", "..", ".", "/dev/zero", "/dev/tty", "/nowhere", "loop")),
    ),
    max_size=6,
)


def tree(case: list[tuple[str, list[str], str]], folder: Path) -> Reading:
    root = folder / "tree"
    root.mkdir()
    for kind, parts, content in case:
        path = root.joinpath(*parts)
        # Entries that collide with earlier ones are left out.
        if any(parent.is_file() or parent.is_symlink() for parent in path.parents):
            continue
        if os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(content or path.name)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.write_text(content)
            path.chmod(0o000 if kind == "locked" else 0o644)
    return lambda: read_all(root)


def deep(case: int, folder: Path) -> Reading:
    here = Path.cwd()
    os.chdir(folder)
    for _ in range(case):
        Path("d").mkdir()
        os.chdir("d")
    Path("a.txt").write_text("deep")
    os.chdir(here)
    return lambda: read_all(folder)


def tree_or_deep(case: Any, folder: Path) -> Reading:
    return deep(case, folder) if isinstance(case, int) else tree(case, folder)


# --- model folders ---

# Python that leaves a file behind when it runs.
CANARY = "import pathlib; pathlib.Path(%r).touch()\nclass Evil: pass\n"
CONFIG_KEYS = [
    "routing",
    "model_type",
    "architectures",
    "auto_map",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "layer_types",
    "torch_dtype",
    "dtype",
    "tie_word_embeddings",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    "transformers_weights",
    "_name_or_path",
    "_attn_implementation",
    "initializer_range",
    "pretraining_tp",
    "use_cache",
    "num_labels",
    "id2label",
    "backbone",
    "num_experts",
    "expert_dim",
    "selection",
    "weighting",
    "target_k",
    "budget_form",
    "teacher",
    "teacher_revision",
    "transformers_version",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "problem_type",
]
EVIL = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
EVIL_TOKENIZER = {"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]}
ODD_NUMBERS = st.sampled_from((0, -1, 1, 3, 7, 1000, 2**20, 2**31 - 1, 10**18))
ODD_NAMES = st.sampled_from(
    ("gelu", "qwen3", "gpt2", "llama", "tiny_onn", "../../etc/passwd", "meta")
)
ODD_TABLES = st.sampled_from(
    (
        EVIL,
        EVIL_TOKENIZER,
        {"": "modeling_evil.Evil"},
        {"rope_type": "yarn", "factor": 0},
        {"rope_type": "linear", "factor": "x"},
        [None],
    )
)
CONFIG_VALUES = st.one_of(VALUES, ODD_NUMBERS, ODD_NAMES, ODD_TABLES)
TENSOR_CHANGES = st.sampled_from(
    (
        "nan",
        "inf",
        "missing",
        "shape",
        "transposed",
        "extra",
        "integer",
        "byte",
        "half",
        "empty",
        "huge",
    )
)
OUTSIDE = "../../base/teacher/model.safetensors"
SHARDS = st.sampled_from(
    (
        "model-1.safetensors",
        OUTSIDE,
        "/etc/passwd",
        "..",
        "",
        3,
        None,
        "a/b.safetensors",
        "model.bin",
        "x\0.safetensors",
        "~/x.safetensors",
        "\x1b[2J.safetensors",
    )
)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHANGES = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(CONFIG_KEYS), CONFIG_VALUES),
    st.tuples(st.just("drop"), st.sampled_from(CONFIG_KEYS), st.none()),
    st.tuples(st.just("tensor"), st.integers(0, 40), TENSOR_CHANGES),
    st.tuples(st.just("edit"), st.sampled_from(MODEL_FILES), EDITS),
    st.tuples(st.just("replace"), st.sampled_from(MODEL_FILES), VALUES.map(json.dumps)),
    st.tuples(
        st.just("tokenizer"),
        st.sampled_from(
            ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens", "version")
        ),
        VALUES,
    ),
    st.tuples(
        st.just("tokenizer_config"),
        st.sampled_from(
            ("tokenizer_class", "auto_map", "eos_token", "model_max_length", "pad_token")
        ),
        CONFIG_VALUES,
    ),
    st.tuples(st.just("header"), st.integers(0, 2**64 - 1), st.binary(max_size=50)),
    st.tuples(st.just("index"), SHARDS, st.booleans()),
    st.tuples(
        st.just("pickle"), st.sampled_from(("model.safetensors", "pytorch_model.bin")), st.none()
    ),
    st.tuples(st.just("pipe"), st.sampled_from(MODEL_FILES), st.none()),
    st.tuples(st.just("gone"), st.sampled_from(MODEL_FILES), st.none()),
    st.tuples(st.just("folder"), st.sampled_from(MODEL_FILES), st.none()),
)


class Bomb:
    """What an attacker pickles: code that runs when it is read."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(self.canary).touch, ()


def change_model(folder: Path, change: tuple[str, Any, Any], canary: Path) -> None:
    """Apply one change of `CHANGES` to a model's folder, if it applies after the earlier ones."""
    kind, name, value = change
    file = folder / str(name)
    tables = {"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"}
    if any((folder / name).is_fifo() for name in MODEL_FILES):
        # A pipe ends the changes: reading it here would block.
        return
    try:
        if kind in ("set", "drop", *tables):
            change_table(folder / tables.get(kind, "config.json"), name, value, kind)
        elif kind == "tensor":
            change_tensor(folder / "model.safetensors", name, value)
        elif kind == "edit":
            file.write_bytes(edited(file.read_bytes(), value))
        elif kind == "replace":
            file.write_text(value)
        elif kind == "header":
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", name) + value)
        elif kind == "index":
            weights = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            names = dict.fromkeys(weights, "model-1.safetensors")
            names[next(iter(names))] = name
            table = {"weight_map": names if value else list(names)} | (
                {"metadata": {}} if value else {}
            )
            (folder / "model.safetensors.index.json").write_text(json.dumps(table))
        elif kind == "pickle":
            (folder / "model.safetensors").unlink()
            file.write_bytes(pickle.dumps(Bomb(str(canary))))
        else:
            file.unlink()
            if kind == "pipe":
                os.mkfifo(file)
            elif kind == "folder":
                file.mkdir()
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ):
        # The earlier changes left nothing to change.
        return


def change_table(file: Path, name: str, value: object, kind: str) -> None:
    table = json.loads(file.read_text())
    if kind == "drop":
        table.pop(name, None)
    else:
        table[name] = value
    file.write_text(json.dumps(table))


def change_tensor(file: Path, number: int, kind: str) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[number % len(tensors)]
    tensor = tensors[name]
    if kind in ("nan", "inf"):
        tensor.view(-1)[-1] = float(kind)
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors[f"{name}.more"] = tensor.clone()
    else:
        changes: dict[str, torch.Tensor] = {
            "shape": tensor[:-1],
            "transposed": tensor.t() if tensor.ndim == 2 else tensor[None],
            "integer": tensor.long(),
            "byte": tensor.to(torch.int8),
            "half": tensor.half(),
            "empty": tensor[:0],
            "huge": tensor.double() * 1e60,
        }
        tensors[name] = changes[kind].contiguous().clone()
    save_file(tensors, file, metadata={"format": "pt"})


def changed_model(case: list[tuple[str, Any, Any]], folder: Path, base: str) -> Path:
    model, canary = folder / "model", folder / "RAN"
    shutil.copytree(folder.parent / "base" / base, model)
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(CANARY % str(canary))
    for change in case:
        change_model(model, change, canary)
    return model


def watched(read: Callable[[str], object], model: Path) -> Reading:
    """The reading, and a check that nothing which came with the model ran."""

    def run() -> None:
        try:
            read(str(model))
        finally:
            assert not (model.parent / "RAN").exists(), "code that came with a model ran"

    return run


def teacher(case: list[tuple[str, Any, Any]], folder: Path) -> Reading:
    def read(model: str) -> None:
        dense, tokenizer = load_dense(TeacherConfig(path=model, dtype="float32"), CPU)
        check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
        make_student(dense)

    return watched(read, changed_model(case, folder, "teacher"))


def student(case: list[tuple[str, Any, Any]], folder: Path) -> Reading:
    def read(model: str) -> None:
        is_student(model)
        load_student(model, CPU)

    return watched(read, changed_model(case, folder, "student"))


def planned(case: list[tuple[str, Any, Any]], folder: Path) -> Reading:
    def read(model: str) -> None:
        options = {"efficiency": EFFICIENCY, "document_tokens": DOCUMENT_TOKENS}
        plan(CONFIG, model, "RTX 3060", **options)

    return watched(read, changed_model(case, folder, "teacher"))


def make_bases(folder: Path) -> None:
    """The whole model folders that cases start from."""
    save_teacher(folder / "teacher")
    make_student(make_dense(vocab_size=320)).save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")


HUNDRED = 100 * MIB
LARGE_LINES = (
    (b'{"text": "', b"x", HUNDRED, b'"}'),
    (b"", b"\n", HUNDRED, b""),
    # What takes most memory when parsed, just short enough to be parsed.
    (b'{"text": "a", "b": [', b"{},", 8 * MIB // 3 - 20, b"{}]}"),
    (b'{"text": "a", "b": [', b"[],", 8 * MIB // 3 - 20, b"[]]}"),
    (b'{"text": "', b"\\u0100", MIB, b'"}'),
)
LARGE_TEXTS = (
    (b"", b"x", HUNDRED, b""),
    (b"", b"\n", HUNDRED, b""),
    (b"", "\U0001f600".encode(), HUNDRED // 4, b""),
)
PACKINGS = ("", ".gz", ".zst")
NAMED_VALUES = st.tuples(st.sampled_from(NAMES), TOML_VALUES).map("=".join)
TARGETS = {
    "TOML file": Target(
        cases=TOML_FILES, prepare=toml_file, large=((b"", b"a = 1\n", HUNDRED // 6, b""),)
    ),
    "--set": Target(
        cases=st.lists(st.one_of(NAMED_VALUES, TEXT, TOML_VALUES), max_size=3), prepare=overrides
    ),
    "config.json of a run": Target(
        cases=st.one_of(
            EDITS.map(lambda edits: edited(resolved_json(RunConfig()).encode(), edits)),
            VALUES.map(lambda value: json.dumps(value).encode()),
            st.integers(1, 100_000).map(lambda depth: b'{"train":' * depth),
        ),
        prepare=settings_json,
    ),
    "txt": Target(
        cases=text_cases(".txt", TXT),
        prepare=text,
        seeds=((b"", ".txt", "", []), (b"\xef\xbb\xbf", ".txt", ".gz", [])),
        large=tuple((c, ".txt", packing, []) for c in LARGE_TEXTS for packing in PACKINGS),
    ),
    "jsonl": Target(
        cases=text_cases(".jsonl", JSON_LINES),
        prepare=text,
        seeds=((b'{"text": "a"}\n{"text"', ".jsonl", "", []),),
        large=tuple((c, ".jsonl", packing, []) for c in LARGE_LINES for packing in PACKINGS),
    ),
    "parquet": Target(
        cases=PARQUET,
        prepare=parquet,
        seeds=tuple(
            ([("text", kind)], texts, "none", [])
            for kind in range(len(COLUMNS))
            for texts in (["a", None], [])
        ),
        large=(
            ([("text", 0)], [("x", 60 * MIB)], "none", []),
            ([("text", 0)], [("x", HUNDRED)], "zstd", []),
            ([("text", 2)], [("x", 10 * MIB)] * 10, "zstd", []),
        ),
    ),
    "folder of text": Target(
        cases=st.one_of(ENTRIES, ENTRIES, ENTRIES, st.integers(1, 30)),
        prepare=tree_or_deep,
        seeds=(1500,),
    ),
    "teacher's folder": Target(
        cases=st.lists(CHANGES, max_size=3),
        prepare=teacher,
        seeds=(
            [],
            [("set", "auto_map", EVIL), ("set", "model_type", "evil")],
            [("header", 2**63, b"")],
            [("header", 10**8, b"{" * 50)],
            [("set", "num_hidden_layers", 10**9)],
            [("index", OUTSIDE, True)],
            [("pickle", "model.safetensors", None)],
            [("pickle", "pytorch_model.bin", None)],
        ),
    ),
    "student's folder": Target(
        cases=st.lists(CHANGES, max_size=3),
        prepare=student,
        seeds=([], [("pickle", "pytorch_model.bin", None)], [("tensor", 3, "nan")]),
    ),
    "plan of a folder": Target(cases=st.lists(CHANGES, max_size=3), prepare=planned, seeds=([],)),
}
