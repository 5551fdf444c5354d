"""The network, its parts and its files."""

import logging

# Where they are installed, transformers 5.23 imports torchao 0.18, and peft 0.21 bitsandbytes 0.50. Both warn
# of compiled parts for other hardware, and torch 2.13 of how torchao registers constants.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
