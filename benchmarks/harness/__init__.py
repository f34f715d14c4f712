"""How calls are timed, and how results are stored and shown."""
