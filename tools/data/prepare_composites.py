"""Make the composite set of drawn and photographic cut-outs and put it where alimm looks for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alimm.projects.dcaa.composites import main

if __name__ == "__main__":
    sys.exit(main())
