-- Take back jobs whose lease ran out, end waiting ones whose deadline has passed, and cancel those whose clients have left
-- and not come back.
--
-- ARGV 1 most jobs of each kind to look at   2 most dead letters kept
-- A lost lease is an unclean loss: the job's failures rise by one, and at MAX_FAILURES it fails as a dead letter. While
-- nobody could reach this server nobody could renew a lease either, or say that he still waits: after a time in which
-- nobody called this, all those get the time to.
-- An abandoned job gives its idempotency key back: a client that does come back with it later gets a new job.
-- Writes running, abandoned, looked_after, idempotency:<digest>, and what lose(), finish() and ask_to_cancel() write.
-- Returns five lists of ids (requeued, dead, cancelled, expired, abandoned) and the milliseconds until the next lease may
-- run out, -1 when nothing is leased.

local ended = { requeued = {}, dead = {}, cancelled = {}, expired = {}, abandoned = {} }
local expired = ended.expired
write_at_memory_limit()

if redis.call('EXISTS', leases, abandoned) > 0 then
  if redis.call('EXISTS', prefix .. 'looked_after') == 0 then
    for key, time_ms in pairs({ [leases] = LEASE_MS, [abandoned] = GRACE_MS }) do
      for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now_ms)) do
        redis.call('ZADD', key, now_ms + time_ms, id)
      end
    end
  end
  look_after()
end

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

-- Damaged records could not say how many rows they had.
if redis.call('EXISTS', leases) == 0 then redis.call('DEL', running) end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', abandoned, '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  local job = load_job(id)
  redis.call('ZREM', abandoned, id)
  if job and not TERMINAL[job.state] and not job.cancel then
    redis.call('DEL', prefix .. 'idempotency:' .. job.idempotency)
    redis.call('HSET', job_key(id), 'idempotency', '')
    job.idempotency = ''
    ask_to_cancel(id, job)
    ended.abandoned[#ended.abandoned + 1] = id
  end
end
local next_lease = redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')
local left_ms = next_lease[2] and math.max(0, math.ceil(tonumber(next_lease[2]) - now_ms)) or -1
return { ended.requeued, ended.dead, ended.cancelled, expired, ended.abandoned, left_ms }
