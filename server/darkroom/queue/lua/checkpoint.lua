-- Keep the state of running images, so that whoever runs their jobs next can go on from there.
--
-- ARGV 1 worker   2.. job id, attempt, image index, job id ...
-- The same transaction has written each state to staged:<id>:<attempt>:<index>.
-- Writes checkpoint:<id>:<index>, job:<id>, removes staged:<id>:<attempt>:<index>. Returns one number for each: 1 kept,
-- 0 not the owner any more, or kept by an earlier copy of this call.

write_at_memory_limit()
local reply = {}
for i = 2, #ARGV, 3 do
  local id, index = ARGV[i], tonumber(ARGV[i + 2])
  local staged = prefix .. 'staged:' .. id .. ':' .. ARGV[i + 1] .. ':' .. ARGV[i + 2]
  local job = load_job(id)
  if is_owned(job, ARGV[1], tonumber(ARGV[i + 1])) and redis.call('EXISTS', staged) == 1 then
    redis.call('RENAME', staged, checkpoint_key(id, index))
    if index >= job.num_checkpoints then redis.call('HSET', job_key(id), 'checkpoints', index + 1) end
    reply[#reply + 1] = 1
  else
    redis.call('UNLINK', staged)
    reply[#reply + 1] = 0
  end
end
return reply
