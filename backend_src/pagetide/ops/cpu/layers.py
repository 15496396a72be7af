"""All layers of the decoder in one call: the threads of one parallel region go through the phases of every
layer and wait for each other in between. Where several ranks share a model, a call has attention or MLP of
one layer, after which the ranks add up what they have.

phase of a layer    reads             writes
0 norm              residual          normed
1 adapters          normed            hidden
2 qkv               normed, hidden    qkv
3 rotary, write     qkv               queries, KV cache
4 attention         queries, KV       attended, parts
5 merge             parts             attended
6 round             attended          rounded
7 adapters          attended          hidden
8 out               attended, hidden  residual (added), or update
9 norm, add         update            residual (added)
10 norm             residual          normed
11 adapters         normed            hidden
12 gate, up         normed, hidden    gated
13 round            gated             rounded
14 adapters         gated             hidden
15 down             gated, hidden     residual (added), or update
16 norm, add        update            residual (added)

Only some models normalize what they add to the residual, and have an update for it.
Quantized matrices multiply what is rounded to 8 bits; norms round what they write themselves. Adapters have
their phases in steps with a token that has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.adapters import MATRICES, LayerAdapter
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.adapters import AdapterMemory, added_to, shrink
from pagetide.ops.cpu.attention import attend, merge
from pagetide.ops.cpu.attention_tasks import MAX_ROWS, plan_tasks
from pagetide.ops.cpu.block import ROOM
from pagetide.ops.cpu.codes import IS_HALF, join_codes, make_rounded, pack_codes
from pagetide.ops.cpu.compiled import HAS_BF16_DOT, as_numpy, borrowed, device_function, kernel
from pagetide.ops.cpu.kept import Keeper, no_keeper
from pagetide.ops.cpu.kv_tile import PAGE_HEADER
from pagetide.ops.cpu.matmul import prepare_rows, project, project_gated
from pagetide.ops.cpu.norm import add_normalized, normalize
from pagetide.ops.cpu.packing import GROUP, Packed, interleaved, pack, packed_dense
from pagetide.ops.cpu.rotary import write
from pagetide.ops.cpu.scratch import make_scratch
from pagetide.ops.cpu.sync import begin, finish, make_sync, num_concurrent_threads, phase_ticks
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.layers import LayerShape, LayerWeights, adapted_sizes
from pagetide.ops.weights import QuantizedWeight, Weight, rearranged

PHASES = (
    "norm",
    "adapters",
    "qkv",
    "rotary, write",
    "attention",
    "merge",
    "round",
    "adapters",
    "out",
    "norm, add",
    "norm",
    "adapters",
    "gate, up",
    "round",
    "adapters",
    "down",
    "norm, add",
)
_NUM_PHASES = len(PHASES)
_ATTENTION, _ADD_ATTENTION, _MLP, _ADD_MLP = range(4)  # the parts of a layer
_NUM_PARTS = 4


class Weights(NamedTuple):
    """All layers' weights, stacked; matrices packed, dense or quantized.

    A bias or norm that the model does not have is empty: [layers, 0].
    """

    attention_norm: np.ndarray  # float32 [layers, hidden]
    qkv: np.ndarray  # [layers, packed]
    qkv_forms: np.ndarray  # of Packed
    qkv_bias: np.ndarray  # float32 [layers, (H + 2K) * D]
    q_norm: np.ndarray  # float32 [layers, D]
    k_norm: np.ndarray
    windows: np.ndarray  # int64 [layers]
    rotary: np.ndarray  # int64 [layers]: which table
    post_attention_norm: np.ndarray  # float32 [layers, hidden]
    post_mlp_norm: np.ndarray
    out: np.ndarray
    out_forms: np.ndarray  # of Packed
    out_bias: np.ndarray
    mlp_norm: np.ndarray
    gate_up: np.ndarray  # 16 outputs of gate and 16 of up, in turn
    gate_up_forms: np.ndarray  # of Packed
    gate_up_bias: np.ndarray
    down: np.ndarray
    down_forms: np.ndarray  # of Packed
    down_bias: np.ndarray

    @property
    def first(self) -> Packed:
        """A matrix that has what all have: type, and whether it is quantized."""
        return Packed(self.qkv, self.qkv_forms)


class Activations(NamedTuple):
    """What passes from phase to phase, with room for whole tiles of rows.

    bfloat16, but for residual and qkv, where the processor has the product.
    """

    residual: np.ndarray  # float32 [rows, hidden]
    normed: np.ndarray  # [rows, hidden]
    qkv: np.ndarray  # float32 [rows, (H + 2K) * D, filled up to whole groups]
    queries: np.ndarray  # [rows, H, D]
    attended: np.ndarray  # [rows, H * D]
    gated: np.ndarray  # [rows, intermediate]
    update: np.ndarray  # float32 [rows, hidden], no rows where nothing of it is normalized


class Places(NamedTuple):
    """Where the step's tokens stand."""

    slots: np.ndarray  # int64 [t]
    positions: np.ndarray  # int64 [t]
    block_table: np.ndarray  # int32 [n, max_blocks]
    cos_sin: np.ndarray  # float32 [tables, max_len, D]


class Rules(NamedTuple):
    """What all layers compute with: of LayerShape and HeadShape."""

    eps: np.float32
    scale: np.float32
    soft_cap: np.float32
    is_gelu: bool


@kernel
def _run(sync, parts, adds, weights, adapters, acts, rounded, scratch, places, work, kv, rules):  # type: ignore[no-untyped-def]
    """parts: (first, last) of all layers' parts in turn. adds: to the residual, instead of taking its place
    with a rank's part of a sum.
    """
    for thread in prange(sync.shape[1]):
        own = borrowed((weights, adapters, acts, rounded, scratch, places, work))
        _run_thread(np.int64(thread), borrowed(sync), parts, adds, *own, borrowed(kv), rules)


@device_function
def _run_thread(  # type: ignore[no-untyped-def]
    thread, sync, parts, adds, weights, adapters, acts, rounded, scratch, places, work, kv, rules
):
    begin(sync, thread)
    own, t = (weights, adapters, acts, rounded, scratch), len(places.slots)
    for number in range(parts[0], parts[1]):
        layer, part = number // _NUM_PARTS, number % _NUM_PARTS
        if part == _ATTENTION:
            _attention(sync, thread, layer, adds, *own, places, work, kv, rules)
        elif part == _MLP:
            _mlp(sync, thread, layer, adds, *own, t, rules)
        elif part == _ADD_ATTENTION:
            _add_update(
                sync, layer * _NUM_PHASES + 9, thread, acts, t, weights.post_attention_norm[layer], rules
            )
        else:
            _add_update(sync, layer * _NUM_PHASES + 16, thread, acts, t, weights.post_mlp_norm[layer], rules)


@device_function
def _add_update(sync, phase, thread, acts, t, norm, rules):  # type: ignore[no-untyped-def]
    if norm.shape[0] > 0:
        add_normalized(sync, phase, thread, acts.update, t, norm, rules.eps, acts.residual)
        finish(sync, phase, thread)


@device_function
def _attention(sync, thread, layer, adds, weights, adapters, acts, rounded, scratch, places, work, kv, rules):  # type: ignore[no-untyped-def]
    phase, t, hidden = layer * _NUM_PHASES, len(places.slots), acts.residual.shape[1]
    residual, normed, attended, eps = acts.residual, acts.normed, acts.attended, rules.eps
    norm, bias = weights.attention_norm[layer], weights.qkv_bias[layer]
    matrix = Packed(weights.qkv, weights.qkv_forms)
    normalize(sync, phase, thread, residual, t, norm, eps, normed, matrix, layer, rounded)
    finish(sync, phase, thread)
    added = added_to(adapters, layer, hidden, adapters.qkv_down, adapters.qkv_up)
    _adapt(sync, phase + 1, thread, scratch, normed, rounded, t, added)
    project(sync, phase + 2, thread, normed, rounded, t, matrix, layer, hidden, bias, False, added, acts.qkv)
    finish(sync, phase + 2, thread)
    norms, turns = (weights.q_norm[layer], weights.k_norm[layer]), places.cos_sin[weights.rotary[layer]]
    heads = acts.queries
    write(
        sync, phase + 3, thread, scratch, acts.qkv, layer, kv, places, turns, norms, eps, rules.scale, heads
    )
    finish(sync, phase + 3, thread)
    table, window = places.block_table, weights.windows[layer]
    limit = rules.soft_cap
    attend(sync, phase + 4, thread, scratch, heads, layer, kv, table, work, window, limit, attended)
    finish(sync, phase + 4, thread)
    if len(work.merges):
        merge(sync, phase + 5, thread, scratch, work, heads.shape[2], attended)
        finish(sync, phase + 5, thread)
    matrix, bias = Packed(weights.out, weights.out_forms), weights.out_bias[layer]
    added = added_to(adapters, layer, attended.shape[1], adapters.out_down, adapters.out_up)
    _add_product(
        sync, phase + 6, thread, scratch, attended, rounded, t, matrix, layer, bias, adds, added, acts
    )


@device_function
def _mlp(sync, thread, layer, adds, weights, adapters, acts, rounded, scratch, t, rules):  # type: ignore[no-untyped-def]
    phase, hidden = layer * _NUM_PHASES, acts.residual.shape[1]
    residual, normed, gated = acts.residual, acts.normed, acts.gated
    norm, bias = weights.mlp_norm[layer], weights.gate_up_bias[layer]
    matrix, sums = Packed(weights.gate_up, weights.gate_up_forms), scratch.scores[thread].reshape(-1)
    normalize(sync, phase + 10, thread, residual, t, norm, rules.eps, normed, matrix, layer, rounded)
    finish(sync, phase + 10, thread)
    added = added_to(adapters, layer, hidden, adapters.gate_up_down, adapters.gate_up_up)
    _adapt(sync, phase + 11, thread, scratch, normed, rounded, t, added)
    is_gelu, operands = rules.is_gelu, (normed, rounded, t, matrix, layer, hidden)
    project_gated(sync, phase + 12, thread, sums, *operands, bias, added, is_gelu, gated)
    finish(sync, phase + 12, thread)
    matrix, bias = Packed(weights.down, weights.down_forms), weights.down_bias[layer]
    added = added_to(adapters, layer, gated.shape[1], adapters.down_down, adapters.down_up)
    _add_product(sync, phase + 13, thread, scratch, gated, rounded, t, matrix, layer, bias, adds, added, acts)


@device_function
def _adapt(sync, phase, thread, scratch, x, rounded, t, added):  # type: ignore[no-untyped-def]
    if added.adapters.active.shape[0] > 0:
        shrink(sync, phase, thread, scratch.scores[thread].reshape(-1), x, rounded, t, added)
        finish(sync, phase, thread)


@device_function
def _add_product(sync, phase, thread, scratch, x, rounded, t, weight, layer, bias, adds, added, acts):  # type: ignore[no-untyped-def]
    """residual += x @ weight.T + bias, or = if not adds, or update = where there is one, in three phases."""
    size = x.shape[1]
    if prepare_rows(sync, phase, thread, x, t, size, weight, layer, rounded):
        finish(sync, phase, thread)
    _adapt(sync, phase + 1, thread, scratch, x, rounded, t, added)
    has_update = acts.update.shape[0] > 0
    target = acts.update if has_update else acts.residual
    adds = adds and not has_update
    project(sync, phase + 2, thread, x, rounded, t, weight, layer, size, bias, adds, added, target)
    finish(sync, phase + 2, thread)


class CompiledLayers:
    """ops.layers.Layers on a CPU. may_share: sequences look together at keys that they share."""

    is_deterministic = True

    def __init__(self, shape: LayerShape, layers: Iterable[LayerWeights], keep: Keeper = no_keeper):
        self._shape = shape
        self._weights = Weights(**keep("layers", lambda: stack(shape, layers)))
        self.may_share = not self._weights.windows.any()
        self._cos_sin = shape.cos_sin.numpy()
        heads, is_gelu = shape.heads, shape.activation == "gelu"
        scale, soft_cap = np.float32(heads.scale), np.float32(heads.soft_cap)
        self._rules = Rules(np.float32(shape.eps), scale, soft_cap, is_gelu)
        num_parts, has_update = _NUM_PARTS * shape.num_layers, self._weights.post_mlp_norm.size > 0
        used = {_ATTENTION, _MLP} | ({_ADD_ATTENTION, _ADD_MLP} if has_update else set())
        each = [(number, number + 1) for number in range(num_parts) if number % _NUM_PARTS in used]
        self._calls = [(0, num_parts)] if shape.comm.size == 1 else each
        self._num_threads = num_concurrent_threads()
        self._adapters = _adapter_memory(shape, self._weights)
        self._activations: Activations | None = None
        self._rounded = make_rounded(0, 0)
        self._sync = make_sync(_NUM_PHASES * shape.num_layers, self._num_threads)
        self._scratch = make_scratch(
            self._num_threads,
            shape.heads.head_dim,
            activation_type(self._weights.first),
            shape.kv_dtype is torch.uint8,
        )

    @property
    def block_shape(self) -> tuple[int, ...]:
        """[keys and values, KV heads, pages]: each head's tokens as attention's tiles take them."""
        heads, block_size = self._shape.heads, self._shape.block_size
        header = PAGE_HEADER * (block_size // PAGE) if self._shape.kv_dtype is torch.uint8 else 0
        return (2, heads.num_kv_heads, block_size * heads.head_dim + header)

    @property
    def ticks(self) -> np.ndarray:
        """What each phase of each layer took in the last call (sync.phase_ticks): int64 [layers, phases]."""
        return phase_ticks(self._sync).reshape(-1, _NUM_PHASES)

    def set_adapter(self, index: int, layers: Iterable[LayerAdapter]) -> None:
        self._adapters.set(index, layers)

    def __call__(self, residual: torch.Tensor, batch: Batch, pool: torch.Tensor) -> None:
        shape = self._shape
        t = len(residual)
        work = plan_tasks(batch, shape.heads, self._num_threads, self.may_share)
        places = Places(
            batch.slot_mapping.numpy(), batch.positions.numpy(), batch.block_table.numpy(), self._cos_sin
        )
        self._sync = sync = make_sync(_NUM_PHASES * shape.num_layers, self._num_threads)
        acts = self._make_room(t)
        acts.residual[:t] = residual.numpy()
        kv, rules = as_numpy(pool), self._rules
        adapters = self._adapters.of_step(batch.adapters, len(acts.residual))
        # Rank 0's part of a sum has what was there before.
        adds = shape.comm.rank == 0
        update = torch.from_numpy((acts.update if len(acts.update) else acts.residual)[:t])
        for parts in self._calls:
            own = self._weights, adapters, acts, self._rounded, self._scratch
            _run(sync, parts, adds, *own, places, work, kv, rules)
            if parts[0] % _NUM_PARTS in (_ATTENTION, _MLP):
                shape.comm.all_reduce(update)
        residual.copy_(torch.from_numpy(acts.residual[:t]))

    def _make_room(self, t: int) -> Activations:
        """Those of the largest step so far serve all smaller ones."""
        if self._activations is None or len(self._activations.residual) < t + ROOM:
            self._activations = acts = _allocate(t + ROOM, self._shape, self._weights)
            is_quantized = self._weights.first.is_quantized
            size = max(acts.residual.shape[1], acts.attended.shape[1], acts.gated.shape[1])
            self._rounded = make_rounded(len(acts.residual) if is_quantized else 0, size)
        return self._activations


def can_run(shape: LayerShape) -> bool:
    """Whether all sizes are whole numbers of the kernels' tiles and pages, as those of common models are."""
    heads = shape.heads
    sizes = (heads.head_dim, shape.intermediate_size, shape.block_size)
    return (
        shape.hidden_size % GROUP == 0
        and all(size % LANES == 0 for size in sizes)
        and heads.group <= MAX_ROWS
    )


def _adapter_memory(shape: LayerShape, weights: Weights) -> AdapterMemory:
    first, sizes = weights.first, adapted_sizes(shape)
    dtype = torch.bfloat16 if _is_half(first) else torch.float32
    return AdapterMemory(shape.adapters, shape.num_layers, sizes, dtype, activation_type(first))


def activation_type(weight: Packed) -> type[np.generic]:
    """What attention, and matrix products with this weight, take: bfloat16 (uint16) where the processor
    multiplies it, float32 otherwise.
    """
    return np.uint16 if HAS_BF16_DOT and _is_half(weight) else np.float32


def _is_half(weight: Packed) -> bool:
    """Whether it is bfloat16, or stands for such a matrix."""
    return bool(weight.forms[0, IS_HALF]) if weight.is_quantized else weight.data.dtype == np.uint16


def stack(shape: LayerShape, layers: Iterable[LayerWeights]) -> dict[str, np.ndarray]:
    """Packs layer after layer into arrays that hold all of them: the entries of Weights."""
    arrays: dict[str, Any] = {}
    codes: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for index, layer in enumerate(layers):
        for name, tensor in _packed(layer):
            if isinstance(tensor, QuantizedWeight):
                codes.setdefault(name, []).append(pack_codes(tensor))
                continue
            if index == 0:
                arrays[name] = torch.empty((shape.num_layers, *tensor.shape), dtype=tensor.dtype)
            arrays[name][index] = tensor
    found = {name: as_numpy(tensor) for name, tensor in arrays.items()}
    for name in MATRICES:
        packed = join_codes(codes.pop(name)) if name in codes else packed_dense(found[name])
        found[name], found[f"{name}_forms"] = packed
    return found


def _packed(layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """One layer's entries of Weights."""
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"):
        yield name, _floats(getattr(layer, name))
    yield "windows", torch.tensor(layer.window)
    yield "rotary", torch.tensor(layer.rotary)
    for name in ("qkv", "out", "down"):
        affine = getattr(layer, name)
        yield name, _pack(affine.weight)
        yield f"{name}_bias", _whole_groups(_floats(affine.bias))
    weight, bias = layer.gate_up.weight, layer.gate_up.bias
    yield "gate_up", _pack(rearranged(weight, interleaved))
    yield "gate_up_bias", _floats(None if bias is None else interleaved(bias))


def _pack(weight: Weight) -> torch.Tensor | QuantizedWeight:
    """Codes are packed by stack(), since layers may have different ones."""
    return weight if isinstance(weight, QuantizedWeight) else pack(weight.dense())


def _floats(values: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0) if values is None else values.float()


def _whole_groups(bias: torch.Tensor) -> torch.Tensor:
    """Filled up with zeros as the outputs of the matrix are."""
    return F.pad(bias, (0, -len(bias) % GROUP))


def _allocate(rows: int, shape: LayerShape, weights: Weights) -> Activations:
    heads, dtype = shape.heads, activation_type(weights.first)
    return Activations(
        residual=np.zeros((rows, shape.hidden_size), np.float32),
        normed=np.zeros((rows, shape.hidden_size), dtype),
        qkv=np.zeros(
            (rows, -(-(heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim // GROUP) * GROUP),
            np.float32,
        ),
        queries=np.zeros((rows, heads.num_heads, heads.head_dim), dtype),
        attended=np.zeros((rows, heads.num_heads * heads.head_dim), dtype),
        gated=np.zeros((rows, shape.intermediate_size), dtype),
        update=np.zeros((rows if weights.post_mlp_norm.size else 0, shape.hidden_size), np.float32),
    )
