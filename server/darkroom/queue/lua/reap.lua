-- Take back jobs whose lease ran out, and end waiting ones whose deadline has passed.
--
-- ARGV 1 most jobs of each kind to look at   2 most dead letters kept
-- A lost lease is an unclean loss: the job's failures rise by one, and at MAX_FAILURES it fails as a dead letter.
-- Writes what lose() and finish() write.
-- Returns four lists of ids (requeued, dead, cancelled, expired) and the milliseconds until the next lease may run out,
-- -1 when nothing is leased.

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
local next_lease = redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')
local left_ms = next_lease[2] and math.max(0, math.ceil(tonumber(next_lease[2]) - now_ms)) or -1
return { ended.requeued, ended.dead, ended.cancelled, expired, left_ms }
