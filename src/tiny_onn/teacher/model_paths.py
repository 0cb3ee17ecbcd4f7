"""The meaning of a model's name, which is a local folder or a hub id that can be read.

A hub id looks like a relative path, and a mistyped path looks like a hub id. A name that is neither
a local folder nor in the local hub cache is therefore looked for on the hub only if it is spelt
like a hub id and the hub answers within `HUB_WAIT_S`; transformers alone would try for half a
minute.
"""

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tiny_onn.errors import UserError, printable

HUB_WAIT_S = 5.0


def find_model(name: str, field: str, revision: str = "main") -> str:
    """Return the folder that a name means, `~` expanded, or the name itself if it is a hub id.

    Args:
        name: a folder or a hub id.
        field: the setting or argument that holds the name, for messages.
        revision: the branch, tag or commit of a hub id.

    Raises:
        UserError: the name means a file, or neither a local folder nor a hub id that can be read.
    """
    try:
        path = Path(name).expanduser()
        found = bool(name) and path.is_dir()
    except (RuntimeError, OSError, ValueError) as error:
        # The user has no home, the name is too long for a path, or it holds a null character.
        reason = getattr(error, "strerror", None) or error
        raise _missing(name, field, f"it is no path ({reason})") from error
    if found:
        return str(path)
    if path.is_file():
        raise UserError(
            f"{field}: got {name}, a file, expected a folder with a model; name the "
            "folder it lies in"
        )
    where = no_folder(str(path))
    if not _may_be_hub_id(name):
        raise _missing(name, field, where)
    if try_to_load_from_cache(name, "config.json", revision=revision) is not None:
        return name
    # A name whose first part is a local folder is a mistyped path rather than a hub id.
    if "/" in name and Path(name.partition("/")[0]).is_dir():
        raise _missing(name, field, where)
    if (reason := _unreachable()) is not None:
        raise _missing(
            name,
            field,
            f"{where}, and as a hub id it is not in the local cache ({constants.HF_HUB_CACHE}) at "
            f"revision {printable(revision)} and {reason}",
        )
    return name


def no_folder(name: str) -> str:
    """Return a clause that says where a folder was looked for and is not."""
    return f"no folder {printable(str(Path(name).absolute()))[:400]} is there"


def _may_be_hub_id(name: str) -> bool:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _unreachable() -> str | None:
    """Return why the hub cannot be reached; None if it answers or a proxy leaves that unknown."""
    if constants.HF_HUB_OFFLINE:
        return "the hub may not be asked (HF_HUB_OFFLINE is set)"
    proxies = urllib.request.getproxies()
    # Python's own client cannot use a SOCKS proxy, but the hub's client may.
    if "all" in proxies or any(proxy.startswith("socks") for proxy in proxies.values()):
        return None
    failures: list[str | None] = [f"{constants.ENDPOINT} did not answer in {HUB_WAIT_S:g} s"]

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_WAIT_S):
                failures.append(None)
        except urllib.error.HTTPError:
            failures.append(None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            # The hub's own client may accept a certificate that Python's client refuses.
            answered = isinstance(reason, ssl.SSLError)
            failures.append(None if answered else f"{constants.ENDPOINT} could not be reached")

    # A silent name server delays a request beyond the timeout of its connection.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_WAIT_S)
    return failures[-1]


def _missing(name: str, field: str, reason: str) -> UserError:
    # A student has one teacher, and another model is of no use to it.
    embedded = "" if field == "--teacher" else " or embedded, the model among the packages"
    return UserError(
        f"{field}: got {printable(name)[:200]}, expected a folder with a model, which is not there "
        f"({reason}); check the path, or use a local folder{embedded}; a hub id needs a network or "
        "a local cache"
    )
