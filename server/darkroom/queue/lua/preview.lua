-- Show what running images look like to those who watch.
--
-- ARGV 1 worker   2 ms that a preview is kept   3.. job id, attempt, index, step, picture, job id ...
-- Writes preview:<id>:<index>, job:<id>. Returns one number per picture: 1 shown, 0 not the owner any more.

local reply = {}
for i = 3, #ARGV, 5 do
  local id, index, step = ARGV[i], tonumber(ARGV[i + 2]), ARGV[i + 3]
  local job = load_job(id)
  if is_owned(job, ARGV[1], tonumber(ARGV[i + 1])) then
    redis.call('SET', preview_key(id, index), ARGV[i + 4], 'PX', ARGV[2])
    local steps = previews_of(id)
    for other = #steps + 1, index do steps[other] = '0' end
    steps[index + 1] = step
    redis.call('HSET', job_key(id), 'previews', table.concat(steps, ' '))
    redis.call('PUBLISH', prefix .. 'progress', id)
    reply[#reply + 1] = 1
  else
    reply[#reply + 1] = 0
  end
end
return reply
