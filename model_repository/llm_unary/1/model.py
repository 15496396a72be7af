import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "backend_src"))

from pagetide.serving.llm import LlmModel as TritonPythonModel  # noqa: F401
