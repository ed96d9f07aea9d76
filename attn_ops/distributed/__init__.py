"""Attention over several processes: how DTensor may shard it."""
