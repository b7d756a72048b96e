"""Fine-tune a Vision Mamba: `python train_vim.py --help`. The same as `vimtune train`."""

import sys

from vimtune.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
