"""`python -m hf_effml`, which is the command `hf-effml`."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
