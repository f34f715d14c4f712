"""`import embedfuse` loads no model library and changes nothing outside itself."""

import json
import re
import subprocess
import sys
from importlib import metadata

import embedfuse

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


def test_dir_lists_what_is_loaded_on_first_use():
    assert {"Embedder", "losses", "__version__", *embedfuse.__all__} <= set(dir(embedfuse))
    assert all(getattr(embedfuse, name) is not None for name in embedfuse.__all__)


def test_version(monkeypatch):
    assert re.match(r"\d+", embedfuse.__version__)

    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", lambda package: f"1.2.3 of {package}")
    assert embedfuse.__version__ == "1.2.3 of embedfuse"
    monkeypatch.setattr(metadata, "version", missing)
    assert embedfuse.__version__ == "0+source"
