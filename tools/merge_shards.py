"""Make one ordinary file of a checkpoint with a folder of shards."""

from alimm.analysis.merge_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
