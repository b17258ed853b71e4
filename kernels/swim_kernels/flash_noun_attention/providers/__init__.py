"""Flash attentions that hand over their lse."""
