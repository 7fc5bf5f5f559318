"""OpenAI's Images API, `/v1`, for applications that speak it: shapes and errors are theirs."""
