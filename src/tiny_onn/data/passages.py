"""Text of any length to evaluate on, read anew for each pass and never held as a whole.

Without a stride the rows are packed as in training, and each token is predicted from its own row
alone. With a stride a document is read in overlapping windows: each begins `stride` tokens after
the one before, and only the tokens that no earlier window predicted count, so that each of them
sees at least `row_tokens - stride` tokens before it. Source: Hugging Face's "Perplexity of
fixed-length models" reads text in this way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tiny_onn.config.schema import DataConfig
from tiny_onn.data.packing import IGNORED_LABEL, Origin, PackedRow, Packer, build_row
from tiny_onn.data.rows import eval_row_tokens
from tiny_onn.data.sources import read_documents, reworded_for_text
from tiny_onn.data.stream import TokenStream
from tiny_onn.data.tokens import DocumentTokens
from tiny_onn.errors import UserError

Documents = Callable[[], Iterator[tuple[list[int], Origin]]]
# Padding is attended to by nothing, so that any id will do; every model has this one.
_PAD = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Passages:
    """Packed rows of a text; each iteration reads the text again from its beginning.

    Attributes:
        documents: a function that yields the token ids and the origin of each document.
        name: the name of the text in messages.
        sources: the sources that the text was read from, as the user named them.
        row_tokens: the length of a row, which is also the length of a window.
        stride: the distance of two windows of a document; None: windows do not overlap.
        max_tokens: the number of tokens after which reading ends; 0: at the end of the text. A
            row more is not begun; the first row is always read.
    """

    documents: Documents
    name: str
    sources: tuple[str, ...]
    row_tokens: int
    stride: int | None
    max_tokens: int

    def __iter__(self) -> Iterator[PackedRow]:
        """Yield the rows.

        Raises:
            UserError: the text cannot be read, or no document has two tokens or more.
        """
        read = 0
        for row in self._rows():
            size = self.row_tokens if self.stride is None else int(row.loss_mask.sum())
            if read and self.max_tokens and read + size > self.max_tokens:
                return
            read += size
            yield row
        if not read:
            raise UserError(
                f"{self.name} without a document of two tokens or more, expected some text;"
                " nothing can be predicted in one token"
            )

    def _rows(self) -> Iterator[PackedRow]:
        if self.stride is None:
            return _packed(self.documents(), self.row_tokens)
        return _strided(self.documents(), self.row_tokens, self.stride)

    def __length_hint__(self) -> int:
        """Return the largest number of rows, 0 if it is unknown, for a bar of progress."""
        return 0 if self.stride else self.max_tokens // self.row_tokens


def held_out_passages(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stride: int | None,
    max_tokens: int,
) -> Passages:
    """Return the held-out text of a run; without a stride, the rows are those that it evaluates on.

    Raises:
        UserError: `TokenStream` refuses a source or a setting, or the stride does not fit.
    """
    row_tokens = eval_row_tokens(config)
    _check_stride(stride, row_tokens)
    stream = TokenStream(config, tokenizer, split="held_out", seed=0, row_tokens=row_tokens)
    return Passages(
        documents=stream.documents,
        name="data.sources: got held-out text",
        sources=config.sources,
        row_tokens=row_tokens,
        stride=stride,
        max_tokens=max_tokens,
    )


def text_passages(
    path: Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stride: int | None,
    max_tokens: int,
) -> Passages:
    """Return the text of a file or folder; mistakes in it are raised while it is read.

    Raises:
        UserError: the stride does not fit.
    """
    row_tokens = eval_row_tokens(config)
    _check_stride(stride, row_tokens)
    tokens = DocumentTokens(tokenizer)

    def documents() -> Iterator[tuple[list[int], Origin]]:
        try:
            for document in read_documents(str(path), config.text_field):
                ids = tokens.ids([tokens.rendered(document)])[0]
                yield ids, Origin(document.source, document.index, 0)
        except UserError as error:
            raise UserError(reworded_for_text(str(error))) from error

    return Passages(
        documents=documents,
        name=f"--text: got {path}",
        sources=(str(path),),
        row_tokens=row_tokens,
        stride=stride,
        max_tokens=max_tokens,
    )


def domain_of(source: str, sources: tuple[str, ...]) -> str:
    """Return the domain of a document, by which an evaluation reports its numbers apart.

    It is a source that the user named if the document lies in exactly that: a file or a hub
    dataset. It is a part of the embedded text, as `embedded:code`, and else the folder of the
    document's file.

    Args:
        source: the source of the document's origin.
        sources: the sources that the user named.
    """
    named = {*sources, *(str(Path(name)) for name in sources)}
    if source in named:
        return source
    if source.startswith("embedded:"):
        return ":".join(source.split(":")[:2])
    return str(Path(source).parent) if source else ""


def _packed(documents: Iterator[tuple[list[int], Origin]], row_tokens: int) -> Iterator[PackedRow]:
    packer = Packer(row_tokens, _PAD)
    for document in documents:
        packer.add(*document)
        while (row := packer.pop()) is not None:
            yield row
    if (row := packer.finish()) is not None:
        yield row


def _strided(
    documents: Iterator[tuple[list[int], Origin]], row_tokens: int, stride: int
) -> Iterator[PackedRow]:
    """Yield rows of whole windows, as many as fit one after the other."""
    waiting: list[tuple[list[int], Origin, int]] = []
    room = row_tokens
    for ids, origin in documents:
        for start, context in _windows(len(ids), row_tokens, stride):
            window = ids[start : start + row_tokens]
            if len(window) > room:
                yield _row_of_windows(waiting, row_tokens)
                waiting, room = [], row_tokens
            waiting.append((window, origin._replace(token=origin.token + start), context))
            room -= len(window)
    if waiting:
        yield _row_of_windows(waiting, row_tokens)


def _windows(num_tokens: int, row_tokens: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield the start of each window of a document, and its tokens that the one before covers."""
    if num_tokens < 2:
        return
    yield 0, 0
    start = 0
    while start + row_tokens < num_tokens:
        start += stride
        yield start, row_tokens - stride


def _row_of_windows(windows: list[tuple[list[int], Origin, int]], row_tokens: int) -> PackedRow:
    """Return a row in which the tokens that an earlier window predicted have no label.

    The router's mask is that of the labels, less first tokens, so that no token counts twice.
    """
    row = build_row(
        [ids for ids, _, _ in windows],
        row_tokens=row_tokens,
        pad_token_id=_PAD,
        origins=[origin for _, origin, _ in windows],
    )
    labels_1T = row.labels.clone()
    for begin, (_, _, context) in zip(row.cu_seqlens.tolist(), windows, strict=False):
        labels_1T[0, begin : begin + max(0, context - 1)] = IGNORED_LABEL
    mask_1T = labels_1T != IGNORED_LABEL
    return PackedRow(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        cu_seqlens=row.cu_seqlens,
        max_seqlen=row.max_seqlen,
        labels=labels_1T,
        loss_mask=mask_1T,
        router_mask=mask_1T & (row.position_ids > 0),
        origins=row.origins,
    )


def _check_stride(stride: int | None, row_tokens: int) -> None:
    if stride is not None and not 1 <= stride < row_tokens:
        raise UserError(
            f"--stride: got {stride}, expected 1 to {row_tokens - 1}, less than a window of"
            " the run's evaluations; half a window is usual"
        )
