"""Count the multiply-adds and parameters of a config's model."""

from alimm.analysis.get_flops import main

if __name__ == "__main__":
    raise SystemExit(main())
