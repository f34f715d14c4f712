"""Speed of the kernels against plain torch and against what this machine can do at most.

    python -m pytest benchmarks --benchmark-only --benchmark-json=out/bench.json
    embedfuse bench report out/bench.json             # out/bench.md and out/bench.png

On a machine with a GPU the ops run there, else on the CPU. -k picks some: -k "linear and cpp".
"""
