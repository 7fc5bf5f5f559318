-- Read a job as a client may see it. Writes nothing.
--
-- ARGV 1 job id
-- Returns view(); the record is empty when there is no such job.

return view(ARGV[1])
