"""Raw documents to Megatron indexed shards, and the order in which the shards are read. Imports nothing of Phidias."""
