"""Long texts are cut into documents of bounded length."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_onn.errors import UserError

_DOCUMENT_CHARS = 64_000


@dataclass(frozen=True, slots=True)
class Document:
    """One text, as its source gave it."""

    text: str
    source: str
    """The file, hub dataset or part of the embedded text it comes from."""
    index: int
    """Its number in the source, from 0."""
    is_chat: bool = False
    """Whether the text is a chat: its messages in JSON, or what a chat template made of them."""

    def digest(self) -> bytes:
        """SHA-256 of the text, as `utf8` gives it."""
        return hashlib.sha256(self.utf8()).digest()

    def utf8(self) -> bytes:
        """The text's bytes.

        Raises:
            UserError: If the text is not valid Unicode (a lone surrogate, as JSON can spell one).
        """
        try:
            return self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"data.sources: {self.source} document {self.index}: holds a lone surrogate,"
                " expected valid Unicode; remove it"
            ) from error


def split_text(text: str, max_chars: int = _DOCUMENT_CHARS) -> Iterator[str]:
    """Pieces of `text`, each of at most `max_chars`, cut after a blank line, a line or a space.

    The pieces joined are the text. A cut inside a word is made only where there is no space at all.
    """
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, start, end)
            if found != -1:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
