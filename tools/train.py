"""`python tools/train.py` is `alimm train`, from a checkout, in any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alimm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
