"""Rows, ticks and pictures: no Redis, no HTTP. `batcher` is plain Python, so nothing is imported here."""
