"""From an English base model, its chat sibling and text in a new language to a chat model in that language."""

__version__ = "0.1.0"
