"""`python -m w2wpp`, and `python path/to/pack/w2wpp` from any folder, with any Python that has PyTorch."""

import sys
from pathlib import Path

if not __package__:
    # Run by its path: Python, isolated or not, put this very folder in front, where our rooms would hide the modules
    # of others (codecs, files). Its parent is where new processes of ours find the package, too.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from w2wpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
