"""Old path of embedfuse.integrations.flag_embedding.wrapper."""

from embedfuse.deprecation import warn_moved
from embedfuse.integrations.flag_embedding.wrapper import *  # noqa: F403
from embedfuse.integrations.flag_embedding.wrapper import FlagWrapper as FlagHolder  # noqa: F401
from embedfuse.integrations.probe import PROBE_TEXTS  # noqa: F401

warn_moved(__name__, "embedfuse.integrations.flag_embedding.wrapper")
