"""Render Han characters from freely licensed fonts, fetched without root, where alimm looks for them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alimm.datasets.prepare_han_glyphs import main

if __name__ == "__main__":
    sys.exit(main())
