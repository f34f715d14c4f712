"""Old path of embedfuse.integrations.flag_embedding.llm."""

from embedfuse.integrations.flag_embedding.llm import *  # noqa: F403
from embedfuse.integrations.old_paths import warn_moved

warn_moved(__name__, "embedfuse.integrations.flag_embedding.llm")
