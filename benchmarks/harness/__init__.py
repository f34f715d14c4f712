"""How calls are timed, stored and shown."""
