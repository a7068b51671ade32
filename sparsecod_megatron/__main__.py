"""`python -m sparsecod_megatron` is the `sparsecod` command; torchrun starts ranks this way."""

import sys

from sparsecod_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
