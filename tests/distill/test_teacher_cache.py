"""A teacher's hidden states, written once and read by runs in place of its forward pass."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from run_records import assert_same_run, at_step, records, send
from tiny import change, make_tokenizer, normal, save_teacher, write_corpus, write_run
from tiny_onn.config.read import config_from_json, resolved_json
from tiny_onn.config.schema import TrainConfig
from tiny_onn.data.rows import training_rows
from tiny_onn.distill import cache_writer
from tiny_onn.distill.cache_writer import write_cache
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.profile import run_profile
from tiny_onn.errors import UserError
from tiny_onn.runs.folder import read_run_config
from tiny_onn.teacher import cache_reader
from tiny_onn.teacher.cache import (
    MANIFEST,
    decoded,
    encoded,
    file_sha256,
    read_manifest,
    shard_name,
)
from tiny_onn.teacher.cache_reader import TeacherCache, check_cache
from tiny_onn.teacher.load import load_dense

pytestmark = pytest.mark.usefixtures("quiet")

ROWS, PER_SHARD = 12, 5
# Bytes of a shard of `PER_SHARD` rows in float32.
SHARD_BYTES = PER_SHARD * (64 * 32 * 4 + 32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two rows a step, on text so short that the rows wrap around to a second epoch."""
    return write_run(
        tmp_path_factory.mktemp("run"),
        num_files=6,
        train={
            "tokens": ROWS * 64,
            "rows_per_step": 2,
            "eval_every_tokens": 4 * 64,
            "save_every_tokens": 4 * 64,
        },
    )


@pytest.fixture(scope="module")
def cache(config, tmp_path_factory):
    """The whole cache in float32, which is the teacher's own number format."""
    out = tmp_path_factory.mktemp("cache") / "states"
    write_cache(config, out=out, states_format="float32", shard_bytes=SHARD_BYTES)
    return out


@pytest.fixture
def copy(cache, tmp_path):
    """A copy of the cache, which a test may damage."""
    return shutil.copytree(cache, tmp_path / "copy")


@pytest.fixture(scope="module")
def live(config, tmp_path_factory):
    """A run whose teacher computes its states at every step."""
    out = tmp_path_factory.mktemp("live") / "run"
    run_distill(config, out=out)
    return out


def reading(config, folder, **sections):
    """The settings of a run that reads a cache."""
    return change(change(config, teacher={"cache": str(folder)}), **sections)


def files_of(folder):
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_training_from_a_cache_gives_the_bits_of_the_live_teacher(config, cache, live, tmp_path):
    run_distill(reading(config, cache), out=tmp_path / "run")
    assert_same_run(tmp_path / "run", live)


def test_a_cache_of_shuffled_rows_gives_the_bits_of_the_live_teacher(config, tmp_path):
    config = change(config, data={"shuffle_tokens": 5 * 64})
    cache = tmp_path / "cache"
    write_cache(config, out=cache, states_format="float32", shard_bytes=SHARD_BYTES)
    run_distill(config, out=tmp_path / "live")
    run_distill(reading(config, cache), out=tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "live")


def test_a_bfloat16_cache_gives_the_bits_of_a_bfloat16_teacher(config, tmp_path):
    config = change(config, teacher={"dtype": "bfloat16"}, train={"tokens": 4 * 64})
    run_distill(config, out=tmp_path / "live")
    write_cache(config, out=tmp_path / "cache")
    run_distill(reading(config, tmp_path / "cache"), out=tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "live")


@pytest.mark.parametrize(("states_format", "gap"), [("bfloat16", 1e-3), ("int8", 2e-2)])
def test_a_smaller_format_teaches_almost_the_same(config, live, tmp_path, states_format, gap):
    write_cache(config, out=tmp_path / "cache", states_format=states_format)
    run_distill(reading(config, tmp_path / "cache"), out=tmp_path / "run")
    ours, theirs = (records(out) for out in (tmp_path / "run", live))
    assert [row["kind"] for row in ours] == [row["kind"] for row in theirs]
    # The first step has the same weights; later ones move apart.
    first, expected = ours[1]["loss"], theirs[1]["loss"]
    assert first != expected
    assert first == pytest.approx(expected, rel=gap)


def test_other_states_in_the_cache_teach_something_else(config, copy, live, tmp_path):
    path = copy / shard_name(0)
    tensors = load_file(path)
    tensors["states"] *= 0.5
    save_file(tensors, path)
    table = json.loads((copy / MANIFEST).read_text())
    table["shards"][0]["sha256"] = file_sha256(path)
    (copy / MANIFEST).write_text(json.dumps(table))
    run_distill(reading(config, copy), out=tmp_path / "run")
    ours, theirs = (records(out)[1] for out in (tmp_path / "run", live))
    assert ours["kind"] == "step"
    assert abs(ours["loss"] - theirs["loss"]) > 0.01 * theirs["loss"]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 99), st.floats(1e-6, 1e6))
def test_eight_bits_are_within_half_a_step_of_each_blocks_scale(seed, size):
    # 96 numbers are three blocks of 32, and 36 are nine of 4, the largest that divides them.
    for hidden_dim, block in ((96, 32), (36, 4), (33, 1)):
        hidden_TD = normal(7, hidden_dim, seed=seed) * size
        hidden_TD[3] = 0
        # A single large number takes the levels of its own block alone.
        hidden_TD[:, 0] *= 1000
        states_TD, scales = encoded(hidden_TD, "int8")
        assert scales is not None
        assert (states_TD.dtype, scales.shape) == (torch.int8, (7, hidden_dim // block))
        largest = hidden_TD.unflatten(1, (-1, block)).abs().amax(2) / 127
        torch.testing.assert_close(scales.float(), largest, rtol=0.01, atol=1e-30)
        error_TD = (decoded(states_TD, scales, torch.float32) - hidden_TD).abs()
        assert (error_TD <= scales.float().repeat_interleave(block, 1) * 0.5001).all()


def test_a_shard_holds_what_the_manifest_says_and_the_size_that_was_told(config, cache, capsys):
    manifest = read_manifest(cache)
    assert [shard.rows for shard in manifest.shards] == [5, 5, 2]
    assert (manifest.num_rows, manifest.row_tokens, manifest.hidden_dim) == (ROWS, 64, 32)
    assert manifest.format == "float32"
    for index, shard in enumerate(manifest.shards):
        path = cache / shard_name(index)
        assert (path.stat().st_size, file_sha256(path)) == (shard.bytes, shard.sha256)
        # The rest is the header of the file.
        assert 0 < shard.bytes - shard.rows * manifest.row_bytes < 400
    before = files_of(cache)
    write_cache(config, out=cache, states_format="float32")
    assert files_of(cache) == before
    said = " ".join(capsys.readouterr().err.split())
    assert "12 rows of 64 tokens take 98.7 kB, 128 bytes a token in float32; 0 bytes are" in said


class PowerCutError(Exception):
    """Stands for whatever ends a process between two instructions."""


INSTANTS = list(product(("save_file", "publish", "write_json"), (1, 2, 3), (False, True)))


@pytest.mark.parametrize("instant", INSTANTS, ids=str)
def test_a_cache_that_was_cut_off_goes_on_to_the_same_files(
    config, cache, tmp_path, monkeypatch, instant
):
    function, call, after = instant
    out, real, calls = tmp_path / "cut", getattr(cache_writer, function), []

    def cut(*arguments):
        calls.append(arguments)
        if after or len(calls) < call:
            real(*arguments)
        if len(calls) == call:
            raise PowerCutError

    options: dict[str, Any] = {"states_format": "float32", "shard_bytes": SHARD_BYTES}
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, function, cut)
        with pytest.raises(PowerCutError):
            write_cache(config, out=out, **options)
    # A process that is killed does not clean up.
    (out / f".{shard_name(1)}.unfinished").write_bytes(b"half")
    (out / f".{MANIFEST}.1.tmp").write_bytes(b"{")
    done = len(read_manifest(out).shards) if (out / MANIFEST).exists() else 0
    kept = {index: (out / shard_name(index)).stat().st_mtime_ns for index in range(done)}
    write_cache(config, out=out, **options)
    assert files_of(out) == files_of(cache)
    for index, time_ns in kept.items():
        assert (out / shard_name(index)).stat().st_mtime_ns == time_ns


def test_a_process_that_is_killed_leaves_a_cache_that_goes_on(config, cache, tmp_path):
    out, settings_file = tmp_path / "killed", tmp_path / "settings.json"
    settings_file.write_text(resolved_json(config))
    program = f"""
import torch
from pathlib import Path
from tiny_onn.config.read import config_from_json
from tiny_onn.distill.cache_writer import write_cache
torch.set_num_threads(1)
config = config_from_json(Path({str(settings_file)!r}).read_text())
write_cache(config, out=Path({str(out)!r}), states_format="float32", shard_bytes=1)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        while not (out / shard_name(2)).exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert len(read_manifest(out).shards) >= 1
    write_cache(config, out=out, states_format="float32")
    assert len(read_manifest(out).shards) == ROWS
    ours, theirs = (TeacherCache(folder) for folder in (out, cache))
    tokenizer = make_tokenizer()
    for _, row in zip(range(ROWS), training_rows(config, tokenizer), strict=False):
        one, other = (c.taught([row])[0].teacher_states for c in (ours, theirs))
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_longer_cache_keeps_its_full_shards(config, copy, tmp_path):
    before = files_of(copy)
    longer = change(config, train={"tokens": 16 * 64})
    write_cache(longer, out=copy, states_format="float32")
    assert [shard.rows for shard in read_manifest(copy).shards] == [5, 5, 5, 1]
    after = files_of(copy)
    assert [after[shard_name(i)] == before[shard_name(i)] for i in range(3)] == [True, True, False]
    run_distill(longer, out=tmp_path / "live")
    run_distill(reading(longer, copy), out=tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "live")
    # A shorter one is not cut.
    write_cache(config, out=copy, states_format="float32")
    assert files_of(copy) == after


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    list(product((flip, cut_short, Path.unlink), (0, 2))),
    ids=lambda pair: pair[0].__name__,
)
def test_a_damaged_shard_is_refused_by_name_and_written_anew(config, copy, cache, tmp_path, damage):
    spoil, index = damage
    path = copy / shard_name(index)
    spoil(path)
    with pytest.raises(UserError, match=rf"{path.name}.*run `tiny-onn cache` with its settings"):
        run_distill(reading(config, copy), out=tmp_path / "run")
    if path.exists():
        with pytest.raises(UserError, match=rf"{path.name}: this shard .* remove the file and run"):
            write_cache(config, out=copy, states_format="float32")
        path.unlink()
    write_cache(config, out=copy, states_format="float32")
    assert files_of(copy) == files_of(cache)


def test_a_step_is_kept_if_the_rows_after_it_cannot_be_read(config, copy, live, tmp_path):
    out, spoiled = tmp_path / "run", copy / shard_name(1)
    content = spoiled.read_bytes()
    flip(spoiled)
    changed = reading(config, copy, train={"save_every_tokens": 0})
    with pytest.raises(UserError, match=f"{spoiled.name}: this shard of a teacher's cache is dam"):
        run_distill(changed, out=out)
    # The third step reads the first row of the shard.
    assert [row["step"] for row in records(out) if row["kind"] == "step"] == [1, 2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    spoiled.write_bytes(content)
    run_distill(changed, out=out, resume=True)
    assert_same_run(out, live)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "{", '{"version": 1, "shards": 3}', '{"version": 1, "shards": [{"rows": 1}]}'],
)
def test_a_damaged_manifest_is_refused(config, copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: got a damaged manifest.*; restore it"):
        TeacherCache(copy)
    with pytest.raises(UserError, match="damaged manifest"):
        write_cache(config, out=copy, states_format="float32")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_rows", "12"), ("rows_per_shard", 0), ("format", "int4"), ("identity", []),
     ("hidden_dim", 1.5), ("num_rows", 3)],
)  # fmt: skip
def test_a_manifest_of_other_types_is_refused(copy, key, value):
    table = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**table, key: value}))
    with pytest.raises(UserError, match="damaged manifest"):
        read_manifest(copy)
    (copy / MANIFEST).write_text(json.dumps({**table, "version": 2}))
    with pytest.raises(UserError, match="got version 2, expected 1"):
        read_manifest(copy)


def test_a_cache_of_another_text_or_teacher_is_refused_by_what_differs(config, cache, tmp_path):
    other_teacher = save_teacher(tmp_path / "teacher", seed=1)
    corpus = write_corpus(tmp_path / "corpus", num_files=7)
    others = {
        "seed 0 for 1": {"train": {"seed": 1}},
        "row_tokens 64 for 32": {"data": {"row_tokens": 32}, "train": {"tokens": 32}},
        r"held_out_fraction 0\.2 for 0\.3": {"data": {"held_out_fraction": 0.3}},
        r"text \(sha256\) \w+ for \w+, expected": {"data": {"sources": (str(corpus),)}},
        r"teacher's weights \(sha256\) \w+ for \w+, expected": {
            "teacher": {"path": str(other_teacher)}
        },
        "teacher's number format float32 for bfloat16": {"teacher": {"dtype": "bfloat16"}},
        "teacher's quantisation none for nf4 of the MLPs, double": {
            "teacher": {"quantization": "nf4"}
        },
    }
    for differs, sections in others.items():
        changed = reading(config, cache)
        changed = change(changed, **sections)
        models = load_dense(changed.teacher, torch.device("cpu"))
        with pytest.raises(UserError, match=rf"states of another text or teacher: got.*{differs}"):
            check_cache(changed, *models)
    check_cache(reading(config, cache), *load_dense(config.teacher, torch.device("cpu")))


def test_a_cache_of_another_tokenizer_is_refused(config, cache, tmp_path):
    folder = shutil.copytree(config.teacher.path, tmp_path / "teacher")
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    # Two tokens change places: the vocabulary is as large as before.
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(table))
    changed = reading(config, cache, teacher={"path": str(folder)})
    with pytest.raises(UserError, match=r"got teacher's tokenizer \(sha256\) \w+ for \w+, exp"):
        check_cache(changed, *load_dense(changed.teacher, torch.device("cpu")))


def test_a_run_with_another_cache_fails_before_its_first_step(config, cache, tmp_path):
    out, changed = tmp_path / "run", reading(config, cache, train={"seed": 1})
    with pytest.raises(UserError, match="seed 0 for 1"):
        run_distill(changed, out=out)
    assert not (out / "metrics.jsonl").exists()
    # The run may begin again in the same folder.
    run_distill(reading(config, cache), out=out)


def test_rows_of_another_text_are_noticed_where_they_are_read(config, cache):
    tokenizer = make_tokenizer()
    row = next(training_rows(config, tokenizer))
    row.input_ids[0, 3] += 1
    with pytest.raises(UserError, match="holds another text in row 0 than the run reads there"):
        TeacherCache(cache).taught([row])


def test_a_run_that_is_longer_than_its_cache_is_refused_before_it_begins(config, copy, tmp_path):
    longer = reading(config, copy, train={"tokens": ROWS * 64 + 1})
    told = r"holds 768 tokens, expected the 896 that the run reads; .* set train\.tokens=768 or"
    with pytest.raises(UserError, match=told):
        run_distill(longer, out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cache_that_is_too_short_for_other_steps_is_refused_when_the_run_is_resumed(
    config, cache, tmp_path
):
    out = tmp_path / "run"
    run_distill(reading(config, cache), out=out, after_step=at_step(1, partial(send, 2)))
    before = records(out)
    # After 2 rows, 10 of the 12 are left, which three steps of 4 rows exceed.
    changed = reading(config, cache, train={"rows_per_step": 4})
    told = (
        r"holds 768 tokens, expected the 896 that the run reads; .* set train\.tokens=640 or less"
    )
    with pytest.raises(UserError, match=told):
        run_distill(changed, out=out, resume=True, allow_change=("train.rows_per_step",))
    assert records(out) == before
    # The settings stay the run's own.
    run_distill(reading(config, cache), out=out, resume=True)


def test_an_unfinished_cache_serves_runs_that_are_short_enough(config, copy, tmp_path):
    table = json.loads((copy / MANIFEST).read_text())
    del table["shards"][1:]
    (copy / MANIFEST).write_text(json.dumps(table))
    # Five rows are there, of which a run reads two in each step.
    told = r"holds 320 tokens of 768 that it shall hold, expected the .* set train\.tokens=256 or"
    with pytest.raises(UserError, match=told):
        run_distill(reading(config, copy), out=tmp_path / "run")
    short = reading(config, copy, train={"tokens": 4 * 64})
    assert run_distill(short, out=tmp_path / "short").tokens == 4 * 64


def test_a_closed_cache_compares_no_shard_that_waits(config, cache, monkeypatch):
    compared, go_on, main = [], threading.Event(), threading.main_thread().ident
    assert main is not None

    def slow(path):
        compared.append(path.name)
        signal.pthread_kill(main, signal.SIGINT)
        assert go_on.wait(60)
        return file_sha256(path)

    monkeypatch.setattr(cache_reader, "file_sha256", slow)
    stream, reader = training_rows(config, make_tokenizer()), TeacherCache(cache)
    # The rows lie in three shards, for the first of which the reader waits.
    rows = [next(stream) for _ in range(ROWS)]
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        reader.taught(rows)
    reader.close()
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert compared == [shard_name(0)]


def test_a_run_closes_its_cache(config, cache, tmp_path, monkeypatch):
    executors = []

    class Recorded(ThreadPoolExecutor):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            executors.append(self)

    monkeypatch.setattr(cache_reader, "ThreadPoolExecutor", Recorded)
    run_distill(reading(config, cache, train={"tokens": 2 * 64}), out=tmp_path / "run")
    # Another reader has compared the settings, and has begun no work.
    with pytest.raises(RuntimeError, match="after shutdown"):
        executors[-1].submit(int)


def test_a_stopped_run_goes_on_with_its_cache(config, cache, live, tmp_path):
    config, out = reading(config, cache), tmp_path / "run"
    run_distill(config, out=out, after_step=at_step(2, partial(send, signal.SIGINT)))
    run_distill(config, out=out, resume=True)
    assert_same_run(out, live)


def test_a_run_may_take_up_a_cache_on_the_way(config, cache, live, tmp_path):
    out = tmp_path / "run"
    run_distill(config, out=out, after_step=at_step(2, partial(send, signal.SIGINT)))
    allowed = ("teacher.cache",)
    run_distill(reading(config, cache), out=out, resume=True, allow_change=allowed)
    assert_same_run(out, live)


def test_a_relative_folder_becomes_absolute(config, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(cache.parent)
    run_distill(reading(config, cache.name), out=tmp_path / "run")
    assert read_run_config(tmp_path / "run").teacher.cache == str(cache)


def test_a_run_of_before_has_no_cache(config):
    table = json.loads(resolved_json(config))
    del table["teacher"]["cache"]
    assert config_from_json(json.dumps(table)) == config


def test_a_folder_without_a_cache_is_refused(config, tmp_path):
    told = r"got .* without a readable manifest\.json .*; write one with `tiny-onn cache --out"
    with pytest.raises(UserError, match=told):
        run_distill(reading(config, tmp_path), out=tmp_path / "run")


def test_a_folder_with_something_else_or_another_cache_is_not_written_to(config, copy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: got .*, which holds .* and no manifest\.json"):
        write_cache(config, out=tmp_path)
    with pytest.raises(
        UserError, match=r"--out: .* holds another cache: got format float32 for bf"
    ):
        write_cache(config, out=copy)
    other = change(config, train={"seed": 1})
    with pytest.raises(UserError, match=r"--out: .* holds another cache: got seed 0 for 1, expec"):
        write_cache(other, out=copy, states_format="float32")


def test_a_full_disk_is_told_before_the_work_begins(config, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 40_000))
    told = r"--out: got 40\.0 kB free on the disk of .*, expected 49\.5 kB .*--format int8"
    with pytest.raises(UserError, match=told):
        write_cache(config, out=tmp_path / "cache")
    assert "12 rows of 64 tokens take 49.5 kB, 64 bytes a token" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_disk_that_fills_on_the_way_leaves_whole_shards(config, cache, tmp_path):
    options: dict[str, Any] = {"states_format": "float32", "shard_bytes": SHARD_BYTES}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A shard of two rows fits under this limit of a file's size, and one of five does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"{shard_name(0)}: cannot write it .* free some space"
        ):
            write_cache(config, out=tmp_path, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    write_cache(config, out=tmp_path, **options)
    assert files_of(tmp_path) == files_of(cache)


def test_states_that_are_not_finite_are_refused(config, tmp_path):
    rows = training_rows(config, make_tokenizer())
    dense, _ = load_dense(config.teacher, torch.device("cpu"))
    manifest = cache_writer.Manifest(
        identity={}, format="int8", hidden_dim=32, row_tokens=64, num_rows=1, rows_per_shard=1
    )
    with torch.no_grad():
        norm: Any = dense.base_model.norm
        norm.weight[0] = float("inf")
    with pytest.raises(UserError, match="hidden states are not finite in row 0 of the text"):
        cache_writer.write_shards(tmp_path, manifest, [0], rows, dense, train=TrainConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_profile_reads_the_cache_too(config, copy, tmp_path):
    flip(copy / shard_name(0))
    with pytest.raises(UserError, match=shard_name(0)):
        run_profile(reading(config, copy), out=tmp_path / "run")
