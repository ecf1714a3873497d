"""What is taken of Ray Serve in private does what it is there for."""

from types import SimpleNamespace
from typing import Any

import grpc.aio
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.generated import serve_pb2, serve_pb2_grpc

import serve_app.ray_private  # noqa: F401  # what is tested is what it does to Ray Serve

LONG = 6 * 2**20


class Replica(serve_pb2_grpc.ASGIServiceServicer):
    """Answers as a replica does that tells of a large tokenizer."""

    async def HandleRequest(self, request: Any, context: Any) -> Any:
        return serve_pb2.ASGIResponse(serialized_message=bytes(LONG))


async def test_a_replica_may_send_more_than_grpc_takes_by_itself():
    server = grpc.aio.server()
    serve_pb2_grpc.add_ASGIServiceServicer_to_server(Replica(), server)
    info = SimpleNamespace(node_ip="127.0.0.1", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    try:
        replica = SimpleNamespace(_stub=None, _replica_info=info)
        stub = RunningReplica.stub.fget(replica)  # type: ignore[attr-defined]  # a property
        answer = await stub.HandleRequest(serve_pb2.ASGIRequest())
        assert len(answer.serialized_message) == LONG
        await replica._channel.close()
    finally:
        await server.stop(0)
