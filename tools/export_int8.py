"""Write the forward of a model that was trained in INT8 as ONNX with QDQ, and the scales of its layers as JSON."""

import sys

from alimm.cli import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded("alimm.projects.int8_training.export", "main", None))
