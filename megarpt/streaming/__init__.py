"""StreamBP: exact gradients of whole layers from a chunk of tokens at a time."""
