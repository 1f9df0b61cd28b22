"""How vectors are thinned, gated and joined before they are added: TIES, DARE and the gate, one file each."""
