"""`python -m vimoe VERB ...`: the command line for launchers that start a module, such as `torchrun -m vimoe`."""

from __future__ import annotations

import sys

from vimoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
