"""One file per claim, behind `rporec bench`. Each offers `run()`, which returns `benchmarks.result.result(…)`.

`QUICK`, where a module has it, holds the arguments of a `run` that takes less time: `rporec bench NAME --quick`.
"""

import os
import shutil

# As the roles have it in a run, and before anything imports torch. CPU-seconds of threads that wait for each
# other would count the waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it looked for a GPU
