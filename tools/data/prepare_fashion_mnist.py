"""Fetch Fashion-MNIST (31 MB) without root, check it and put it where alimm looks for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alimm.datasets.prepare_fashion_mnist import main

if __name__ == "__main__":
    sys.exit(main())
