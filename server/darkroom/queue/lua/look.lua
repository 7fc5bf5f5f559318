-- Watch the running images of a job for another while.
--
-- ARGV 1 job id   2 what is wanted: linear or vae   3 ms for which this counts as watching
-- Writes job:<id>; the worker is told on look:<worker> when nobody watched before. Returns 1, 0 when there is no such job
-- or it has ended.

write_at_memory_limit()
local id, field = ARGV[1], 'look_' .. ARGV[2]
local job = load_job(id)
if not job or TERMINAL[job.state] then return 0 end
local before = looked_at(id)
redis.call('HSET', job_key(id), field, now_ms + ARGV[3])
local now = looked_at(id)
if job.state == 'running' and now ~= before then
  redis.call('PUBLISH', prefix .. 'look:' .. job.owner, id .. ' ' .. job.attempt .. ' ' .. now)
end
return 1
