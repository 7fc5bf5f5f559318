-- Take back jobs whose lease ran out, and end waiting ones whose deadline has passed.
--
-- ARGV 1 most jobs of each kind to look at   2 most dead letters kept
-- A lost lease is an unclean loss: the job's failures rise by one, and at MAX_FAILURES it fails as a dead letter.
-- Writes job:<id>, dead, and what requeue() and finish() write.
-- Returns four lists of ids: requeued, dead, cancelled, expired.

local requeued, dead, cancelled, expired = {}, {}, {}, {}
write_at_memory_limit()

for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  local job = load_job(id)
  if not job then
    fail_unreadable(id)
  elseif job.state ~= 'running' then
    redis.call('ZREM', leases, id)
  else
    local failures = redis.call('HINCRBY', job_key(id), 'failures', 1)
    job.failures = failures
    if job.cancel then
      finish(id, job, 'cancelled')
      cancelled[#cancelled + 1] = id
    elseif failures >= MAX_FAILURES then
      redis.call('XADD', prefix .. 'dead', 'MAXLEN', ARGV[2], '*', 'job', id, 'failures', failures,
        'attempt', job.attempt, 'worker', job.owner, 'reason', 'its worker was lost',
        'payload', redis.call('HGET', job_key(id), 'payload') or '')
      finish(id, job, 'failed', 'error_code', 'dead_letter', 'error_message',
        'given up after ' .. failures .. ' workers were lost while they ran it')
      dead[#dead + 1] = id
    elseif is_past_deadline(job) then
      finish(id, job, 'expired')
      expired[#expired + 1] = id
    else
      requeue(id, job)
      requeued[#requeued + 1] = id
    end
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
return { requeued, dead, cancelled, expired }
