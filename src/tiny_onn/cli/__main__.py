"""Run the command line as `tiny-onn`, or as `python -m tiny_onn.cli`."""

import sys

from tiny_onn.cli.importing import leaving_at_once


def main() -> int:
    """Import the command line, run one command and return its exit status."""
    with leaving_at_once():
        from tiny_onn.cli.main import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
