"""Speed of embedfuse, compared with plain torch, with other libraries and with the limits of the machine.

    python -m pytest benchmarks -p benchmarks.harness.record --benchmark-only --results=out/bench.json
    python -m benchmarks report out/bench.json    # out/bench.md and plots
    python -m benchmarks gpu --out out            # on a GPU: everything, in one run

On a machine with a GPU the ops run there, otherwise on the CPU. -k selects some: -k "linear and cpp".
"""
