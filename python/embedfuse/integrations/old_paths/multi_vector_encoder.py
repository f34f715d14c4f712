"""Old path of embedfuse.integrations.sentence_transformers.scoring."""

from embedfuse.deprecation import warn_moved
from embedfuse.integrations.sentence_transformers import scoring  # noqa: F401 - its error names the extra
from embedfuse.integrations.sentence_transformers.multi_vector import *  # noqa: F403
from embedfuse.integrations.sentence_transformers.scoring import *  # noqa: F403

warn_moved(__name__, "embedfuse.integrations.sentence_transformers.scoring")
