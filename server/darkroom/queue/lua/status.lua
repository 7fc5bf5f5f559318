-- Read a job as a client may see it.
--
-- ARGV 1 job id   2 '1' for a client that has come back for it: whoever else leaves now, it is not abandoned
--      3 the client's tenant, '' for one who sees all jobs
-- Writes abandoned, where a client has come back. Returns view(); the record is empty when there is no such job.

if ARGV[2] == '1' and not is_others(load_job(ARGV[1]), ARGV[3]) then redis.call('ZREM', abandoned, ARGV[1]) end
return view(ARGV[1])
