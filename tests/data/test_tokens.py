"""Where a document begins and ends in token ids, whatever the tokenizer and the model's files."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tiny import change, make_tokenizer, save_teacher, write_corpus, write_run
from tiny_onn.config.schema import DataConfig, TeacherConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import held_out_rows, text_rows
from tiny_onn.data.sources import read_documents
from tiny_onn.data.stream import TokenStream, check_vocabulary
from tiny_onn.data.tokens import DocumentTokens, document_ends
from tiny_onn.deploy.generate import run_generate
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import run_eval
from tiny_onn.runs.students import load_student
from tiny_onn.teacher.load import load_dense

BOS, EOS = 1, 2
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
)


def placing(template: str | None, **tokens: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around a text, `<s> $A </s>` for example."""
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<pad>", 0), ("<s>", BOS), ("</s>", EOS)]
        )
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


def documents_of(row: PackedRow) -> list[list[int]]:
    """The token ids of each document in a row that splits none."""
    bounds = zip(row.cu_seqlens.tolist(), row.cu_seqlens.tolist()[1:], strict=False)
    return [row.input_ids[0, a:b].tolist() for a, b in bounds if row.loss_mask[0, a]]


def in_one_row(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The documents of a file or folder as `eval --text` has them."""
    (row,) = text_rows(path, tokenizer, DataConfig(row_tokens=2**16), 2**16)
    return documents_of(row)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tokens") / "corpus")


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (None, [], [EOS]),
        ("<s> $A", [BOS], [EOS]),
        ("<s> $A </s>", [BOS], [EOS]),
        ("$A </s>", [], [EOS]),
        ("</s> $A", [EOS], [EOS]),
        ("<s> <pad> $A", [BOS, 0], [EOS]),
        ("<s> $A <pad>", [BOS], [0, EOS]),
    ],
)
def test_documents_begin_and_end_as_the_tokenizer_has_it(
    corpus: Path, template: str | None, start: list[int], end: list[int]
):
    tokenizer = placing(template)
    assert document_ends(tokenizer) == (start, end)
    texts = [document.text for document in read_documents(str(corpus), "text")]
    expected = [
        start + list(tokenizer(text, add_special_tokens=False).input_ids) + end for text in texts
    ]
    for text, document in zip(texts, expected, strict=True):
        prompt = tokenizer(text).input_ids
        assert document[: len(prompt)] == prompt
    assert in_one_row(corpus, tokenizer) == expected
    config = DataConfig(sources=(str(corpus),), held_out_fraction=0.3)
    train = TokenStream(config, tokenizer, split="train", seed=0, row_tokens=2**15)
    (held_out,) = held_out_rows(config, tokenizer, 2**15, 1)
    found = [*documents_of(held_out), *documents_of(next(train))]
    whole = [document for document in found if document in expected]
    # The training row's last document may be cut.
    assert len(whole) >= len(found) - 1 > len(expected)


def test_a_tokenizer_without_an_end_token_keeps_what_it_places():
    tokenizer = placing("<s> $A <pad>", eos_token=None)
    assert document_ends(tokenizer) == ([BOS], [0])
    assert document_ends(placing(None, eos_token=None)) == ([], [])


def test_a_text_that_gives_no_token_is_skipped_whatever_surrounds_it(tmp_path: Path):
    tokenizer = placing("<s> $A")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    (tmp_path / "x.jsonl").write_text('{"text": "aaa"}\n{"text": "the dog"}\n')
    (row,) = text_rows(tmp_path / "x.jsonl", tokenizer, DataConfig(row_tokens=64), 64)
    assert row.num_documents == 1


def test_the_first_token_of_a_document_stays_out_of_the_routers_statistics(corpus: Path):
    rows = text_rows(corpus, placing("<s> $A"), DataConfig(row_tokens=512), 4096)
    for row in rows:
        assert not row.router_mask[row.input_ids == BOS].any()
        assert torch.equal(row.loss_mask, row.labels != -100)


def test_a_stream_notices_another_start_and_resumes_states_that_do_not_name_it(corpus: Path):
    config = DataConfig(sources=(str(corpus),))

    def stream(template: str | None) -> TokenStream:
        return TokenStream(config, placing(template), split="train", seed=0, row_tokens=64)

    state = stream(None).state_dict()
    with pytest.raises(UserError, match="the data's tokens around a document changed"):
        stream("<s> $A").load_state_dict(state)
    del state["identity"]["tokens around a document"]
    resumed, fresh = stream(None), stream(None)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed).input_ids, next(fresh).input_ids)


def test_a_prompt_begins_as_documents_do_and_has_no_end():
    tokenizer = placing("<s> $A </s>")
    text = tokenizer("the dog", add_special_tokens=False).input_ids
    assert DocumentTokens(tokenizer).prompt("the dog") == [BOS, *text]


# Tokens that only the tokenizer has.


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer has a [PAD] that the model has no embedding for."""
    folder = save_teacher(tmp_path_factory.mktemp("larger") / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(320 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 320
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_of_the_tokenizer_alone_stops_no_run(larger: Path, tmp_path: Path):
    config = write_run(tmp_path, teacher={"path": str(larger)}, train={"tokens": 128})
    run_distill(config, out=tmp_path / "run")
    assert run_eval(str(tmp_path / "run"), text=None, device="cpu", max_tokens=128)["step"] == 2


def test_text_that_makes_such_a_token_is_refused_with_its_document(larger: Path, tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "03.txt").write_text("the dog [PAD] sleeps")
    tokenizer = load_dense(TeacherConfig(path=str(larger)), torch.device("cpu"))[1]
    match = r"^data.sources: .*03.txt document 0: holds '\[PAD\]', .* id 320, .* of 320; take"
    with pytest.raises(UserError, match=match):
        config = DataConfig(sources=(str(corpus),), held_out_fraction=0.01)
        stream = TokenStream(config, tokenizer, split="train", seed=0, row_tokens=64)
        list(itertools.takewhile(lambda _: stream.epoch == 0, stream))
    with pytest.raises(UserError, match=r"^--text: .*03.txt document 0: holds '\[PAD\]'"):
        text_rows(corpus, tokenizer, DataConfig(row_tokens=64), 10**6)
    with pytest.raises(UserError, match=r"^--prompt: holds '\[PAD\]'"):
        run_generate(
            str(larger), prompt="a [PAD]", max_new_tokens=1, temperature=0.0, seed=0, device="cpu"
        )


def test_a_learned_or_placed_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="expected less than the model's vocabulary of 200"):
        check_vocabulary(make_tokenizer(), 200)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=f"token id {len(tokenizer) - 1}"):
        check_vocabulary(tokenizer, len(tokenizer) - 1)


# An end that only the model's files know.


def teacher_with(folder: Path, *, config: Any, generation: Any, tokenizer: bool = False) -> Path:
    """A teacher's folder with these `eos_token_id`, with or without tokenizer_config.json."""
    save_teacher(folder)
    if not tokenizer:
        (folder / "tokenizer_config.json").unlink()
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        table = json.loads((folder / name).read_text()) | {"eos_token_id": value}
        (folder / name).write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize(
    ("names", "tokenizer", "expected"),
    [
        ((2, 2), False, 2),
        (([5, 7], None), False, 5),
        ((None, [6, 7]), False, 6),
        ((None, 6), False, 6),
        (([5, 7], [5, 7]), True, 2),
    ],
)
def test_documents_end_with_the_models_end_token(
    tmp_path: Path, corpus: Path, names: Any, tokenizer: bool, expected: int
):
    config, generation = names
    folder = teacher_with(tmp_path / "t", config=config, generation=generation, tokenizer=tokenizer)
    model, known = load_dense(TeacherConfig(path=str(folder)), torch.device("cpu"))
    check_vocabulary(known, model.config.vocab_size)
    assert known.eos_token_id == expected
    assert all(document[-1] == expected for document in in_one_row(corpus, known))


def test_the_student_keeps_the_end_token_and_an_unknown_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = "names an end-of-sequence token, so documents are not separated"
    for name, token_id in (("known", 6), ("unknown", None)):
        folder = teacher_with(tmp_path / name, config=token_id, generation=token_id)
        config = write_run(tmp_path / f"{name}-run", teacher={"path": str(folder)})
        run_distill(change(config, train={"tokens": 64}), out=tmp_path / f"{name}-out")
        student = load_student(str(tmp_path / f"{name}-out"), torch.device("cpu"))
        assert student.tokenizer.eos_token_id == token_id
        told = "".join(capsys.readouterr().err)
        assert told.count(said) == (token_id is None)


# Chats.


def chat_stream(path: Path, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> TokenStream:
    config = DataConfig(sources=(str(path),), held_out_fraction=0.0, **fields)
    return TokenStream(config, tokenizer, split="train", seed=0, row_tokens=4096)


def chats(path: Path, number: int = 4) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"hi {i}"},
                {"role": "assistant", "content": "ho"},
            ]
        }
        for i in range(number)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("chat_template", "text"),
    [
        (CHATML, "<|user|>hi 0</s>\n<|assistant|>ho</s>\n"),
        ("{{ bos_token }}" + CHATML, "<s><|user|>hi 0</s>\n<|assistant|>ho</s>\n"),
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "<s>hi 0\nho\n</s>",
        ),
    ],
)
def test_a_chat_is_what_its_template_makes_of_it_with_no_token_twice(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    template: str | None,
    chat_template: str,
    text: str,
):
    tokenizer = placing(template, chat_template=chat_template)
    path = chats(tmp_path / "x.jsonl")
    expected = [
        tokenizer(text.replace("hi 0", f"hi {index}"), add_special_tokens=False).input_ids
        for index in range(4)
    ]
    assert in_one_row(path, tokenizer) == expected
    (row,) = held_out_rows(
        DataConfig(sources=(str(path),), held_out_fraction=0.99), tokenizer, 4096, 1
    )
    assert sorted(documents_of(row)) == sorted(expected)
    assert capsys.readouterr().err.count("chats are rendered to text") == 1


def test_a_chat_without_a_template_is_refused_at_once(tmp_path: Path):
    path = chats(tmp_path / "x.jsonl")
    match = r"x.jsonl document 0: got a chat, and the tokenizer has no chat template.*to text first"
    with pytest.raises(UserError, match=f"^data.sources: .*{match}"):
        chat_stream(path, make_tokenizer())
    with pytest.raises(UserError, match=f"^--text: .*{match}"):
        text_rows(path, make_tokenizer(), DataConfig(row_tokens=64), 64)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{% if %}", "{{ 1 + 'a' }}"]
)
def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path, template: str):
    tokenizer = placing(None, chat_template=template)
    with pytest.raises(UserError, match=r"x.jsonl document 0: the tokenizer's chat template refu"):
        chat_stream(chats(tmp_path / "x.jsonl"), tokenizer)


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(tmp_path: Path):
    template = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%Y\") }}" + CHATML
    stream = chat_stream(chats(tmp_path / "x.jsonl"), placing(None, chat_template=template))
    assert all(d.text.startswith("26 Jul 2024|2024<") for _, d in stream._documents)


def test_a_chats_side_of_the_split_does_not_depend_on_the_template(tmp_path: Path):
    path = chats(tmp_path / "x.jsonl")
    one, other = (
        chat_stream(path, placing(None, chat_template=template))
        for template in (CHATML, "x" + CHATML)
    )
    assert [digest for digest, _ in one._documents] == [digest for digest, _ in other._documents]
    with pytest.raises(UserError, match=r"the data's chat template \(sha256\) changed"):
        other.load_state_dict(one.state_dict())


def test_a_hub_datasets_chats_are_rendered(tmp_path: Path):
    (tmp_path / "hub").mkdir()
    chats(tmp_path / "hub" / "rows.jsonl", 40)
    config = DataConfig(sources=(f"hf:{tmp_path / 'hub'}",), held_out_fraction=0.0)
    tokenizer = placing(None, chat_template=CHATML)
    stream = TokenStream(config, tokenizer, split="train", seed=0, row_tokens=64)
    assert "<|user|>hi" in str(tokenizer.decode(next(stream).input_ids[0]))


def test_a_run_distills_on_chats(tmp_path: Path):
    folder = save_teacher(tmp_path / "chatty")
    placing("<s> $A", chat_template="{{ bos_token }}" + CHATML).save_pretrained(folder)
    path = chats(tmp_path / "x.jsonl", 60)
    config = write_run(tmp_path, teacher={"path": str(folder)}, train={"tokens": 128})
    config = change(config, data={"sources": (str(path),)})
    result = run_distill(config, out=tmp_path / "run")
    rows = held_out_rows(config.data, result.prepared.tokenizer, 64, 64)
    assert rows[0].input_ids[0, 0] == BOS
