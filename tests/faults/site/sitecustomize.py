"""On PYTHONPATH of processes that are to meet faults; see `injected.py`."""

import json
import os
import sys
from pathlib import Path

if os.environ.get("INJECTED_FAULTS"):
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import injected

    sys.path.pop(0)
    injected.install(json.loads(os.environ["INJECTED_FAULTS"]))
