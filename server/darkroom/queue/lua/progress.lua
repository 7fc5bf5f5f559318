-- Record how far running jobs are, and tell those who watch.
--
-- ARGV 1 worker   2.. job id, attempt, step, num_steps, job id ...
-- Writes job:<id>, events:<id>. Returns for each job what those who watch it want to see, '' for one of which the worker
-- is not the owner any more.

write_at_memory_limit()
local reply = {}
for i = 2, #ARGV, 4 do
  local id, step, num_steps = ARGV[i], ARGV[i + 2], ARGV[i + 3]
  local job = load_job(id)
  if is_owned(job, ARGV[1], tonumber(ARGV[i + 1])) then
    if job.step ~= step or job.num_steps ~= num_steps then
      redis.call('HSET', job_key(id), 'step', step, 'num_steps', num_steps)
      add_event(id, 'progress', step, num_steps, JOB_TTL_MS)
      redis.call('PUBLISH', prefix .. 'progress', id)
    end
    reply[#reply + 1] = looked_at(id)
  else
    reply[#reply + 1] = ''
  end
end
return reply
