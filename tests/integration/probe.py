"""A driver in a process of its own: connects to a service's cluster and tells what its engine counts.

python -m tests.integration.probe ADDRESS          reads lines, answers each with a line of JSON:

    stats           its EngineStats
    request N       why it does not run a request with a prompt of N tokens
"""

import asyncio
import json
import sys

import msgspec
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.request import EngineRequest, SamplingParams
from serve_app import ray_private
from serve_app.wire import EngineResult


async def main() -> None:
    """Answer until the input ends."""
    address = sys.argv[1]
    ray.init(
        address=address,
        namespace="tests",
        _node_ip_address=address.rpartition(":")[0],
        log_to_driver=False,
        logging_level="ERROR",
    )
    handle = serve.get_deployment_handle("EngineReplica", "qwen3")
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *numbers = line.split()
        answer = await (handle.stats.remote() if command == "stats" else refusal(handle, *map(int, numbers)))
        print(json.dumps(answer), flush=True)


async def refusal(handle: DeploymentHandle, num_tokens: int) -> str:
    """Send a request past the ingress, which would not."""
    request = EngineRequest(request_id="long", prompt_token_ids=[200] * num_tokens, params=SamplingParams(max_tokens=1))
    generate = ray_private.over_grpc(handle, "generate", stream=True)
    responses = ray_private.call(generate, request.request_id, "probe", msgspec.msgpack.encode(request))
    [result] = [msgspec.msgpack.decode(each, type=EngineResult) async for each in responses]
    return result.refusal.message if result.refusal is not None else ""


if __name__ == "__main__":
    asyncio.run(main())
