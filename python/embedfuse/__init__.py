"""embedfuse: embedding models, faster, in place."""

from embedfuse import ops
from embedfuse.registry import BackendError, use_backend

__all__ = ["BackendError", "ops", "use_backend"]
