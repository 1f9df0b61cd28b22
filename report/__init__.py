"""One view of a run: in the terminal and as a self-contained HTML page."""
