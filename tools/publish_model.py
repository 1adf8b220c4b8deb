"""Publish a checkpoint: weights only, named by its sha256."""

from alimm.analysis.publish_model import main

if __name__ == "__main__":
    raise SystemExit(main())
