"""Show which classes a model takes for which."""

from alimm.analysis.confusion_matrix import main

if __name__ == "__main__":
    raise SystemExit(main())
