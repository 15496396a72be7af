"""How far greedy answers in bfloat16 agree with those of transformers in bfloat16 and in float32: Pagetide
beside other engines of scripts/peers.sh, 32 prompts of English text, 32 tokens each.

python scripts/agreement.py [openvino] [vllm]

equal: tokens before the first that differs (mean); whole: answers of which all 32 are equal.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from engines import CACHE, peer_command, peer_environment
from pagetide.llm import LLM
from pagetide.models.source import find_model
from pagetide.types import SamplingParams

NUM_TOKENS = 32
SUBJECTS = [
    "The tide",
    "A lighthouse",
    "The harbour of Lisbon",
    "Salt",
    "The moon",
    "An old sailor",
    "Wind",
    "A river",
]
PHRASES = ["changes every day because", "is known for its", "was described as", "can be explained by"]


def transformers_tokens(model: Path, dtype: str, prompts: list[list[int]]) -> list[list[int]]:
    import torch  # after pagetide: one OpenMP runtime
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=getattr(torch, dtype)).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                pad_token_id=0,
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def pagetide_tokens(dtype: str, prompts: list[list[int]]) -> list[list[int]]:
    llm = LLM(cache_dir=CACHE, dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [result.outputs[0].token_ids for result in llm.generate(prompts, params)]


def peer_tokens(peer: str, prompts: list[list[int]]) -> list[list[int]]:
    jobs = [{"prompt": prompt, "num_tokens": NUM_TOKENS, "at": 0.0} for prompt in prompts]
    done = subprocess.run(
        peer_command(peer, ""),
        input=json.dumps(jobs) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env=peer_environment(peer),
        check=True,
    )
    return json.loads(done.stdout)["tokens"]


def num_equal(a: list[int], b: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))


def main() -> int:
    model = find_model("", Path(CACHE))
    tokenizer = LLM(cache_dir=CACHE).get_tokenizer()
    prompts = [tokenizer(f"{subject} {phrase}").input_ids for subject in SUBJECTS for phrase in PHRASES]
    references = {dtype: transformers_tokens(model, dtype, prompts) for dtype in ("bfloat16", "float32")}
    found = {"pagetide": pagetide_tokens("bfloat16", prompts)}
    found |= {peer: peer_tokens(peer, prompts) for peer in sys.argv[1:]}
    found["transformers"] = references["bfloat16"]
    print("| in bfloat16 | equal to transformers in bfloat16 | whole | in float32 | whole |")
    print("|" + " --- |" * 5)
    for engine, answers in found.items():
        cells = [engine]
        for reference in references.values():
            equal = [num_equal(a, b) for a, b in zip(answers, reference, strict=True)]
            cells += [f"{statistics.mean(equal):.1f}", str(sum(count == NUM_TOKENS for count in equal))]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
