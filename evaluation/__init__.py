"""Did the new language arrive, and did the chat survive?"""

from cpt_merge.evaluation.config import EvaluationConfig

__all__ = ["EvaluationConfig"]
