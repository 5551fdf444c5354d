"""How a 64-bit hash is cut into random numbers for dropout (dropout.py and its Triton kernel)."""

LANES = 4  # numbers of 16 bits in one hash
STEPS = 1 << 16
