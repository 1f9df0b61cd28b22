"""Initialisation methods for new rows, one in a file.

A new one is a file here, an entry and a name in the config.
"""

from cpt_merge.tokenizer_ext.embeddings.config import Method
from cpt_merge.tokenizer_ext.embeddings.methods.auto import auto
from cpt_merge.tokenizer_ext.embeddings.methods.constituents import constituents
from cpt_merge.tokenizer_ext.embeddings.methods.ends import ends
from cpt_merge.tokenizer_ext.embeddings.methods.focus import focus
from cpt_merge.tokenizer_ext.embeddings.methods.gaussian import gaussian
from cpt_merge.tokenizer_ext.embeddings.methods.isotropic import isotropic
from cpt_merge.tokenizer_ext.embeddings.methods.mean import mean
from cpt_merge.tokenizer_ext.embeddings.methods.method import Initialiser

INITIALISERS: dict[Method, Initialiser] = {
    "auto": auto,
    "constituents": constituents,
    "ends": ends,
    "focus": focus,
    "mean": mean,
    "gaussian": gaussian,
    "random": isotropic,
}
