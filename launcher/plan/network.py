"""How long a collective takes between GPUs: rings as NCCL builds them, over NVLink inside a node and one port a GPU outside.

A ring moves (n - 1) / n of the data past each rank. Inside a node it runs at the NVLink's bandwidth. Between nodes NCCL lays as
many rings as the group has ranks in a node, each through a port of its own: a group with k ranks in each node sees k ports.
Megatron orders ranks tensor, context, data, pipeline, the first fastest: so neighbours of a tensor-parallel group share a node,
those of a pipeline usually do not.
"""

from dataclasses import dataclass

from launcher.config.hardware import Hardware
from launcher.config.schema import Cluster

# A hop of a ring, and a message between two GPUs: NCCL's latencies, of its tuning tables, rounded.
NVLINK_HOP_S, NETWORK_HOP_S = 2e-6, 8e-6


@dataclass(frozen=True)
class Link:
    """What a ring of a group sees: bytes/s past each rank, and seconds a hop."""

    bytes_per_s: float
    hop_s: float
    crosses_nodes: bool


class Fabric:
    """The links of a cluster of such GPUs."""

    def __init__(self, cluster: Cluster, *, hardware: Hardware):
        settings, efficiency = cluster.network, hardware.efficiency
        inside = settings.intra_node_gb_per_s if settings and settings.intra_node_gb_per_s else hardware.nvlink_gb_per_s
        self.world_size, self.gpus_per_node = cluster.world_size, cluster.gpus_per_node
        self.node_size = hardware.nvlink_domain or cluster.gpus_per_node
        self.inside = inside * 1e9 * efficiency.nvlink
        self.port = (settings.inter_node_gb_per_s if settings else inside) * 1e9 * efficiency.network
        self.pod = settings.nodes_per_pod if settings and settings.rail_optimized else 1
        self.oversubscription = settings.oversubscription if settings else 1.0

    def link(self, size: int, *, stride: int) -> Link:
        """The ring of a group of `size` ranks, each `stride` ranks after the one before."""
        if size == 1 or self.world_size <= self.node_size or self.node_size % (size * stride) == 0:
            return Link(self.inside, NVLINK_HOP_S, False)
        per_node = max(1, self.node_size // stride)
        # Neighbours far apart cross the core, however few they are.
        span = -(-size * stride // self.gpus_per_node)
        port = self.port / (self.oversubscription if span > self.pod else 1.0)
        return Link(min(self.inside, per_node * port), NETWORK_HOP_S, True)

    def ring_s(self, num_bytes: float, *, size: int, link: Link, messages: int = 1) -> float:
        """An all-gather or a reduce-scatter of `num_bytes` (the whole of it), in so many messages one after another."""
        if size == 1:
            return 0.0
        return num_bytes * (size - 1) / size / link.bytes_per_s + messages * (size - 1) * link.hop_s

    def send_s(self, num_bytes: float, *, link: Link) -> float:
        """One message to a neighbour: through its own port, however many ranks of the group share the node."""
        bandwidth = min(link.bytes_per_s, self.port) if link.crosses_nodes else link.bytes_per_s
        return num_bytes / bandwidth + link.hop_s
