"""Turn a language model's ONNX graph into quantized weights: calibrate, plan, search."""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and __path__[0] != f"{sys.path[0]}{os.sep}{__name__}":
    # python -m looks in the current folder first, where a file export.py or json.py of the user's would stand in for
    # a package of ours or another's.
    del sys.path[0]
