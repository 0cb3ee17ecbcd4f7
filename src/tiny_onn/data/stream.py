"""The stream of packed rows from text sources, reproducible and resumable to the row.

A source gives documents. The SHA-256 of a document decides its side of the train / held-out split
before anything is tokenised, so that duplicates land on one side and more data never moves a
document. Documents are tokenised in batches by the tokenizer's own threads, a batch ahead of the
rows, and packed (`packing.py`).

Embedded and local text is read once and held in memory (about one byte per character), and training
shuffles it anew each epoch. Hub datasets are streamed and shuffled in a buffer; resuming one reads
its epoch again up to the saved document, which takes time but is exact. Several sources take turns
document by document until all are exhausted; all local text counts as one source.

Only texts that are equal to the byte are duplicates: two texts that differ by a blank may land on
both sides of the split, so remove near-duplicates first where that matters. The hash of a chat is
that of its messages, whatever template renders them. Blank documents are left out, because there is
nothing to predict in them.
"""

import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from tiny_onn.config.schema import HUB_PREFIX, DataConfig
from tiny_onn.console import say
from tiny_onn.data.documents import Document
from tiny_onn.data.packing import Origin, PackedRow, Packer
from tiny_onn.data.sources import hub_documents, read_documents
from tiny_onn.data.tokens import DocumentTokens, document_ends
from tiny_onn.errors import UserError

Split = Literal["train", "held_out", "settling"]
Item = TypeVar("Item")

_BATCH_CHARS = 131_072


def is_held_out(digest: bytes, held_out_fraction: float) -> bool:
    """Return True if the first 64 bits of a document's SHA-256, as a share, are below the fraction.

    Such a document is kept for evaluation.
    """
    return int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64


def side_of(digest: bytes, config: DataConfig) -> Split:
    """Return the split that a document belongs to: the shares follow each other on one scale."""
    if is_held_out(digest, config.held_out_fraction):
        return "held_out"
    if is_held_out(digest, config.held_out_fraction + config.settling_fraction):
        return "settling"
    return "train"


class TokenStream:
    """Packed rows of one side of the split, endless for `train` and one pass for the others.

    `train` visits the documents in a new seeded order each epoch, and a row may span two epochs.
    `held_out` visits them in the order of their SHA-256 whatever the seed, so that its beginning is
    a fair sample of all of them; hub datasets are visited as stored. `settling` is another such
    side, which neither trains nor evaluates. `DocumentTokens` decides how
    documents begin and end. Iterating again continues the stream and does not start it over.

    Attributes:
        packer: the packer, with its counts of documents, tokens and padding.
        epoch: passes over all documents that are complete.

    Raises:
        UserError: a source or a setting is bad, or nothing is left on this side of the split.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: Split,
        seed: int,
        row_tokens: int,
    ) -> None:
        self._config = config
        self._tokens = DocumentTokens(tokenizer)
        self._split: Split = split
        self._seed = seed
        self._documents, self._text_sha256 = _local_documents(config, split, self._tokens)
        self._hub_sources = [name for name in config.sources if name.startswith(HUB_PREFIX)]
        # The rows of a hub dataset are not known yet and may be chats.
        self._with_chats = bool(self._hub_sources) or any(d.is_chat for _, d in self._documents)
        # Nothing attends to padding or learns from it, so that any id will do; every model has 0.
        self.packer = Packer(row_tokens, pad_token_id=0)
        self.epoch = 0
        # This counts the documents of the epoch that the packer has got.
        self._position = 0
        self._token_ids = self._tokenise()

    def __iter__(self) -> Iterator[PackedRow]:
        return self

    def __next__(self) -> PackedRow:
        while (row := self.packer.pop()) is None:
            document = next(self._token_ids, None)
            if document is not None:
                self.packer.add(*document)
                self._position += 1
                continue
            if self.packer.num_tokens == 0:
                raise _empty_split_error(self._config, self._split)
            if self._split != "train":
                if (row := self.packer.finish()) is None:
                    raise StopIteration
                return row
            self.epoch += 1
            self._position = 0
            self._token_ids = self._tokenise()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return everything on which the next rows depend, as JSON values."""
        return {
            "identity": self.identity(),
            "epoch": self.epoch,
            "position": self._position,
            "packer": self.packer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with exactly the row that would have followed `state_dict`.

        Raises:
            UserError: the text, the tokenizer or a setting differs from that of the saved stream.
        """
        for name, value in self.identity().items():
            # A value that an earlier version did not save counts as unchanged.
            saved = state["identity"].get(name, value)
            if value != saved:
                raise UserError(
                    f"resume: the data's {name} changed: got {value}, expected {saved}; restore it"
                    " or start a new run"
                )
        self.epoch = state["epoch"]
        self._position = state["position"]
        self.packer.load_state_dict(state["packer"])
        self._token_ids = self._tokenise()

    def identity(self) -> dict[str, Any]:
        """Return the values that must be equal for a saved state to mean the same rows."""
        return {
            "split": self._split,
            "seed": self._seed,
            "row_tokens": self.packer.row_tokens,
            "held_out_fraction": self._config.held_out_fraction,
            "settling_fraction": self._config.settling_fraction,
            "hub sources": [*self._hub_sources, self._config.split, self._config.text_field],
            "text (sha256)": self._text_sha256,
            **self._tokens.identity(with_chats=self._with_chats),
        }

    def documents(self) -> Iterator[tuple[list[int], Origin]]:
        """Return token ids and origins of this epoch's documents that no row has begun yet.

        The stream itself does not move, so that each call yields the same documents.
        """
        return self._tokenise()

    def _tokenise(self) -> Iterator[tuple[list[int], Origin]]:
        """Return token ids and origins of this epoch's documents from the current position on.

        The iterator does not hold the stream: whoever drops a stream ends its thread at once, and
        not when garbage is collected.
        """
        given_up = Event()
        documents = itertools.islice(self._epoch_documents(given_up), self._position, None)
        return _tokenised(documents, self._tokens, given_up)

    def _epoch_documents(self, given_up: Event) -> Iterator[Document]:
        config, split = self._config, self._split
        order = (self._seed, self.epoch) if split == "train" else None
        streams = [self._ordered_local(order)]
        for source in self._hub_sources:
            stream = hub_documents(source, config, order)
            # Documents of this side of the split may be far apart, and nobody waits for them then.
            stream = itertools.takewhile(lambda _: not given_up.is_set(), stream)
            ours = (doc for doc in stream if side_of(doc.digest(), config) == split)
            streams.append(map(self._tokens.rendered, ours))
        turns = itertools.zip_longest(*streams)
        return (document for turn in turns for document in turn if document is not None)

    def _ordered_local(self, order: tuple[int, int] | None) -> Iterator[Document]:
        documents = self._documents
        if order is None:
            return (document for _, document in documents)
        shuffled = shuffled_order(f"{order[0]}:{order[1]}", len(documents))
        return (documents[index][1] for index in shuffled)


def shuffled_order(key: str, number: int) -> list[int]:
    """Return the numbers from 0 to below `number` in an order that depends on the key alone."""
    # A sum would give (seed 1, epoch 0) and (seed 0, epoch 1) the same order; a hash does not.
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(number, generator=generator).tolist()


def _tokenised(
    documents: Iterable[Document], tokens: DocumentTokens, given_up: Event
) -> Iterator[tuple[list[int], Origin]]:
    """Yield token ids and origins of documents, read a batch ahead; at the end set the event."""
    try:
        for batch, ids in one_ahead((batch, tokens.ids(batch)) for batch in _batches(documents)):
            for document, token_ids in zip(batch, ids, strict=True):
                yield token_ids, Origin(document.source, document.index, 0)
    finally:
        given_up.set()


def _local_documents(
    config: DataConfig, split: Split, tokens: DocumentTokens
) -> tuple[list[tuple[bytes, Document]], str]:
    """Return one side's embedded and local documents, sorted by digest, and the text's SHA-256.

    Each document comes with its digest. The text's SHA-256 is that of all digests of both sides,
    because a change of held-out text would change what a resumed run measures.
    """
    if not config.sources:
        raise UserError("data.sources: got none, expected at least one; write embedded or a path")
    local = [source for source in config.sources if not source.startswith(HUB_PREFIX)]
    documents: list[tuple[bytes, Document]] = []
    digests: list[bytes] = []
    for source in local:
        for document in read_documents(source, config.text_field):
            digest = document.digest()
            digests.append(digest)
            if side_of(digest, config) == split:
                documents.append((digest, tokens.rendered(document)))
    if not documents and len(local) == len(config.sources):
        if len(set(digests)) == 1:
            raise UserError(
                "data.sources: got one document in all, expected at least two, one to train on and"
                " one to hold out; split the text into files, or into lines of a .jsonl file"
            )
        raise _empty_split_error(config, split, f" of {len(digests):,} documents")
    # The sort is stable, so that documents of equal text keep the order of their sources.
    documents.sort(key=lambda pair: pair[0])
    return documents, hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _empty_split_error(config: DataConfig, split: Split, found: str = "") -> UserError:
    name = "settling_fraction" if split == "settling" else "held_out_fraction"
    remedy = "lower it" if split == "train" else "raise it"
    return UserError(
        f"data.{name}: {getattr(config, name)}{found} leaves no text for the {split} split,"
        f" expected a document of two tokens or more; {remedy}, or add text (each .txt file and"
        " each row of the others is a document; files of other kinds are not read)"
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents, each closed once it holds `_BATCH_CHARS` characters."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield the items while a thread gets the next one, whose error comes in its turn.

    A reader may be given up at any time, and the item in the making is lost.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="text")
    try:
        end = object()
        ahead = pool.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, items, end)
            yield item  # pyright: ignore[reportReturnType]
    finally:
        # The garbage collector may end a reader while a thread is being started, under a lock that
        # the end of another thread needs: waiting for it here would wait for ever.
        pool.shutdown(wait=False)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that does not suit a model of this vocabulary.

    A line is printed if there is no end-of-sequence token. Tokens that were added to the tokenizer
    alone may lie beyond the vocabulary, because text that holds one is refused when it is read.

    Raises:
        UserError: a learned token, or one around every document, lies beyond the vocabulary.
    """
    added = set(tokenizer.get_added_vocab().values())  # pyright: ignore[reportCallIssue, reportOptionalCall]
    learned = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    start, end = document_ends(tokenizer)
    if (largest := max(learned, *start, *end, 0)) >= vocab_size:
        raise UserError(
            f"teacher.path: the tokenizer has token id {largest}, expected less than the model's"
            f" vocabulary of {vocab_size}; use the model's own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        say(
            "teacher.path: neither the tokenizer nor the model's configuration names an"
            " end-of-sequence token, so documents are not separated by one"
        )
