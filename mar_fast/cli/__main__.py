"""For torchrun: ``torchrun --nproc-per-node 8 -m mar_fast.cli train ...``."""

from . import main

if __name__ == "__main__":
    main()
