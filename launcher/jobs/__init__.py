"""Starting ranks and waiting for them."""
