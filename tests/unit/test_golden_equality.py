"""The same tokens come out however a request is scheduled: cold or warm, whole or chunked, preempted, batched."""

import random

import pytest

import engine.runner
from engine.attention.triton_backend import TritonAttention
from engine.decode_graphs import bucket_sizes
from engine.llm import LLM
from engine.request import EngineRequest, SamplingParams
from tests.tiny_models import make_tiny_qwen3, reference_greedy

NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True)
BYTES_PER_TOKEN = 2 * 3 * 4 * 2 * 16  # keys and values · layers · float32 · KV heads · head_dim


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    # A vocabulary that the tokenizer covers to the last id: transformers may then choose from the same tokens.
    return path, make_tiny_qwen3(path, vocab_size=256)


@pytest.fixture(scope="module")
def prompts():
    generator = random.Random(5)
    shared = [generator.randrange(256) for _ in range(40)]
    own = [[generator.randrange(256) for _ in range(generator.randrange(1, 60))] for _ in range(8)]
    return [shared[: generator.randrange(10, 40)] + tail if index % 2 else tail for index, tail in enumerate(own)]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    _, reference = checkpoint
    return [reference_greedy(reference, prompt, NUM_TOKENS) for prompt in prompts]


def make_llm(path, num_tokens=2048, **config) -> LLM:
    values = {"block_size": 4, "max_num_seqs": 8, "dtype": "float32", "device": "cpu", "show_progress": False}
    return LLM(str(path), kv_cache_memory=num_tokens * BYTES_PER_TOKEN, max_model_len=128, **(values | config))


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


WAYS = {
    "batched": {},
    "overlapped": {"overlap_steps": True},
    "overlapped, chunks of 5": {"overlap_steps": True, "max_num_batched_tokens": 5},
    "no prefix cache": {"enable_prefix_caching": False},
    "one at a time": {"max_num_seqs": 1},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "chunks of 1": {"max_num_batched_tokens": 1},
    "blocks of 1": {"block_size": 1},
    "blocks of 16": {"block_size": 16},
    "blocks of 7": {"block_size": 7},
}


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS.keys())
def test_greedy_tokens_equal_those_of_transformers(checkpoint, prompts, expected, config):
    llm = make_llm(checkpoint[0], **config)
    assert llm.engine.vocab_size == 256
    assert tokens(llm.generate(prompts, GREEDY)) == expected


def test_warm_cache(checkpoint, prompts, expected):
    llm = make_llm(checkpoint[0])
    llm.generate(prompts, GREEDY)
    warm = llm.generate(prompts, GREEDY)
    assert tokens(warm) == expected
    assert all(completion.num_cached_tokens >= len(completion.prompt_token_ids) - 4 for completion in warm)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("chunk", [7, 64])
def test_preempted(checkpoint, prompts, expected, chunk, overlap):
    llm = make_llm(checkpoint[0], num_tokens=136, max_num_batched_tokens=chunk, overlap_steps=overlap)
    llm.engine._scheduler._expected_output = -1000  # expect no growth at all: blocks run out
    completions = llm.generate(prompts, GREEDY)
    assert llm.engine.stats().num_preemptions > 0
    assert tokens(completions) == expected


def test_sampled_tokens_depend_on_seed_and_position_alone(checkpoint, prompts):
    alone = [make_llm(checkpoint[0]).generate([prompt], SAMPLED)[0].token_ids for prompt in prompts[:4]]
    batched = tokens(make_llm(checkpoint[0]).generate(prompts, SAMPLED))
    preempting = make_llm(checkpoint[0], num_tokens=136, max_num_batched_tokens=9, overlap_steps=True)
    preempting.engine._scheduler._expected_output = -1000
    preempted = tokens(preempting.generate(prompts, SAMPLED))
    assert batched[:4] == alone
    assert preempted == batched


def test_a_request_goes_on_elsewhere_where_it_stopped(checkpoint, prompts):
    """Prompt and output so far, sent as a prompt with the same seed, continue with the same tokens."""
    llm = make_llm(checkpoint[0])
    whole = llm.generate([prompts[0]], SAMPLED)[0].token_ids
    rest = SamplingParams(temperature=1, seed=11, max_tokens=NUM_TOKENS - 8, ignore_eos=True)
    assert make_llm(checkpoint[0]).generate([prompts[0] + whole[:8]], rest)[0].token_ids == whole[8:]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_aborts_leave_the_others_alone(checkpoint, prompts, expected, overlap):
    llm = make_llm(checkpoint[0], max_num_batched_tokens=16, overlap_steps=overlap)
    engine = llm.engine
    for index, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=GREEDY))
    outputs: dict[str, list[int]] = {}
    step = 0
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        if step % 3 == 0 and step < 12:
            engine.abort(str(step // 3 * 2))
        step += 1
    for index in (1, 3, 5, 7):
        assert outputs[str(index)] == expected[index]
    assert engine.stats().num_owned_blocks == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_a_stop_token_ends_the_output_there(checkpoint, prompts, expected, overlap):
    """Overlapped steps find out one step late: the token too many is not seen, and its block is free again."""
    llm = make_llm(checkpoint[0], overlap_steps=overlap)
    stops = [output[index % 7 + 3] for index, output in enumerate(expected)]
    params = [
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=(stop,)) for stop in stops
    ]
    outputs = tokens(llm.generate(prompts, params))
    assert outputs == [output[: output.index(stop) + 1] for output, stop in zip(expected, stops, strict=True)]
    assert llm.engine.stats().num_owned_blocks == 0


def test_bucketed_decode(checkpoint, prompts, expected):
    """Decode steps on padded buffers of bucketed sizes, as CUDA graphs run them."""
    llm = make_llm(checkpoint[0], max_num_seqs=7, overlap_steps=True)
    llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    assert tokens(llm.generate(prompts, GREEDY)) == expected
    few = llm.generate(prompts[:3], GREEDY)
    assert tokens(few) == expected[:3]


VARIED = [
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1.1, min_p=0.05, seed=2, max_tokens=NUM_TOKENS - 4, ignore_eos=True),
    GREEDY,
    SamplingParams(temperature=0.7, top_p=0.8, seed=3, max_tokens=NUM_TOKENS - 7, ignore_eos=True),
]
EDITED = [
    SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=4, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.9, logprobs=2, seed=5, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, min_tokens=5, stop_token_ids=tuple(range(100)), seed=6, max_tokens=12),
]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("params", [VARIED * 2, VARIED + EDITED + [GREEDY]], ids=["plain", "some edited"])
def test_bucketed_decode_draws_what_the_sampler_does(checkpoint, prompts, params, overlap):
    """Steps whose rows all are plain draw within `decode`; as soon as one is not, the sampler draws them all."""
    eager = make_llm(checkpoint[0]).generate(prompts, params)
    llm = make_llm(checkpoint[0], max_num_seqs=7, overlap_steps=overlap)
    llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    bucketed = llm.generate(prompts, params)
    assert tokens(bucketed) == tokens(eager)
    assert [completion.logprobs is None for completion in bucketed] == [own.logprobs is None for own in params]


def test_buckets():
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(7) == [1, 2, 4, 7]
    assert bucket_sizes(48) == [1, 2, 4, 8, 16, 32, 48]
    assert bucket_sizes(256)[-3:] == [224, 240, 256] and bucket_sizes(4096)[19:22] == [256, 320, 384]
    assert len(bucket_sizes(256)) == 20 and len(bucket_sizes(4096)) == 80


@pytest.mark.parametrize("buckets", [False, True], ids=["by lengths", "bucketed decode"])
def test_triton_backend(tmp_path, prompts, monkeypatch, buckets):
    """The Triton backend's plans, with its kernels' references in their place on a CPU."""
    reference = make_tiny_qwen3(tmp_path, vocab_size=256, head_dim=64, num_attention_heads=4)
    monkeypatch.setattr(
        engine.runner, "create_backend", lambda model, _, staging, *rest: TritonAttention(model, staging)
    )
    llm = make_llm(tmp_path, num_tokens=8192, block_size=16, max_num_batched_tokens=48)
    if buckets:
        llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    outputs = tokens(llm.generate(prompts, GREEDY))
    assert outputs == [reference_greedy(reference, prompt, NUM_TOKENS) for prompt in prompts]
