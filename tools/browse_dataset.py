"""Draw samples of a data set as a contact sheet."""

from alimm.analysis.browse_dataset import main

if __name__ == "__main__":
    raise SystemExit(main())
