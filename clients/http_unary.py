"""One whole answer over HTTP with plain infer(), from the model that answers each request once.

python clients/http_unary.py "The tide rises because" [--url 127.0.0.1:8000] [--max-tokens 50]
[--temperature 0.7]
"""

from __future__ import annotations

import argparse

import numpy as np
import tritonclient.http as http


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()

    values = {
        "text_input": (np.array([[arguments.prompt.encode()]], dtype=np.object_), "BYTES"),
        "max_tokens": (np.array([[arguments.max_tokens]], dtype=np.int32), "INT32"),
        "temperature": (np.array([[arguments.temperature]], dtype=np.float32), "FP32"),
    }
    inputs = []
    for name, (array, kind) in values.items():
        inputs.append(http.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    with http.InferenceServerClient(arguments.url, network_timeout=600) as client:
        result = client.infer("ensemble_unary", inputs)
    print(result.as_numpy("text_output")[0].decode())


if __name__ == "__main__":
    main()
