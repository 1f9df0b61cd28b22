"""How vectors are thinned, gated and joined: TIES, DARE, the gate and slerp, one file each."""
