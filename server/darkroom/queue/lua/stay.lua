-- Say that somebody still waits for a job, which is not to be cancelled for another while. One that somebody has asked for
-- in another way since is not cancelled at all, and stays so.
--
-- ARGV 1 job id
-- Writes abandoned. Returns nothing of interest.

write_at_memory_limit()
redis.call('ZADD', abandoned, 'XX', 'GT', now_ms + GRACE_MS, ARGV[1])
return 1
