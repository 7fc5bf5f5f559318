-- Look on at the batches: have the live workers tell theirs for another while, and read what they have told.
--
-- ARGV 1 ms for which this counts as looking on
-- Writes watched. Returns the encoded batch of each live worker that has told one, by the workers' names.

write_at_memory_limit()
redis.call('SET', prefix .. 'watched', '1', 'PX', ARGV[1])
local workers = redis.call('ZRANGEBYSCORE', prefix .. 'workers', now_ms, '+inf')
table.sort(workers)
local reply = {}
for _, worker in ipairs(workers) do
  local batch = redis.call('GET', prefix .. 'batch:' .. worker)
  if batch then reply[#reply + 1] = batch end
end
return reply
