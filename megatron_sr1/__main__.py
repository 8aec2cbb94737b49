"""`python -m megatron_sr1` is `megatron-sr1`."""

import sys

from megatron_sr1.cli import main

if __name__ == "__main__":
    sys.exit(main())
