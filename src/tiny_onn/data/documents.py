"""Documents, which are the unit of the data split, and the cutting of long texts into them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_onn.errors import UserError

_DOCUMENT_CHARS = 64_000


@dataclass(frozen=True, slots=True)
class Document:
    """A text as its source holds it, or a chat that was rendered to text."""

    text: str
    source: str
    """The file, hub dataset or part of the embedded text it comes from."""
    index: int
    """The document's number in the source, from 0."""
    is_chat: bool = False
    """True if the text is a chat's messages in JSON, or was rendered from them."""

    def digest(self) -> bytes:
        """Return the SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.utf8()).digest()

    def utf8(self) -> bytes:
        """Return the text in UTF-8.

        Raises:
            UserError: the text holds a lone surrogate, which JSON can spell and Unicode forbids.
        """
        try:
            return self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"data.sources: {self.source} document {self.index}: holds a lone surrogate,"
                " expected valid Unicode; remove it"
            ) from error


def split_text(text: str, max_chars: int = _DOCUMENT_CHARS) -> Iterator[str]:
    """Yield pieces of `text` of at most `max_chars`, cut after a blank line, a line or a space.

    The joined pieces are the text. A word is cut only where a piece holds no space at all.
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
