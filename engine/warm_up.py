"""Steps of made-up requests, run before the first real one: for the memory they take and the kernels they compile."""

from engine.request import MAX_LOGPROBS, EngineRequest, Request, SamplingParams
from engine.scheduler import Step

LARGEST_SAMPLING = SamplingParams(seed=0, top_p=0.9, presence_penalty=0.1, logprobs=MAX_LOGPROBS)
"""What takes the sampler most memory."""
PLAIN_SAMPLING = SamplingParams(seed=0)
WARM_UP_LENGTHS = tuple(2**exponent for exponent in range(11))
"""Of new tokens in a request, up to 1024: attention has kernels for one token and for tiles of three sizes, as many as
its heads fill; quantized products and experts have several for few tokens, and others where they are split."""


def dummy_step(num_requests: int, length: int, block_size: int, params: SamplingParams) -> Step:
    """Whole prompts of a length, in blocks of their own."""
    step = Step(starts=[0] * num_requests, num_new_tokens=[length] * num_requests)
    num_blocks = -(-length // block_size)
    for slot in range(num_requests):
        source = EngineRequest(request_id="", prompt_token_ids=[0] * length, params=params)
        request = Request(source, (), length + 1)
        request.slot, request.block_table = slot, list(range(slot * num_blocks, (slot + 1) * num_blocks))
        step.requests.append(request)
        step.admitted.append(request)
        step.sampling.append(slot)
    return step
