"""The one exception for mistakes a user can mend, and what libraries raise on damaged files."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# What transformers, tokenizers and safetensors raise on folders that are not what they should be.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


def reason_of(error: BaseException) -> str:
    """What a library's exception says, in part of one line."""
    text = " ".join(str(error).split())
    if len(text) > 240:
        text = text[:240].rstrip() + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class UserError(ValueError):
    """Bad input in one line: what, got, expected, remedy. The CLI prints it and exits with 2."""
