"""The keys of the recipe that decide which conversations are read, and how."""

from __future__ import annotations

from typing import Any, ClassVar

from cpt_merge.core.config import JsonFields, Section, key
from cpt_merge.data.conversations_source import NOT_OF_CONVERSATIONS, ChatSource
from cpt_merge.data.conversations_template import Thinking
from cpt_merge.data.sources import is_in_share


class ConversationsConfig(Section):
    """Conversations, and how they become a token store."""

    section: ClassVar[str] = "finetune"  # of the recipe, which messages name

    sources: list[ChatSource] = key(..., "the conversations", min_length=1)
    heldout: float = key(
        0.01,
        "share of the conversations, by the hash of what is asked before the first reply, that "
        "training never reads",
        gt=0,
        lt=0.5,
    )
    thinking: Thinking = key(
        "keep",
        "keep: thoughts of replies are trained, where conversations have some; remove: none is",
    )
    chat_template_kwargs: JsonFields = key(
        {}, "variables of the chat template, such as {enable_thinking: false}"
    )
    processes: int | None = key(
        None,
        "processes that render and tokenise conversations; if not set, one per core, and fewer for "
        "little text",
        gt=0,
    )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is in the store, for the key of a stage."""
        sources = {"__all__": set(NOT_OF_CONVERSATIONS) | {"epochs"}}
        kept = {"heldout", "thinking", "chat_template_kwargs"}
        return {
            **self.model_dump(include=kept),
            **self.model_dump(include={"sources"}, exclude={"sources": sources}),
        }

    def is_heldout(self, prompt: str) -> bool:
        """Whether the conversations that begin with this prompt are held out."""
        return is_in_share(prompt, self.heldout)
