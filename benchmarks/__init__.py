"""Speed of the kernels against plain torch and against what this machine can do at most.

    python -m pytest benchmarks -p benchmarks.harness.ledger --benchmark-only --results=out/bench.json
    embedfuse bench report out/bench.json    # out/bench.md and plots
    python -m benchmarks.gpu.run --out out       # on a GPU: correctness first, part by part

On a machine with a GPU the ops run there, else on the CPU. -k picks some: -k "linear and cpp".
"""
