"""Entry point of `python -m hf_camphive`, which is the command line `camphive`."""

import sys

from hf_camphive.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
