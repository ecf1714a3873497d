"""CPU time of one engine step without the model: the real scheduler, block pool, batch builder, sampling table and
inputs of decode graphs against a device that takes no time. `python -m loadtest.bench_step`.

This is what a GPU would wait for if steps did not overlap. Target: ≤ 1.0 ms with 256 running requests.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
import torch

from engine.batch import BatchTables
from engine.block_pool import BlockPool
from engine.decode_graphs import Decoded, DecodeGraphs
from engine.request import EngineRequest, Request, RequestOutput, SamplingParams
from engine.sampling.table import SamplingTable
from engine.scheduler import Scheduler
from engine.staging import Staging

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 151_936
PARAMS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "sampled, with logprobs": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "logprobs": 5},
}
STAGES = (
    "schedule",
    "build the batch",
    "sampling parameters",
    "inputs of the graph",
    "take in the outcome",
    "make outputs",
)
NOTHING = Decoded(*[torch.empty(0)] * 3)


def main() -> None:
    """Print the table for each batch size and kind of sampling, then one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    for batch in (1, 32, 256):
        for name, params in PARAMS.items():
            stages = measure(batch, SamplingParams(max_tokens=2048, ignore_eos=True, **params), options.steps)
            total = stages.pop("step")
            print(f"\n{batch} running requests, {name}: {total * 1e3:.3f} ms a step (median of {options.steps})")
            for stage, seconds in stages.items():
                print(f"  {stage:22} {seconds * 1e6:8.1f} µs")
            print(json.dumps({"batch": batch, "sampling": name, "step_s": total, "stages_s": stages}))


def measure(batch: int, params: SamplingParams, num_steps: int) -> dict[str, float]:
    """Median CPU seconds of each stage, and of whole steps, over `num_steps` decode steps, overlapped as on a GPU."""
    pool = BlockPool(batch * MAX_MODEL_LEN // BLOCK_SIZE)
    scheduler = Scheduler(pool, BLOCK_SIZE, batch, 2**20)
    device = torch.device("cpu")
    staging = Staging(device)
    tables = BatchTables(batch, MAX_MODEL_LEN, BLOCK_SIZE, pool.num_blocks, staging)
    graphs = DecodeGraphs(lambda *inputs: NOTHING, batch, tables.padding_slot, staging, capture=False, progress=False)
    sampling = SamplingTable(batch, VOCAB_SIZE, device)
    generator = np.random.default_rng(0)
    for index in range(batch):
        prompt = generator.integers(0, VOCAB_SIZE, int(generator.integers(100, 1025))).tolist()
        source = EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params)
        scheduler.add(Request(source, (), MAX_MODEL_LEN))

    times: dict[str, list[float]] = defaultdict(list)
    in_flight = None
    for _ in range(num_steps + 20):
        marks = [time.thread_time()]
        step = scheduler.schedule()
        marks.append(time.thread_time())
        for request in step.admitted:
            tables.admit(request)
            sampling.set_row(request.slot, request)
        for request in step.grown:
            tables.grow(request)
        tables.flush()
        host = tables.build(step)
        marks.append(time.thread_time())
        settings = sampling.plain_settings(host.request_slots, host.context_lens)
        if settings is None:
            sampling.gather(host.sample_slots, host.sample_positions, tables.token_ids)
        marks.append(time.thread_time())
        if host.is_decode:
            graphs.launch(host.request_slots, host.positions, settings)
        marks.append(time.thread_time())
        launched, in_flight = in_flight, step
        if launched is None:
            continue
        token_ids = [7] * len(launched.sampling)
        updated = scheduler.update(launched, token_ids)
        marks.append(time.thread_time())
        outputs = [
            RequestOutput(request.request_id, [token_id])
            for request, token_id in zip(updated, token_ids, strict=True)
            if request is not None
        ]
        marks.append(time.thread_time())
        del outputs
        for stage, (start, end) in zip(STAGES, pairwise(marks), strict=True):
            times[stage].append(end - start)
        times["step"].append(marks[-1] - marks[0])
    return {stage: statistics.median(values[19:]) for stage, values in times.items()}


if __name__ == "__main__":
    main()
