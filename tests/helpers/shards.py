"""Models under fully_shard."""

from torch.distributed.fsdp import fully_shard


def shard_at_once(model):
    """The whole, whose parameters stay gathered after a forward pass."""
    return fully_shard(model)


def shard(model):
    """Every child by itself, and what is left with the whole; shared parameters must stay together."""
    children = list(model.children())
    if sum(len(list(child.parameters())) for child in children) == len(list(model.parameters())):
        for child in children:
            fully_shard(child)
    return fully_shard(model)
