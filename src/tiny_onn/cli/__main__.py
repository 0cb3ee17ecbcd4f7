"""Run the command line as `python -m tiny_onn.cli`."""

import sys

from tiny_onn.cli.main import main

sys.exit(main())
