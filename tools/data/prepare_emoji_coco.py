"""Make the small detection set EmojiCoco out of the packaged EmojiProducts and put it where alimm looks for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alimm.datasets.prepare_emoji_coco import main

if __name__ == "__main__":
    sys.exit(main())
