-- Return a running job to its old place in the queue: without counting a failure, or counting one where it may have
-- taken the worker's device along.
--
-- ARGV 1 job id   2 worker   3 attempt   4 '1' to count a failure   5 most dead letters kept
-- Writes what requeue() or finish() write. Returns 1 when this attempt gave the job back (now or by an earlier copy of
-- this call), 2 when the job ended as a dead letter with that, 0 when the attempt did not own it.

local id, worker, attempt = ARGV[1], ARGV[2], tonumber(ARGV[3])
write_at_memory_limit()
local job = load_job(id)
if not is_owned(job, worker, attempt) then
  return job and job.state == 'queued' and job.owner == worker and job.attempt == attempt and 1 or 0
end
if ARGV[4] == '1' then
  if lose(id, job, 'its worker lost its device', ARGV[5]) == 'dead' then return 2 end
elseif job.cancel then
  finish(id, job, 'cancelled')
elseif is_past_deadline(job) then
  finish(id, job, 'expired')
else
  requeue(id, job)
end
return 1
