-- Ask for a job to be cancelled: at once when it waits, by its worker when it runs, not at all when it has ended.
--
-- ARGV 1 job id
-- Writes job:<id> or what finish() writes, publishes on `cancel:<worker>`. Returns view().

local id = ARGV[1]
write_at_memory_limit()
local job = load_job(id)
if job and job.state == 'queued' then
  finish(id, job, 'cancelled')
elseif job and job.state == 'running' then
  redis.call('HSET', job_key(id), 'cancel', '1')
  redis.call('PUBLISH', prefix .. 'cancel:' .. job.owner, id)
end
return view(id)
