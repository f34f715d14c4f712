"""Old path of embedfuse.integrations.sentence_transformers.cross_encoder."""

from embedfuse.deprecation import warn_moved
from embedfuse.integrations.sentence_transformers.cross_encoder import *  # noqa: F403

warn_moved(__name__, "embedfuse.integrations.sentence_transformers.cross_encoder")
