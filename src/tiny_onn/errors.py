"""The one exception for mistakes that a user can mend, and the errors of libraries."""

from collections.abc import Callable


def load_errors() -> tuple[type[Exception], ...]:
    """Return the errors of transformers, tokenizers and safetensors on a damaged model folder.

    Call this function in the `except` clause itself, which Python evaluates only after an error.
    """
    # Every command imports this module, and the hub's errors import an HTTP client, in 70 ms.
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from safetensors import SafetensorError  # noqa: PLC0415

    return (
        OSError,
        ValueError,
        LookupError,
        ImportError,
        RuntimeError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        MemoryError,
        SafetensorError,
        StrictDataclassError,
    )


def reason_of(error: BaseException) -> str:
    """Return the type and text of a library's exception as a part of one line."""
    text = reason_line(error)
    if len(text) > 240:
        text = text[:240].rstrip() + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reason_line(error: BaseException) -> str:
    """Return an exception's text in one line that a terminal shows unchanged."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Return the text with control characters escaped, which a terminal would obey or not show."""
    if text.isprintable():
        return text
    escaped = (
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in text
    )
    return "".join(escaped)


class LoadErrors:
    """A context in which a library's error on damaged files becomes a `UserError` of one line.

    Args:
        explain: the function that makes the line from the library's reason.
    """

    def __init__(self, explain: Callable[[str], str]) -> None:
        self._explain = explain

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        # tokenizers raises a plain Exception on files that it cannot parse, and panics on some.
        damaged = isinstance(error, load_errors()) or type(error) is Exception
        if damaged or type(error).__name__ == "PanicException":
            raise UserError(self._explain(reason_of(error))) from error


class UserError(ValueError):
    """Bad input, told in one line that names the field, what was got and expected, and a remedy.

    The CLI prints the line and exits with 2.
    """


class RankError(UserError):
    """A `UserError` that a process other than the first one found, and tells for all of them."""
