"""Old path of embedfuse.integrations.sentence_transformers.losses."""

from embedfuse.deprecation import warn_moved
from embedfuse.integrations.sentence_transformers.losses import *  # noqa: F403

warn_moved(__name__, "embedfuse.integrations.sentence_transformers.losses")
