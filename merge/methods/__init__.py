"""How vectors are thinned, gated and joined: TIES, DARE and the gate, one file each."""
