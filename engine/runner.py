"""One step on the device: forward, logits, sampling; and the memory that takes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionBatch, create_backend
from engine.attention.torch_backend import TorchAttention
from engine.batch import BatchTables, HostBatch, StepInputs, StepOrder
from engine.config import EngineConfig
from engine.decode_graphs import Decoded, DecodeGraphs
from engine.device import choose_device, choose_dtype, choose_kv_cache_dtype, kv_cache_bytes, set_num_threads
from engine.kv_cache import KvCacheSpec, clear_blocks
from engine.layers.rotary import build_cos_sin
from engine.lora.device import DeviceAdapters
from engine.model_config import ModelConfig
from engine.outcome import LaunchedStep, PromptPart, StepResult
from engine.parallel.group import ALONE, TensorParallel
from engine.prompt_spans import PROMPT_LOGIT_ROWS, PromptSpan, prompt_spans
from engine.sampling.batch import SampledTokens, SamplingBatch
from engine.sampling.logprobs import gather_logprobs
from engine.sampling.sampler import sample
from engine.sampling.table import SamplingTable
from engine.scheduler import Step
from engine.staging import Staging
from engine.warm_up import LARGEST_SAMPLING, PLAIN_SAMPLING, WARM_UP_LENGTHS, dummy_step
from engine.weights.load_model import load_model
from kernels.backend import uses_triton
from kernels.sample import sample_tokens

STEP_TOKENS = {"cuda": 8192, "cpu": 256}
"""Most tokens in a step unless told otherwise. On a CPU more are no faster, and others wait as long as a step takes."""


class ModelRunner:
    """Owns the model, the KV cache and the batch tables; where ranks share a model, each has one for its part.

    Args:
        config: the engine's configuration.
        model_config: the checkpoint's.
        path: folder of the checkpoint.
        vocab_size: ids the tokenizer knows; logits past them are padding.
        group: the ranks that share the model.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: memory is too small for the configuration.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        path: Path,
        vocab_size: int,
        group: TensorParallel = ALONE,
    ) -> None:
        set_num_threads(config)
        self._group = group
        self.device = choose_device(config)
        self.dtype = choose_dtype(config, model_config, self.device)
        self.block_size = config.block_size
        self.max_num_batched_tokens = config.max_num_batched_tokens or STEP_TOKENS[self.device.type]
        self._staging = Staging(self.device)
        cache_dtype = choose_kv_cache_dtype(config, self.dtype, self.device)
        own_heads = group.model_share(model_config)
        self.backend = create_backend(
            own_heads, config.block_size, self._staging, self.dtype, cache_dtype, config.attention_backend
        )
        self.model = load_model(config, model_config, path, self.device, self.dtype, self.backend, group)
        self.adapters: DeviceAdapters | None = None
        if config.max_loras:
            self.adapters = DeviceAdapters(
                self.model,
                config.max_loras,
                config.max_lora_rank,
                config.max_num_seqs,
                self._staging,
                self.dtype,
                group,
            )

        longest = config.max_model_len or model_config.context_length
        trained = model_config.max_position_embeddings
        self._cos_sin = build_cos_sin(model_config.rope, model_config.head_dim, longest, trained, self.device)
        self._kv_spec = KvCacheSpec.of(own_heads, config.block_size, cache_dtype)
        self.graphs: DecodeGraphs | None = None
        self._warm_up(config, longest, vocab_size)
        budget = group.minimum(kv_cache_bytes(config, self.device))
        self.num_blocks, self.max_model_len = self._kv_spec.fit(config, budget, longest)
        self._kv_caches = self._kv_spec.allocate(self.num_blocks, self.device)
        self._tables = BatchTables(
            config.max_num_seqs,
            self.max_model_len,
            config.block_size,
            padding_block=self.num_blocks,
            staging=self._staging,
        )
        self._sampling = SamplingTable(config.max_num_seqs, vocab_size, self.device)
        # A graph fits any lengths. Torch's attention would gather as many keys as requests may ever have, all at once.
        by_torch = isinstance(self.backend, TorchAttention)
        if self.device.type == "cuda" and not (config.enforce_eager or by_torch):
            self.use_decode_graphs(config, capture=True)

    @torch.inference_mode()
    def use_decode_graphs(self, config: EngineConfig, capture: bool) -> None:
        """Run decode steps at bucketed sizes from now on; see DecodeGraphs."""
        self.graphs = DecodeGraphs(
            self.decode, config.max_num_seqs, self._tables.padding_slot, self._staging, capture, config.show_progress
        )

    @torch.inference_mode()
    def launch(self, step: Step, before_masks: Callable[[], object] = lambda: None) -> LaunchedStep:
        """Start a non-empty step; the steps launched before it end before it begins.

        Args:
            step: what to compute.
            before_masks: called after the forward pass is launched, and before grammars are asked what may come next:
                they must know all tokens by then.
        """
        return self._run(*self._plan(step), before_masks)

    def forget(self) -> None:
        """Forget the step whose launch has failed. Requests that it admitted or gave blocks must be admitted anew."""
        self._tables.forget_notes()
        if self.adapters is not None:
            self.adapters.forget_notes()

    def wait(self, launched: LaunchedStep) -> StepResult:
        """The outcome of a launched step, once it has ended."""
        return launched.result()

    def _plan(self, step: Step) -> tuple[StepOrder, list[PromptSpan]]:
        """What is to be done, as all ranks hear of it; and which prompt tokens it tells about, for the first one."""
        for request in step.admitted:
            self._tables.admit(request)
            self._sampling.set_row(request.slot, request)
            if self.adapters is not None:
                self.adapters.admit(request)
        for request in step.grown:
            self._tables.grow(request)
        for request, guesses in step.guesses.items():
            self._tables.guess(request, guesses)
        batch = self._tables.build(step)
        spans = prompt_spans(step, batch)
        by_graph = self.graphs is not None and batch.is_decode
        settings = self._sampling.plain_settings(batch.request_slots, batch.context_lens) if by_graph else None
        rows = [(span.start, span.stop) for span in spans]
        adapters = None if self.adapters is None else self.adapters.notes
        return StepOrder(self._tables.notes, adapters, batch, rows, by_graph, settings), spans

    def _run(self, order: StepOrder, spans: Sequence[PromptSpan], before_masks: Callable[[], object]) -> LaunchedStep:
        self._tables.flush()
        if self.adapters is not None:
            self.adapters.flush()
        batch = order.batch
        if self.graphs is not None and order.by_graph:
            decoded = self.graphs.launch(batch.request_slots, batch.positions, order.settings)
            if order.settings is None:
                return LaunchedStep(*self._draw_any(batch, self.model.compute_logits(decoded.hidden), before_masks))
            return LaunchedStep(SampledTokens(decoded.token_ids, decoded.is_finite, None))
        hidden = self.model(self._to_device(batch))
        parts = [self._prompt_part(span, hidden[span.start : span.stop]) for span in spans]
        if not len(batch.sampling):
            return LaunchedStep(None, None, parts)
        logits = self.model.compute_logits(self._sampled_rows(batch, hidden))
        return LaunchedStep(*self._sample(batch, logits, before_masks), parts)

    def _sampled_rows(self, batch: HostBatch, hidden: Tensor) -> Tensor:
        """Hidden states from which the next tokens are drawn, in the order of `batch.sampling`."""
        rows = batch.sample_rows
        if len(rows) == len(hidden) and (rows[1:] >= rows[:-1]).all():
            return hidden
        return hidden.index_select(0, *self._staging.send(rows))

    def decode(self, slots: Tensor, positions: Tensor, settings: Tensor) -> Decoded:
        """A step of one row a request, with a next token for each. What it launches depends on the batch size alone.

        Args:
            slots, positions: int64 [batch].
            settings: float64 [batch, 5], see `sample_tokens`.
        """
        if self.adapters is not None:
            self.adapters.begin(slots)
        block_tables = self._tables.block_table.index_select(0, slots)
        step = StepInputs(
            input_ids=self._tables.input_ids(slots, positions),
            cos_sin=self._cos_sin.index_select(0, positions),
            slot_mapping=self._tables.slot_mapping(slots, positions),
            attention_plan=self.backend.plan_decode(block_tables, (positions + 1).int()),
            kv_caches=self._kv_caches,
        )
        hidden = self.model(step)
        return Decoded(hidden, *self._draw_plain(self.model.compute_logits(hidden), slots, positions + 1, settings))

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a text, [num_tokens, vocab_size] float32 on the host, for evaluation.

        Beside the engine's steps: the text's keys and values are in memory of their own, and are forgotten.
        """
        logits = torch.empty(len(token_ids), self._sampling.vocab_size)
        first = 0
        for hidden in self._prompt_hidden(token_ids):
            part = self.model.compute_logits(hidden)[:, : self._sampling.vocab_size]
            logits[first : first + len(hidden)] = part.float().cpu()
            first += len(hidden)
        return logits

    def _prompt_hidden(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """Hidden states of a text, PROMPT_LOGIT_ROWS at a time."""
        if self.adapters is not None:
            self.adapters.begin_without()
        ids = torch.tensor(token_ids)
        num_blocks = -(-len(ids) // self.block_size)
        caches = self._kv_spec.allocate(num_blocks, self.device)
        blocks = torch.arange(num_blocks, dtype=torch.int32, device=self.device)[None]
        for start in range(0, len(ids), self.max_num_batched_tokens):
            end = min(start + self.max_num_batched_tokens, len(ids))
            shape = AttentionBatch(np.array([0]), np.array([end - start]), np.array([end]), blocks)
            step = StepInputs(
                input_ids=ids[start:end].to(self.device),
                cos_sin=self._cos_sin[start:end],
                slot_mapping=torch.arange(start, end, device=self.device),
                attention_plan=self.backend.plan(shape),
                kv_caches=caches,
            )
            yield from self.model(step).split(PROMPT_LOGIT_ROWS)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Zero blocks whose content is no numbers."""
        clear_blocks(self._kv_caches, blocks)

    def check(self) -> None:
        """Raise EngineDeadError if another rank of the model has failed."""

    def close(self) -> None:
        """End the other ranks of the model."""

    def _sample(
        self, batch: HostBatch, logits: Tensor, before_masks: Callable[[], object]
    ) -> tuple[SampledTokens, SamplingBatch | None]:
        """Draw the next tokens and write them where the next step reads them."""
        if uses_triton(logits):
            slots, positions = batch.sample_slots, batch.sample_positions
            settings = self._sampling.plain_settings(slots, positions)
            if settings is not None:
                token_ids, is_finite = self._draw_plain(logits, *self._staging.send(slots, positions, settings))
                return SampledTokens(token_ids, is_finite, None), None
        return self._draw_any(batch, logits, before_masks)

    def _draw_plain(self, logits: Tensor, slots: Tensor, positions: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and whether logits are finite, by the kernels that know neither edits nor logprobs."""
        token_ids, is_finite = sample_tokens(logits, settings, self._sampling.vocab_size)
        self._tables.append(slots, positions, self._group.broadcast(token_ids))
        return token_ids, is_finite

    def _draw_any(
        self, batch: HostBatch, logits: Tensor, before_masks: Callable[[], object]
    ) -> tuple[SampledTokens, SamplingBatch]:
        """Tokens and logprobs, by the sampler that knows all parameters."""
        if self._sampling.has_grammar(batch.sample_slots):
            before_masks()
        sampling = self._sampling.gather(batch.sample_slots, batch.sample_positions, self._tables.token_ids)
        sampled = sample(logits, sampling)
        slots, positions = self._staging.send(batch.sample_slots, batch.sample_positions)
        self._tables.append(slots, positions, self._group.broadcast(sampled.token_ids))
        return sampled, sampling

    def _prompt_part(self, span: PromptSpan, hidden: Tensor) -> PromptPart:
        num_top = span.request.params.prompt_logprobs or 0
        logits = self.model.compute_logits(hidden)[:, : self._sampling.vocab_size]
        (targets,) = self._staging.send(span.targets)
        return PromptPart(span.request, num_top, targets, gather_logprobs(logits, targets, num_top))

    def _to_device(self, batch: HostBatch) -> StepInputs:
        slots, positions, request_slots = self._staging.send(batch.row_slots, batch.positions, batch.request_slots)
        if self.adapters is not None:
            self.adapters.begin(slots, batch.request_slots)
        max_blocks = -(-int(batch.context_lens.max()) // self.block_size)
        block_tables = self._tables.block_table[:, :max_blocks].index_select(0, request_slots)
        return StepInputs(
            input_ids=self._tables.input_ids(slots, positions),
            cos_sin=self._cos_sin.index_select(0, positions),
            slot_mapping=self._tables.slot_mapping(slots, positions),
            attention_plan=self.backend.plan(
                AttentionBatch(batch.query_starts, batch.query_lens, batch.context_lens, block_tables)
            ),
            kv_caches=self._kv_caches,
        )

    @torch.inference_mode()
    def _warm_up(self, config: EngineConfig, longest: int, vocab_size: int) -> None:
        """Run the largest step there can be, so that its memory is counted before KV blocks take the rest.

        On a GPU, short ones too: kernels are compiled now and not at the first request. On a CPU, where memory is not
        counted, a short one suffices: it makes the libraries set themselves up.
        """
        on_cuda = self.device.type == "cuda"
        num_requests = min(config.max_num_seqs, self.max_num_batched_tokens) if on_cuda else 1
        length = min(self.max_num_batched_tokens // num_requests, longest) if on_cuda else min(16, longest)
        num_blocks = -(-length // self.block_size)
        self._kv_caches = self._kv_spec.allocate(num_requests * num_blocks, self.device)
        room = min(longest, num_requests * num_blocks * self.block_size)
        self._tables = BatchTables(
            num_requests, room, self.block_size, padding_block=num_requests * num_blocks, staging=self._staging
        )
        self._sampling = SamplingTable(num_requests, vocab_size, self.device)
        steps = [dummy_step(num_requests, length, self.block_size, LARGEST_SAMPLING)]
        for shorter in WARM_UP_LENGTHS if on_cuda else ():
            steps.append(dummy_step(1, min(shorter, room), self.block_size, PLAIN_SAMPLING))
        for step in steps:
            self._run(*self._plan(step), lambda: None).result()
        self._kv_caches = []
