"""The API of AUTOMATIC1111's web UI, `/sdapi/v1`, for clients that speak it: shapes, names and errors are theirs.

What is global there is each caller's own here: the options, the progress, and what an interruption stops.
"""
