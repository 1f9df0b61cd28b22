"""The recipe, the pipeline of stages and the command line."""
