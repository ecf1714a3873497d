"""Each kernel on real shapes: right against float32, then timed beside others' and the ceilings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import paged_attention, plan_query_blocks, tokens_per_query_block
from kernels.paged_decode import decode_scratch, paged_decode
from loadtest.gpu.attention_peers import Peers, dense_peers, packed_peers, paged_decode_peers
from loadtest.gpu.cases import Case, randn
from loadtest.gpu.ceilings import median_s
from loadtest.gpu.layer_cases import FLOAT8, LAYER_CASES, Sizes, has_fp8
from loadtest.gpu.results import Group, Record, Row, attempt

DECODE_LENGTHS = ([512], [1024] * 64, [1024] * 256, [131_072] + [1024] * 31)
PROMPT_LENGTHS = (1024, 8192)


def groups() -> dict[str, Group]:
    """The cases of a GPU, attention first."""
    makers: dict[str, Callable[[], list[Case]]] = {
        "decode attention": partial(decode_cases, DECODE_LENGTHS, "cuda"),
        "prompt attention": partial(prefill_cases, PROMPT_LENGTHS, "cuda"),
    }
    makers |= {name: partial(make, Sizes(), "cuda") for name, make in LAYER_CASES.items()}
    return {name: partial(measure_all, make) for name, make in makers.items()}


def measure_all(make_cases: Callable[[], list[Case]], surroundings: dict[str, Any], record: Record) -> None:
    """A row for each case; one that is wrong leaves the others theirs."""
    for case in make_cases():
        attempt(record, {"kernel": case.name}, partial(measure, case, surroundings))


def measure(case: Case, surroundings: dict[str, Any]) -> Row:
    """Check a case, then time it, and what others have for it. Theirs may fail: that is no error of ours.

    Raises:
        AssertionError: the result is wrong.
    """
    error = case.check()
    seconds = median_s(case.run)
    peers: dict[str, float | str] = {}
    for name, run in case.peers.items():
        try:
            peers[name] = median_s(run)
        except Exception as failure:
            peers[name] = f"{type(failure).__name__}: {failure}"
    floor = max(case.moved / surroundings["copy_bytes_per_s"], case.computed / surroundings["matmul_flop_per_s"])
    beside = "".join(f"  {name} {s * 1e6:9.1f} µs" for name, s in peers.items() if isinstance(s, float))
    print(f"{case.name:64} {seconds * 1e6:9.1f} µs  {floor / seconds:6.1%} of the floor{beside}", flush=True)
    return {
        "error": error,
        "seconds": seconds,
        "floor_s": floor,
        "share": floor / seconds,
        "peers_s": peers,
    }


def decode_cases(lengths: tuple[list[int], ...], device: str) -> list[Case]:
    """paged_decode: even batches, and one long request among short ones."""
    cases = []
    kinds = ((16, 8, torch.bfloat16), (32, 8, torch.bfloat16), (16, 8, FLOAT8))
    for heads, kv_heads, dtype in kinds[: 2 + has_fp8(device)]:
        for lens in lengths:
            cache = _Cache(lens, kv_heads, dtype, device)
            query = randn(len(lens), heads, 128, device=device)
            name = f"{lens[0]} x {len(lens)}" if len(set(lens)) == 1 else f"{lens[0]} and {lens[1]} x {len(lens) - 1}"
            scratch = decode_scratch(heads, kv_heads, 128, query.device)
            cases.append(
                Case(
                    f"paged_decode {heads}/{kv_heads} heads, context {name}, {str(dtype)[6:]}",
                    lambda q=query, c=cache, s=scratch: paged_decode(q, c.keys, c.values, c.table, c.lens, s),
                    lambda q=query, c=cache: c.attend(q[:, None]).squeeze(1),
                    2 * sum(lens) * kv_heads * 128 * dtype.itemsize,
                    peers=_decode_peers(query, cache, lens) if dtype is query.dtype else {},
                )
            )
    return cases


def prefill_cases(lengths: tuple[int, ...], device: str) -> list[Case]:
    """paged_attention: one prompt, beside torch's flash attention on dense tensors."""
    cases = []
    for length in lengths:
        cache = _Cache([length], 8, torch.bfloat16, device)
        query = randn(length, 32, 128, device=device)
        tokens = tokens_per_query_block(length, 4)
        plan = plan_query_blocks(*(_numpy([n]) for n in (0, length, length)), tokens)
        blocks = torch.from_numpy(plan).to(device)
        dense = cache.dense(0)
        peers = dense_peers(query[None], *(t[None] for t in dense)) | packed_peers(query, *dense, [length], [length])
        cases.append(
            Case(
                f"paged_attention 32/8 heads, prompt of {length}",
                lambda q=query, c=cache, b=blocks, t=tokens: paged_attention(q, c.keys, c.values, c.table, b, t),
                lambda q=query, c=cache: c.attend(q[None])[0],
                0,
                4 * 32 * 128 * length**2 / 2,
                peers=peers,
            )
        )
    return cases


def _decode_peers(query: Tensor, cache: "_Cache", lens: list[int]) -> Peers:
    dense = [cache.dense(row) for row in range(len(lens))]
    keys, values = (torch.cat([row[part] for row in dense]) for part in range(2))
    peers = packed_peers(query, keys, values, [1] * len(lens), lens)
    peers |= paged_decode_peers(query, cache.keys, cache.values, cache.table, lens)
    if len(set(lens)) == 1:
        peers |= dense_peers(query[:, None], *(t.unflatten(0, (len(lens), -1)) for t in (keys, values)))
    return peers


class _Cache:
    """A paged cache with random content in shuffled blocks of 16."""

    def __init__(self, lens: list[int], kv_heads: int, dtype: torch.dtype, device: str) -> None:
        counts = [-(-length // 16) for length in lens]
        order = torch.randperm(sum(counts), device=device).int()
        shape = (sum(counts), 16, kv_heads, 128)
        self.keys, self.values = (randn(*shape, device=device).to(dtype) for _ in range(2))
        self.table = torch.zeros(len(lens), max(counts), dtype=torch.int32, device=device)
        for row, part in enumerate(order.split(counts)):
            self.table[row, : len(part)] = part
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device)
        self._lens = lens

    def dense(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request, [context, kv_heads, head_dim]."""
        blocks, length = self.table[row].long(), self._lens[row]
        # Torch gathers float8 by index only as bytes.
        found = (cache.view(torch.uint8)[blocks].view(cache.dtype) for cache in (self.keys, self.values))
        return tuple(blocks.flatten(0, 1)[:length] for blocks in found)  # type: ignore[return-value]

    def attend(self, query: Tensor) -> Tensor:
        """The last tokens of each request over its context: [requests, query_len, heads, head_dim], in float32."""
        outputs = []
        for row, own in enumerate(query):
            keys, values = (t.float().transpose(0, 1) for t in self.dense(row))
            visible = torch.ones(len(own), keys.shape[1], dtype=torch.bool, device=own.device)
            mask = visible.tril(keys.shape[1] - len(own))
            out = F.scaled_dot_product_attention(
                own.float().transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.stack(outputs)


def _numpy(values: list[int]) -> Any:
    return torch.tensor(values).numpy()
