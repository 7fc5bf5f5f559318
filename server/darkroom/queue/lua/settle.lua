-- End a running job as its owner: succeeded with its images, failed, or cancelled.
--
-- ARGV 1 job id   2 worker   3 attempt   4 terminal state   5 encoded result or ''   6 error code   7 error message
--      8 number of images that the same transaction has written to staged:<id>:<attempt>:<index>
--      9.. image bytes, where none are staged; none either way when they lie in the result store
-- A script's argument is copied for Lua and once more for the key; a staged image moves without a copy.
-- Writes image:<id>:<index>, spans, removes staged:<id>:<attempt>:<index>, and writes what finish() writes. Returns 1 when the
-- job has ended so by this attempt (also when an earlier copy of this call did it), 0 when the attempt no longer owns the
-- job: nothing is stored then.

local id, worker, attempt, state = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local num_staged, num_sent = tonumber(ARGV[8]), #ARGV - 8
local function staged_key(index) return prefix .. 'staged:' .. id .. ':' .. ARGV[3] .. ':' .. index end
local function image_key(index) return prefix .. 'image:' .. id .. ':' .. index end
write_at_memory_limit()
local job = load_job(id)
if not is_owned(job, worker, attempt) then
  for index = 0, num_staged - 1 do redis.call('UNLINK', staged_key(index)) end
  if not job or job.state ~= state or job.owner ~= worker or job.attempt ~= attempt then return 0 end
  -- A write, as the replicas that may be waited for are those of this call.
  redis.call('HSET', job_key(id), 'state', state)
  return 1
end

local stored = 0
for index = 0, num_staged - 1 do
  redis.call('RENAME', staged_key(index), image_key(index))
  stored = stored + redis.call('STRLEN', image_key(index))
end
for index = 0, num_sent - 1 do
  redis.call('SET', image_key(index), ARGV[9 + index], 'PX', RESULT_TTL_MS)
  stored = stored + #ARGV[9 + index]
end
if stored > 0 then redis.call('HINCRBY', counters, 'stored_bytes', stored) end
if state == 'succeeded' then job.step = job.num_steps end
finish(id, job, state, 'result', ARGV[5], 'error_code', ARGV[6], 'error_message', ARGV[7], 'step', job.step)
-- How long a job takes that shares no ticks: of one that was alone when it came and when it went, and did all its steps.
if state == 'succeeded' and job.is_alone and job.from_step == 0 and job.cost > 0
  and redis.call('HEXISTS', running, job.model) == 0 then
  local span_ms = (now_ms - job.claimed_ms) * job.rows / job.cost
  local mean = tonumber(redis.call('HGET', prefix .. 'spans', job.model) or span_ms)
  redis.call('HSET', prefix .. 'spans', job.model, string.format('%.9g', 0.9 * mean + 0.1 * span_ms))
end
return 1
