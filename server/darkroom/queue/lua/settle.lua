-- End a running job as its owner: succeeded with its images, failed, or cancelled.
--
-- ARGV 1 job id   2 worker   3 attempt   4 terminal state   5 encoded result or ''   6 error code   7 error message
--      8.. image bytes, none when they lie in the result store
-- Writes image:<id>:<index> and what finish() writes. Returns 1 when the job has ended so by this attempt (also when an
-- earlier copy of this call did it), 0 when the attempt no longer owns the job: nothing is stored then.

local id, worker, attempt, state = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
write_at_memory_limit()
local job = load_job(id)
if not is_owned(job, worker, attempt) then
  return job and job.state == state and job.owner == worker and job.attempt == attempt and 1 or 0
end

local stored = 0
for i = 8, #ARGV do
  redis.call('SET', prefix .. 'image:' .. id .. ':' .. (i - 8), ARGV[i], 'PX', RESULT_TTL_MS)
  stored = stored + #ARGV[i]
end
if stored > 0 then redis.call('HINCRBY', counters, 'stored_bytes', stored) end
if state == 'succeeded' then job.step = job.num_steps end
finish(id, job, state, 'result', ARGV[5], 'error_code', ARGV[6], 'error_message', ARGV[7], 'step', job.step)
return 1
