"""Token ids of documents, with the tokenizer's own special tokens at their start and end.

The token ids of a document are those of `tokenizer(text)`, which may begin with a
beginning-of-sequence token. The end-of-sequence token, if there is one, is appended unless the
tokenizer has put it there. A chat is rendered with the tokenizer's chat template, which places the
tokens at its start, and its end is marked like that of any document unless the template has done
so. Text that spells a special token is tokenised as that token.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.console import say
from tiny_onn.data.documents import Document
from tiny_onn.data.fields import bad_source
from tiny_onn.errors import LoadErrors, UserError, load_errors, reason_of

# A chat template that asks for today's date gets this one, so that rows are the same every day.
_DATE = datetime.date(2024, 7, 26)
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Set a tokenizer's vocabulary size and end-of-sequence token from its model's files.

    The end-of-sequence token stays the tokenizer's own if it has one. Otherwise it becomes the one
    of config.json or generation_config.json, the first if there are several.
    """
    config = model.config.get_text_config()
    tokenizer.model_vocab_size = config.vocab_size
    if tokenizer.eos_token_id is not None:
        return
    for source in (config, model.config, model.generation_config):
        ends = getattr(source, "eos_token_id", None)
        for token_id in ends if isinstance(ends, list | tuple) else [ends]:
            if isinstance(token_id, int) and 0 <= token_id < config.vocab_size:
                token = tokenizer.convert_ids_to_tokens(token_id)
                if isinstance(token, str):
                    tokenizer.eos_token = token
                    return


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids before and after every document's own.

    Raises:
        UserError: the tokenizer is a slow one, or puts special tokens inside a text.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"teacher.path: got the slow tokenizer {type(tokenizer).__name__}, expected a fast"
            " one; convert it to tokenizer.json"
        )
    with LoadErrors("teacher.path: its tokenizer failed ({}); use the model's own".format):
        whole = tokenizer("a", return_attention_mask=False, verbose=False)
        # The tokenizer marks its own tokens with None and those of the text with 0.
        of_text = [place for place, text in enumerate(whole.sequence_ids(0)) if text is not None]
    token_ids = whole["input_ids"]
    first = of_text[0] if of_text else len(token_ids)
    last = of_text[-1] + 1 if of_text else len(token_ids)
    if len(of_text) != last - first:
        raise UserError(
            "teacher.path: its tokenizer puts special tokens inside a text, expected them before"
            " and after it alone; use the model's own tokenizer"
        )
    end, eos_token_id = token_ids[last:], tokenizer.eos_token_id
    if eos_token_id is not None and eos_token_id not in end:
        end = [*end, eos_token_id]
    return token_ids[:first], end


class DocumentTokens:
    """The one way in which documents become token ids, wherever they are read.

    Attributes:
        start: the token ids that the tokenizer puts before a text.
        end: the token ids after a document.

    Raises:
        UserError: `document_ends` refuses the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.start, self.end = document_ends(tokenizer)
        limit = getattr(tokenizer, "model_vocab_size", None)
        largest = max(tokenizer.get_vocab().values())
        self._limit: int | None = limit if limit is not None and largest >= limit else None

    def identity(self, *, with_chats: bool) -> dict[str, Any]:
        """Return by name the values on which the token ids of documents depend.

        Args:
            with_chats: True adds the chat template, on which the token ids of chats depend.
        """
        identity: dict[str, Any] = {
            "vocabulary size": len(self._tokenizer),
            "tokens around a document": [self.start, self.end],
        }
        if with_chats:
            template = str(self._tokenizer.chat_template).encode()
            identity["chat template (sha256)"] = hashlib.sha256(template).hexdigest()
        return identity

    def rendered(self, document: Document) -> Document:
        """Return the same document if it is text, else the chat rendered to text by its template.

        Raises:
            UserError: there is no chat template, or it refuses the chat.
        """
        if not document.is_chat:
            return document
        # Importing jinja2, on which torch depends, is slow, and only chats need it.
        from jinja2 import TemplateError  # noqa: PLC0415

        where = f"{document.source} document {document.index}"
        if not self._tokenizer.chat_template:
            raise bad_source(
                where,
                "got a chat, and the tokenizer has no chat template, expected text; render the"
                " chats to text first and name its field with data.text_field, or take a teacher"
                " whose tokenizer has a template",
            )
        if not getattr(self._tokenizer, "announced_chats", False):
            self._tokenizer.announced_chats = True
            say(f"{document.source}: chats are rendered to text with the tokenizer's chat template")
        try:
            template = _ASKS_FOR_DATE.sub(
                lambda call: repr(_DATE.strftime(call[2])), self._tokenizer.get_chat_template()
            )
            text = self._tokenizer.apply_chat_template(
                json.loads(document.text), chat_template=template, tokenize=False
            )
        except (TemplateError, *load_errors()) as error:
            raise bad_source(
                where,
                f"the tokenizer's chat template refuses the chat ({reason_of(error)}), expected"
                " one that it renders; mend the chat or leave it out",
            ) from error
        assert isinstance(text, str)
        return replace(document, text=text)

    def ids(self, documents: Sequence[Document]) -> list[list[int]]:
        """Return the token ids of rendered documents; a text without tokens gets an empty list.

        Raises:
            UserError: the tokenizer fails, or a text has a token that the model does not have.
        """
        first = f"{documents[0].source} document {documents[0].index}"
        with LoadErrors(partial(_tokenizer_failed, first)):
            encoded = self._tokenizer(
                [document.text for document in documents],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        pairs = zip(documents, encoded, strict=True)
        return [self._whole(document, token_ids) for document, token_ids in pairs]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a text that the model continues, a document without its end.

        Raises:
            UserError: the tokenizer fails, or the model has no embedding for a token.
        """
        with LoadErrors("--prompt: the tokenizer failed on it ({}); change the text".format):
            token_ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._check("--prompt", token_ids)
        return [*self.start, *token_ids]

    def _whole(self, document: Document, token_ids: list[int]) -> list[int]:
        self._check(f"data.sources: {document.source} document {document.index}", token_ids)
        if not token_ids:
            return []
        if not document.is_chat:
            return [*self.start, *token_ids, *self.end]
        eos_token = self._tokenizer.eos_token
        ended = isinstance(eos_token, str) and document.text.rstrip().endswith(eos_token)
        return token_ids if ended else [*token_ids, *self.end]

    def _check(self, where: str, token_ids: list[int]) -> None:
        if self._limit is None or max(token_ids, default=0) < self._limit:
            return
        token_id = next(i for i in token_ids if i >= self._limit)
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        raise UserError(
            f"{where}: holds {token!r}, which is the tokenizer's token id {token_id}, expected less"
            f" than the model's vocabulary of {self._limit}; take that token out of the text"
        )


def _tokenizer_failed(first: str, reason: str) -> str:
    return (
        f"teacher.path: its tokenizer failed ({reason}) on the documents from {first} on; try again"
        " with --resume, or leave that text out"
    )
