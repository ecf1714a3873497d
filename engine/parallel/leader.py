"""The first rank: launches steps as a lone runner does, and tells the others to run them along."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device import choose_device
from engine.model_config import ModelConfig
from engine.outcome import LaunchedStep, StepResult
from engine.parallel.orders import ClearBlocks, PromptLogits, Start
from engine.parallel.processes import StartRank
from engine.parallel.share import check_divisible
from engine.parallel.workers import Workers
from engine.runner import ModelRunner
from engine.scheduler import Step


class Leader(ModelRunner):
    """A runner for `tensor_parallel_size` ranks.

    Args:
        start_rank: starts one of the others.

    Raises:
        ConfigError: the model cannot be divided so, or as ModelRunner.
        CheckpointError: as ModelRunner.
        EngineDeadError: another rank failed.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, path: Path, vocab_size: int, start_rank: StartRank
    ) -> None:
        check_divisible(model_config, config.tensor_parallel_size)
        self._workers = Workers(
            Start(config, model_config, path.absolute(), vocab_size), start_rank, choose_device(config)
        )
        with self._workers.guard():
            super().__init__(config, model_config, path, vocab_size, self._workers.group)
            self._group.minimum(0)  # the others are as far
        if self.graphs is not None:
            self._workers.end_graphs_first(self.graphs.captured)

    @torch.inference_mode()
    def launch(self, step: Step, before_masks: Callable[[], object] = lambda: None) -> LaunchedStep:
        with self._workers.guard():
            order, spans = self._plan(step)
            self._workers.send(order)
            return self._run(order, spans, before_masks)

    def wait(self, launched: LaunchedStep) -> StepResult:
        with self._workers.guard():
            return super().wait(launched)

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        with self._workers.guard():
            self._workers.send(PromptLogits(list(token_ids)))
            return super().prompt_logits(token_ids)

    def clear_blocks(self, blocks: list[int]) -> None:
        with self._workers.guard():
            self._workers.send(ClearBlocks(blocks))
            super().clear_blocks(blocks)

    def check(self) -> None:
        self._workers.check()

    def close(self) -> None:
        self._workers.close()


def create_runner(
    config: EngineConfig, model_config: ModelConfig, path: Path, vocab_size: int, start_rank: StartRank
) -> ModelRunner:
    """The runner for a configuration: one that has the whole model, or one that leads others."""
    if config.tensor_parallel_size == 1:
        return ModelRunner(config, model_config, path, vocab_size)
    return Leader(config, model_config, path, vocab_size, start_rank)
