"""The checkpoint as the CTranslate2 server takes it: the peer's model, with the checkpoint's tokenizers beside it.

    python -m bench.load.convert CHECKPOINT FOLDER PRECISION

Run in the environment that has ctranslate2.
"""

import shutil
import sys
from pathlib import Path

from bench.load.options import Precision
from bench.load.peer import build_peer


def convert(checkpoint: Path, folder: Path, precision: Precision) -> None:
    """Write the folder, in place of one that is there."""
    shutil.rmtree(folder, ignore_errors=True)
    build_peer(checkpoint, folder, precision.value)
    for side in ("source", "target"):
        shutil.copy(checkpoint / f"tokenizer.{side}.json", folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Precision(sys.argv[3]))
