"""`import embedfuse` loads no model library and changes nothing outside itself."""

import json
import subprocess
import sys

SCRIPT = """
import json, logging, os, sys, warnings
import torch

def state():
    return {
        "filters": list(map(str, warnings.filters)),
        "environment": dict(os.environ),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "seed": torch.initial_seed(),
        "handlers": list(map(str, logging.root.handlers)),
        "showwarning": warnings.showwarning.__module__,
        "recursion": sys.getrecursionlimit(),
        "excepthook": str(sys.excepthook),
    }

modules, before = set(sys.modules), state()
import embedfuse
print(json.dumps({
    "before": before, "after": state(),
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
    "cuda": torch.cuda.is_initialized(),
    "native": "embedfuse._cpu" in sys.modules,
}))
"""


def test_import_has_no_effects():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    seen = json.loads(run.stdout)
    assert seen["after"] == seen["before"]
    loaded = set(seen["loaded"])
    assert "embedfuse" in loaded
    assert loaded.isdisjoint(
        {"transformers", "sentence_transformers", "triton", "tokenizers", "peft"}
    )
    assert not seen["cuda"]
    assert not seen["native"]
