"""The namespace in ``torch.ops`` of the ops: a second copy of this package in one process needs another."""

NAMESPACE = "mar_fast"
