"""Did the new language arrive, and did the chat survive?"""

from evaluation.config import EvaluationConfig

__all__ = ["EvaluationConfig"]
