"""How well real tokenizers meet on real text, and how long aligning 100 kB takes.

    python -m benchmarks.alignment FOLDER      (a folder with tokenizers/ and texts/, see RESULTS.md)

Prints the table of RESULTS.md: per pair and text the share of the student's positions that are aligned by bytes, the share
that index pairs would get right, and seconds to encode with both tokenizers and to align (median of 5).
"""

import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from kdlib.align import boundaries
from kdlib.data import tokenize
from kdlib.data.corpus import Document
from kdlib.models import loading

SIZE = 100_000


def main(folder):
    folder = Path(folder)
    readers = {
        path.name: loading.load_reader(str(path), "tokenizer") for path in sorted((folder / "tokenizers").iterdir())
    }
    print("| student | teacher | text | aligned by bytes | right by index | encode both | align |")
    print("|---|---|---|---|---|---|---|")
    for ours, theirs in itertools.permutations(readers, 2):
        for path in sorted((folder / "texts").glob("*.txt")):
            text = path.read_text(encoding="utf-8")[:SIZE]
            aligned, by_index, encode_s, align_s = measure(text, readers[ours], readers[theirs])
            print(
                f"| {ours} | {theirs} | {path.stem} | {aligned:.1%} | {by_index:.1%} "
                f"| {1e3 * encode_s:.0f} ms | {1e3 * align_s:.1f} ms |"
            )


def measure(text, ours, theirs):
    """Shares, and seconds: `tokenize.encode` tokenises and finds the spans; `boundaries.align` pairs them."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        coded = [tokenize.encode(Document(text), reader) for reader in (ours, theirs)]
        middle = time.perf_counter()
        found = boundaries.align(*coded)
        seconds.append((middle - started, time.perf_counter() - middle))
    same = np.intersect1d(np.arange(min(map(len, coded))), found.student[found.student == found.teacher])
    return len(found) / len(coded[0]), len(same) / len(coded[0]), *map(statistics.median, zip(*seconds, strict=True))


if __name__ == "__main__":
    main(sys.argv[1])
