"""The namespace of ``torch.ops`` that the ops are registered in: a second copy in one process needs another one."""

NAMESPACE = "mar_fast"
