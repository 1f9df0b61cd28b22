"""The ratio sweep: merge the chat vector at one ratio after the other in memory, and measure."""
