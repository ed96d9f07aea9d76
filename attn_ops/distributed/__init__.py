"""Attention over several processes: how DTensor may shard it, and context parallel."""
