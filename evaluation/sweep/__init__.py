"""The ratio sweep: the chat vector at one ratio after the other, in memory, and what becomes of the chat model."""
