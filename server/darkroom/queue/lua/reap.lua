-- Take back jobs whose lease ran out, and end waiting ones whose deadline has passed.
--
-- ARGV 1 most jobs of each kind to look at   2 most dead letters kept
-- A lost lease is an unclean loss: the job's failures rise by one, and at MAX_FAILURES it fails as a dead letter.
-- Writes what lose() and finish() write.
-- Returns four lists of ids: requeued, dead, cancelled, expired.

local ended = { requeued = {}, dead = {}, cancelled = {}, expired = {} }
local expired = ended.expired
write_at_memory_limit()

for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  local job = load_job(id)
  if not job then
    fail_unreadable(id)
  elseif job.state ~= 'running' then
    redis.call('ZREM', leases, id)
  else
    local ids = ended[lose(id, job, 'its worker was lost', ARGV[2])]
    ids[#ids + 1] = id
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', queued, '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  local job = load_job(id)
  if not job then
    fail_unreadable(id)
  elseif job.state == 'queued' then
    finish(id, job, 'expired')
    expired[#expired + 1] = id
  else
    redis.call('ZREM', queued, id)
  end
end
return { ended.requeued, ended.dead, ended.cancelled, expired }
