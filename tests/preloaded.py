"""Imported once by the process that the ranks of `run_ranks` are forked from, so that they start fast."""

import gc

import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.training.runs  # noqa: F401

gc.collect()
gc.freeze()  # a forked process need not look at these objects again
