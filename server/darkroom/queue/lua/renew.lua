-- Extend the leases that a worker still holds.
--
-- ARGV 1 worker   2.. job id, attempt, job id, attempt ...
-- Writes leases. Returns one number per job: 0 lost, 1 renewed, 2 renewed and asked to be cancelled,
-- 3 the same, with pictures of what it has drawn.

write_at_memory_limit()
local reply = {}
for i = 2, #ARGV, 2 do
  local job = load_job(ARGV[i])
  if is_owned(job, ARGV[1], tonumber(ARGV[i + 1])) then
    redis.call('ZADD', leases, now_ms + LEASE_MS, ARGV[i])
    reply[#reply + 1] = job.cancel == 'keep' and 3 or job.cancel and 2 or 1
  else
    reply[#reply + 1] = 0
  end
end
return reply
