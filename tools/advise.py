"""Advise on a classifier of very many classes: what each method costs, as a model and as measured here."""

from alimm.analysis.advise import main

if __name__ == "__main__":
    raise SystemExit(main())
