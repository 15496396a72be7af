"""What crosses the borders between layers and processes: requests in, outputs out. All frozen.

These are msgspec structs, so that the same objects are passed in memory (offline) and as MessagePack
(engine process).
"""

from __future__ import annotations

import msgspec


class RequestError(ValueError):
    """What a client asked for cannot be done; the message says what was wrong and what is allowed."""


class QueueFullError(RuntimeError):
    """The engine holds as many requests as it may; the client should try again later."""


MIN_TEMPERATURE = 1e-3  # below it sampling is greedy: logits divided by less leave the range of float32


class EngineError(RuntimeError):
    """The fault is ours; the message is one that clients may read."""


class Guide(msgspec.Struct, frozen=True):
    """What a guided answer must look like.

    kind: one of GUIDE_KINDS; text: the schema, expression or grammar (empty for `json`).
    """

    kind: str
    text: str = ""


GUIDE_KINDS = ("json", "json_schema", "regex", "ebnf_grammar", "choice", "structural_tag")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one prompt are chosen, and when to stop. Names and defaults are vLLM's.

    n: number of answers. best_of: samples of which the n with the highest log-probability are returned;
    None: n.
    temperature: 0 (and all below MIN_TEMPERATURE) is greedy; 1 samples from the model's own distribution.
    top_k: keep the k most likely tokens; 0 and -1 keep all.
    top_p: keep the smallest set of tokens whose probabilities add up to top_p.
    min_p: keep tokens at least min_p times as likely as the most likely one.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt or
    answer.
    presence_penalty, frequency_penalty: taken from the logits of tokens in the answer: once, and for each
    occurrence.
    seed: the same seed and prompt give the same tokens in any company; None draws one.
    max_tokens: at most so many new tokens; None: the rest of the context, as far as the settings allow.
    min_tokens: end-of-sequence tokens and stop texts do not count before so many new tokens.
    stop, stop_token_ids: texts and tokens that end the answer; cut off its text unless
    include_stop_str_in_output.
    ignore_eos: go on after an end-of-sequence token.
    end_id: the end-of-sequence token; None: the model's own, -1: none.
    bad_words: texts that are never said. allowed_token_ids: nothing else is said.
    logit_bias: added to the logits of tokens, by id; word_bias: to those of all tokens of a text.
    logprobs: log-probabilities of the sampled tokens and of so many likeliest ones; prompt_logprobs: the
    same for the prompt; None: off.
    beam_width: beam search of so many beams, 1: none; length_penalty: a beam's score is divided by its
    length to this power;
        early_stopping: end as soon as beam_width beams have ended.
    guide: what the answer must look like.
    skip_special_tokens: special tokens do not show in the text.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    end_id: int | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    word_bias: dict[str, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    guide: Guide | None = None
    skip_special_tokens: bool = True

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple, empty ones left out."""
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(text for text in texts if text)

    @property
    def num_sequences(self) -> int:
        """How many sequences run for the prompt."""
        return max(self.n, self.best_of or 0, self.beam_width)

    @property
    def picks_best(self) -> bool:
        """True if the answers are known only when all sequences have ended."""
        return self.beam_width > 1 or self.num_sequences > self.n


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt on its way through the engine.

    number: unique among all clients of an engine; request_id: the client's own name, not necessarily
    unique.
    stream: outputs as tokens come; otherwise one output per sequence, at its end.
    arrival_ns, deadline_ns: on the monotonic clock that all processes of a machine share; 0: now, and
    never.
    priority: lower runs sooner and is preempted later. salt: prompts with different salts share no cached
    blocks. lora_name: the adapter that the model has for it, if any. user: of the same priority, different
    users take turns. traceparent: the trace that the client has begun, if any.
    context_logits, generation_logits: return the logits of the prompt's, and of the sampled positions.
    timings: outputs tell their Timings.
    """

    number: int
    prompt_ids: list[int]
    params: SamplingParams
    request_id: str = ""
    stream: bool = False
    arrival_ns: int = 0
    deadline_ns: int = 0
    priority: int = 0
    salt: str = ""
    lora_name: str = ""
    user: str = ""
    traceparent: str = ""
    context_logits: bool = False
    generation_logits: bool = False
    timings: bool = False


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a token under the model's own distribution, its rank there (1: the likeliest), and
    the likeliest tokens.
    """

    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """What happened to a request when (ns on the monotonic clock, 0: not yet), how many KV blocks its prompt
    took, and how many of its tokens were guessed, and rightly.
    """

    arrival_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    reused_blocks: int = 0
    new_blocks: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence.

    index: which of the request's answers. ids: the new token ids. scores: one for each of them, if asked
    for.
    num_cut: bytes at the end of the tokens' text that do not belong to the answer (a stop text, and what
    came after it).
    finish_reason: empty, or in the last output of a sequence `stop`, `length`, `cancelled` or `timeout`.
    prompt_scores, context_logits: in the first output of answer 0; one score for each token of the prompt
    but the first.
    context_logits, generation_logits: float32 bytes [prompt tokens, vocabulary], [ids, vocabulary].
    """

    number: int
    index: int
    ids: list[int]
    num_cut: int = 0
    finish_reason: str = ""
    num_cached_tokens: int = 0
    cumulative_logprob: float = 0.0
    scores: list[TokenScore] = []
    prompt_scores: list[TokenScore] = []
    context_logits: bytes = b""
    generation_logits: bytes = b""
    timings: Timings = Timings()


class EngineInfo(msgspec.Struct, frozen=True):
    """What clients of an engine need to know of it. model: the model directory. device: cpu or cuda.

    num_blocks, block_size: KV cache.
    """

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    pad_id: int
    device: str
    num_blocks: int
    block_size: int
    allows_logits: bool
