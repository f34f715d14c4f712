"""Old path of embedfuse.integrations.flag_embedding.losses."""

from embedfuse.deprecation import warn_moved
from embedfuse.integrations.flag_embedding.losses import *  # noqa: F403

warn_moved(__name__, "embedfuse.integrations.flag_embedding.losses")
