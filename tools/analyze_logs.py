"""Plot the figures of training logs, or show where the time went."""

from alimm.analysis.analyze_logs import main

if __name__ == "__main__":
    raise SystemExit(main())
