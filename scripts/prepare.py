"""Brings a model into the cache and converts it, before the first server starts: what serve.sh would do then.

python scripts/prepare.py MODEL [--cache-dir FOLDER]     MODEL as serve.sh's --model; "": the embedded one
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from pagetide.config import Settings
from pagetide.models.config import UnsupportedModelError
from pagetide.models.source import find_model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model of the hub, a folder or a GGUF file; empty: the embedded one")
    parser.add_argument("--cache-dir", default=Settings().cache_dir, help="as serve.sh's")
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, cache_dir=arguments.cache_dir)
    try:
        print(find_model(settings.model, settings.cache_path))
    except (OSError, UnsupportedModelError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
