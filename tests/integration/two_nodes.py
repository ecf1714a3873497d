"""`python -m tests.integration.two_nodes config.yaml`: as serve_app.run, on a cluster of two nodes of this machine.

Each has two CPUs. The first also has the resource "head", Serve's controller and proxy; it is not the one to lose.
"""

import os
import sys

from ray.cluster_utils import Cluster

from serve_app import run

HOST = "127.0.0.1"


def main(config: str) -> None:
    """Start the nodes, serve, and stop the nodes when the service has ended."""
    node = {"num_cpus": 2, "node_ip_address": HOST, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"resources": {"head": 1}})
    cluster.add_node(**node)
    os.environ["RAY_ADDRESS"] = cluster.address
    run.main(config)


if __name__ == "__main__":
    main(sys.argv[1])
