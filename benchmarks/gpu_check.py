"""Checks kdlib on this machine, on its CUDA card where it has one: the same as `kdlib doctor --self-test`.

python -m benchmarks.gpu_check [--out DIR]
"""

import sys

from kdlib import cli

if __name__ == "__main__":
    sys.exit(cli.main(["doctor", "--self-test", *sys.argv[1:]]))
