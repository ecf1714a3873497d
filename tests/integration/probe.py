"""A driver in a process of its own: connects to a service's cluster and tells what its engine counts.

python -m tests.integration.probe ADDRESS          reads lines, answers each with a line of JSON
"""

import asyncio
import json
import sys

import ray
from ray import serve


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
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await handle.stats.remote()), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
