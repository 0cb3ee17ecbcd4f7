"""The one exception for mistakes a user can mend, and what libraries raise on damaged files."""

from collections.abc import Callable


def load_errors() -> tuple[type[Exception], ...]:
    """What transformers, tokenizers and safetensors raise on a model folder that is damaged.

    Call it in the `except` clause itself, which is evaluated when something has been raised.
    """
    # Every command imports this module, and the hub's errors bring an HTTP client along: 70 ms.
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
    """What a library's exception says, in part of one line."""
    text = reason_line(error)
    if len(text) > 240:
        text = text[:240].rstrip() + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reason_line(error: BaseException) -> str:
    """An exception's text in one line that a terminal shows as it is."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """The text with what a terminal would obey or cannot show (control characters) escaped."""
    if text.isprintable():
        return text
    shown = (
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in text
    )
    return "".join(shown)


class LoadErrors:
    """A context in which what libraries raise on damaged files becomes one line.

    Args:
        explain: makes the line from the library's reason.
    """

    def __init__(self, explain: Callable[[str], str]) -> None:
        self._explain = explain

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError):
            return
        # tokenizers raises Exception itself on files it cannot parse, and panics on some.
        damaged = isinstance(error, load_errors()) or type(error) is Exception
        if damaged or type(error).__name__ == "PanicException":
            raise UserError(self._explain(reason_of(error))) from error


class UserError(ValueError):
    """Bad input in one line: what, got, expected, remedy. The CLI prints it and exits with 2."""
