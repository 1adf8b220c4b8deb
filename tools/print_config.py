"""Print a whole config, or what differs between two."""

from alimm.analysis.print_config import main

if __name__ == "__main__":
    raise SystemExit(main())
